"""The Markdown summary of a folder of results; every figure in it is computed from stored rows.

Dims: R rows, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

from bench.gpu.folder import Folder
from bench.gpu.heads import ANCHOR, PRODUCTS
from bench.gpu.parts import LARGE, MAIN, TITLES, head_jobs, unmeasured
from bench.gpu.published import BEST, FORWARD, PER_ROW, Published, published_table, scaled_ms
from bench.gpu.steps_table import steps_table
from bench.implementations import BARE, IMPLEMENTATIONS
from bench.measure import Row
from bench.report import screened_text

HEADER = (
    "| implementation | pass | time, ms | TFLOP/s | x bare products | time / ours | extra peak, MiB | of it returned "
    "| error dX | error dW |\n|---|---|---|---|---|---|---|---|---|---|"
)


def write(folder: Folder, *, is_dry: bool) -> str:
    """Return the summary of what is in a folder."""
    workloads = list(dict.fromkeys(workload for workload, _ in head_jobs(is_dry)))
    tables = {workload: folder.rows(f"head-{workload}.json") for workload in workloads}
    sections = [
        "# Measurements on a GPU" + (" (dry run on a CPU: no figure in it means anything)" if is_dry else ""),
        _sanity(folder.rows("sanity.json")),
        _targets(tables),
        *(_heads(workload, rows) for workload, rows in tables.items() if rows),
        _activity(folder.rows("activity.json")),
        steps_table(folder.rows("steps.json")),
        published_table(
            {name: found.title for name, found in IMPLEMENTATIONS.items()}, set(_right(tables.get(MAIN, {})))
        ),
        _left_out(list(unmeasured(folder, is_dry))),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def tflops(row: Row, kind: str, name: str) -> float:
    """Useful rate of a pass: 2 RHV or 6 RHV operations, whatever an implementation really computes."""
    shape = row["shape"]
    return (
        2e-9 * PRODUCTS[kind] * shape["rows"] * shape["hidden"] * shape["vocab"] / median(row["times_ms"][kind][name])
    )


def temporary_mib(row: Row, kind: str) -> float:
    """Peak memory beyond what the pass returns."""
    return row["extra_peak_mib"][kind] - row["returned_mib"][kind]


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a figure should be."""

    workload: str
    what: str
    found: float | None
    """None where it is not measured."""
    limit: float
    is_rising: bool = False
    """Whether larger is better."""
    reason: str
    """Where the limit comes from."""

    def line(self) -> str:
        """Its line of the table."""
        limit = f"{'>=' if self.is_rising else '<='} {self.limit:.4g}"
        if self.found is None:
            return f"| {self.workload} | {self.what} | not measured | {limit} | | {self.reason} |"
        is_met = self.found >= self.limit if self.is_rising else self.found <= self.limit
        verdict = "met" if is_met else "missed"
        return f"| {self.workload} | {self.what} | {self.found:.4g} | {limit} | {verdict} | {self.reason} |"


def targets(tables: dict[str, dict[str, Row]]) -> Iterator[Target]:
    """Yield the targets, the largest vocabulary first; rows by workload and implementation."""
    for workload, vocab in ((LARGE, 262_144), (MAIN, BEST.vocab)):
        right = _right(tables.get(workload, {}))
        exact, cached, active = (right.get(name) for name in ("ours-exact", "ours-cached", "ours-active"))
        for row, name, published in ((active, "active", BEST), (cached, "cached", BEST), (exact, "exact", PER_ROW)):
            yield Target(
                workload=workload,
                what=f"{name}, forward + backward, ms",
                found=row and _ms(row, "both", f"ours-{name}"),
                limit=scaled_ms(published, vocab),
                reason=_published_reason(published, vocab),
            )
        yield Target(
            workload=workload,
            what="forward (reference pass), TFLOP/s of 2 RHV",
            found=active and tflops(active, "reference", "ours-active"),
            limit=690.0,
            is_rising=True,
            reason=f"cost model, 690 to 720; published {FORWARD.figure:g} on an {FORWARD.device}",
        )
        yield Target(
            workload=workload,
            what="active, forward + backward over forward",
            found=active and _ms(active, "both", "ours-active") / _ms(active, "reference", "ours-active"),
            limit=1.7,
            reason="cost model at 10 % active columns; the table below has this workload's share",
        )
        for row, name in ((active, "active"), (exact, "exact")):
            yield Target(
                workload=workload,
                what=f"{name}, extra peak memory beyond gradients, MiB",
                found=row and temporary_mib(row, "both"),
                limit=1024.0,
                reason="the cache's 512 MiB and as much again",
            )


def _published_reason(published: Published, vocab: int) -> str:
    taken = f"published {published.figure:g} ms on an {published.device} at V={published.vocab}"
    return taken if vocab == published.vocab else f"{taken}, in proportion to V"


def _ms(row: Row, kind: str, name: str) -> float:
    return median(row["times_ms"][kind][name])


def _right(rows: dict[str, Row]) -> dict[str, Row]:
    return {name: row for name, row in rows.items() if row["status"] == "ok"}


def _targets(tables: dict[str, dict[str, Row]]) -> str:
    header = "| workload | | found | target | | where the target comes from |\n|---|---|---|---|---|---|"
    return "\n".join(["## Targets", "", header, *(target.line() for target in targets(tables))])


def _sanity(rows: dict[str, Row]) -> str:
    if not rows:
        return ""
    lines = [f"## Part 1: {TITLES[1]}", ""]
    device = rows.get("device", {})
    known = ("name", "capability", "multiprocessors", "memory_gib", "l2_mib", "cuda", "nvidia_smi")
    lines += [f"- {key}: {device[key]}" for key in known if key in device]
    if "gemm_tflops" in device:
        lines.append(f"- bf16 product: {device['gemm_tflops']} TFLOP/s; copy: {device['copy_tb_per_s']} TB/s")
    for name, row in rows.items():
        if name != "device":
            lines.append(f"- {name}: {row['status']}, {row.get('reason') or row.get('summary') or _tiles(row)}")
    return "\n".join(lines)


def _tiles(row: Row) -> str:
    """Fastest and shipped time of every H."""
    parts = []
    for key, found in row.get("measured", {}).items():
        right = [one["ms"] for one in found if one["error"] is None]
        shipped = found[0]["ms"] if found[0]["error"] is None else float("nan")
        parts.append(f"{key}: {min(right):.3f} ms, shipped tile {shipped:.3f} ms")
    return "; ".join(parts)


def _heads(workload: str, rows: dict[str, Row]) -> str:
    right = _right(rows)
    lines = [f"## {workload}", ""]
    if right:
        first = next(iter(right.values()))
        lines += [_describe(first), "", HEADER]
        lines += [line for name, row in right.items() for line in _lines(name, row)]
        bare = [f"{kind} {tflops(first, kind, BARE):.1f}" for kind in first["times_ms"]]
        lines += ["", f"Bare products in the turns of {first['title']}, TFLOP/s: {', '.join(bare)}."]
        lines += [f"- {row['title']}: {screened_text(row)}." for row in right.values() if "screened" in row]
    others = [(name, row) for name, row in rows.items() if name not in right]
    if others:
        lines += ["", *(f"- {IMPLEMENTATIONS[name].title}: {row['status']}, {row['reason']}" for name, row in others)]
    return "\n".join(lines)


def _describe(row: Row) -> str:
    shape, versions = row["shape"], ", ".join(f"{package} {version}" for package, version in row["versions"].items())
    return (
        f"R = {shape['rows']} response rows of T = {shape['positions']} positions in {shape['sequences']} sequences, "
        f"H = {shape['hidden']}, V = {shape['vocab']}, {row['dtype']}; {100 * shape['active_fraction']:.1f} % of the "
        f"columns above 2^-14 at some row. {row.get('gpu') or row['machine']['cpu']}; {versions}; commit "
        f"{row['commit']}, {row['date']}; `{row['command']}`."
    )


def _lines(name: str, row: Row) -> Iterator[str]:
    """One line per pass."""
    for kind, times in row["times_ms"].items():
        taken, bare, ours = (times[each] for each in (name, BARE, ANCHOR))
        cells = [
            row["title"] + ("" if row["loss"] == "dpo" else f" ({row['loss']})"),
            kind,
            f"{median(taken):.3f} ({min(taken):.3f} to {max(taken):.3f})",
            f"{tflops(row, kind, name):.1f}",
            f"{median(taken) / median(bare):.2f}",
            f"{median(taken) / median(ours):.2f}",
            f"{row['extra_peak_mib'][kind]:.0f}"
            + (f" + {row['shared_mib']:.0f} shared" if "shared_mib" in row else ""),
            f"{row['returned_mib'][kind]:.0f}",
            *(f"{row['errors'][tensor]['relative_l2']:.1e}" for tensor in ("d_hidden", "d_weight")),
        ]
        yield f"| {' | '.join(cells)} |"


def _activity(rows: dict[str, Row]) -> str:
    if not rows:
        return ""
    lines = [
        "## Drawn activations beside real ones",
        "",
        "| model | rows | active, drawn | real | |",
        "|---|---|---|---|---|",
    ]
    for model, row in rows.items():
        if row["status"] == "failed":
            lines.append(f"| {model} | | | | failed, {row['reason']} |")
            continue
        shares = f"{row['active_fraction']:.1%} | {row['expected']:.1%}"
        lines.append(f"| {model} | {row['rows']} | {shares} | {row['status']} |")
    return "\n".join(lines)


def _left_out(missing: list[tuple[str, str]]) -> str:
    if not missing:
        return ""
    workloads: dict[str, list[str]] = {}
    for workload, name in missing:
        workloads.setdefault(workload, []).append(name)
    lines = [f"- {workload}: {', '.join(names)}" for workload, names in workloads.items()]
    return "\n".join(["## Not measured: no time left, or the model is not at hand", "", *lines])
