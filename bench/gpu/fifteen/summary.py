"""The text summary of one command; every figure in it is computed from stored rows."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from bench.gpu.fifteen import plan
from bench.gpu.folder import Folder
from bench.gpu.heads import ANCHOR, PRODUCTS
from bench.gpu.summary import tflops
from bench.implementations import BARE
from bench.measure import Row
from bench.report import screened_text


def write(command: int, folder: Folder) -> None:
    """Write a command's summary anew, as a whole."""
    partial = folder.path / f"{plan.summary_file(command)}.tmp"
    partial.write_text(text(command, folder.rows(plan.rows_file(command))), encoding="utf-8")
    partial.replace(folder.path / plan.summary_file(command))


def text(command: int, rows: dict[str, Row]) -> str:
    """Return Markdown: a line per step, then what each has found."""
    names = [step.name for step in plan.COMMANDS[command]]
    known = [name for name in rows if name not in names] + [name for name in names if name in rows]
    lines = [f"# Command {command}", "", *_origin(rows), "", "| step | | seconds | |", "|---|---|---|---|"]
    for name in known:
        row = rows[name]
        reason = str(row.get("reason") or row.get("summary") or "").replace("|", "/")
        lines.append(f"| {name} | {row['status']} | {row.get('took_s', '')} | {reason} |")
    missing = [name for name in names if name not in rows]
    lines += ["", f"Not begun: {', '.join(missing) or 'none'}.", ""]
    for name in known:
        if details := list(_details(rows[name])):
            lines += [f"## {name}", "", *details, ""]
    return "\n".join(lines)


def _origin(rows: dict[str, Row]) -> Iterator[str]:
    row = next(iter(rows.values()), {})
    versions = ", ".join(f"{package} {version}" for package, version in row.get("versions", {}).items())
    yield f"{row.get('gpu', 'no device named')}; {versions}; commit {row.get('commit', '?')}, {row.get('date', '?')}."


def _details(row: Row) -> Iterator[str]:
    """What a row says beyond its status."""
    yield from (f"- {key}: {row[key]}" for key in ("name", "nvidia_smi", "l2_mib", "entries") if key in row)
    if "gemm_tflops" in row:
        yield f"- bf16 product 8192^3: {row['gemm_tflops']} TFLOP/s; copy: {row['copy_tb_per_s']} TB/s"
    if "product_tflops" in row:
        yield f"- X W^T of the main head: {row['product_ms']} ms, {row['product_tflops']} TFLOP/s"
    if "shape" in row:
        yield f"- {', '.join(f'{key} {value}' for key, value in row['shape'].items())}"
    for name, each in row.get("plans", {}).items():
        yield from _head(name, each, row["shape"])
    if "title" in row and "times_ms" in row:
        yield from _head(row["title"], row, row["shape"])
    for name, each in row.get("rows", {}).items():
        yield f"- {name}: {each['status']} {each.get('reason', '')}"
        yield from _head(name, each, each.get("shape", {}))
    for key, found in row.get("measured", {}).items():
        yield from (f"- {key} {one['tile']}: {one['ms']:.3f} ms {one['error'] or ''}" for one in found)
    yield from (f"    {line}" for line in row.get("lines", []))
    if row.get("kernels_compiled"):
        names = sorted(set(row["kernels_compiled"]))
        yield f"- compiled here, {len(row['kernels_compiled'])} variants: {', '.join(names)}"


def _head(name: str, row: Row, shape: Row) -> Iterator[str]:
    """Errors, times and phases of one implementation or plan."""
    for tensor, error in row.get("errors", {}).items():
        yield f"- {name}, {tensor}: relative error {error['relative_l2']:.2e}, largest {error['max']:.2e}"
    if "screened" in row:
        yield f"- {name}: {screened_text(row)}"
    for kind, times in row.get("times_ms", {}).items():
        for each, taken in times.items():
            label = f"{name}, " if each not in (BARE, ANCHOR) else ""
            rate = tflops({"shape": shape, "times_ms": {kind: {each: taken}}}, kind, each)
            yield (
                f"- {label}{each} {kind}: {median(taken):.3f} ms ({min(taken):.3f} to {max(taken):.3f}), "
                f"{rate:.1f} TFLOP/s of {2 * PRODUCTS[kind]} RHV"
            )
    for kind, found in row.get("phases", {}).items():
        if "reason" in found:
            yield f"- {name} {kind}: {found['reason']}"
            continue
        parts = ", ".join(f"{phase} {one['ms']:.3f} ms in {one['kernels']}" for phase, one in found["phases"].items())
        yield (
            f"- {name} {kind}: kernels {found['kernels_ms']:.3f} of {found['taken_ms']:.3f} ms, {found['launches']} "
            f"launches, {found['waits']} waits; {parts}"
        )
