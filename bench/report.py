"""Markdown tables from stored rows; no number in them is typed by hand."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from statistics import median

from bench.implementations import BARE, IMPLEMENTATIONS
from bench.measure import Row

BUSY_LOAD = 2.5
"""Load average above which a row says that others used the machine: the measuring process alone makes 2 at most."""
BARE_TARGET, FALLBACK_TARGET = 1.7, 1.1
OPEN = "<!-- tables: python -m bench table --into docs/benchmarks.md -->"
HEADER = (
    "| implementation | time, s | x bare product | GFLOP/s | time / ours | extra peak, MiB | peak / ours "
    "| error dX | error dW | load |\n|---|---|---|---|---|---|---|---|---|---|"
)


def read_rows(file: Path) -> dict[str, Row]:
    """Rows by implementation, in the order of the registry."""
    rows = json.loads(file.read_text(encoding="utf-8"))
    return {name: rows[name] for name in IMPLEMENTATIONS if name in rows}


def seconds(row: Row, name: str) -> float:
    """Median wall time of one of those timed in the turns of a row."""
    return median(row["times"][name]["wall_s"])


def ratio(row: Row, name: str, over: str) -> float:
    """How many times longer one of those timed in the turns of a row takes than another: `paired_ratio` of both."""
    return paired_ratio(row["times"][name]["wall_s"], row["times"][over]["wall_s"])


def paired_ratio(taken: Iterable[float], over: Iterable[float]) -> float:
    """Median of the ratios within each turn: a machine that is slower for a while is so for both sides of a pair."""
    return median(first / second for first, second in zip(taken, over, strict=False))


def table(workload: str, rows: dict[str, Row]) -> str:
    """One workload as a section: what was measured on what, one line per implementation, and the other targets."""
    right = {name: row for name, row in rows.items() if row["status"] in ("ok", "untimed")}
    timed = {name: row for name, row in right.items() if row["status"] == "ok"}
    lines = [f"### {workload}", ""]
    if right:
        lines += [_describe(next(iter(right.values()))), "", HEADER]
        lines += [_line(name, row, right) for name, row in right.items()]
    if timed:
        first = next(iter(timed.values()))
        bare_s = seconds(first, BARE)
        lines += [
            f"| bare product X W^T | {bare_s:.2f} | 1 | {gflops(first, 2, bare_s):.0f} | | | | | | {_load(first)} |"
        ]
    lines += ["", *_other_targets(workload, timed)]
    lines += [
        f"- {IMPLEMENTATIONS[name].title}: {row['status']}, {row['reason']}"
        for name, row in rows.items()
        if name not in right
    ]
    return "\n".join(lines) + "\n"


def _describe(row: Row) -> str:
    shape, machine = row["shape"], row["machine"]
    versions = ", ".join(f"{package} {version}" for package, version in row["versions"].items())
    return (
        f"R = {shape['rows']} response rows of T = {shape['positions']} padded positions in {shape['sequences']} "
        f"sequences, V = {shape['vocab']}, H = {shape['hidden']}, fp32; {100 * shape['active_fraction']:.1f} % of the "
        f"columns active at 2^-14. {machine['cpu']} ({machine['cpu_capability']}), {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB, {row['threads']} threads, engine {row['engine']}; {versions}; "
        f"commit {row['commit']}, {row['date']}; `{row['command']}`."
    )


def _line(name: str, row: Row, right: dict[str, Row]) -> str:
    """One implementation; times are left out of a row that has none, ratios of ours to itself are 1."""
    implementation, anchor = IMPLEMENTATIONS[name], row["ours"]
    cells = [f"{implementation.title}{' (ours)' if name == anchor else ''}", *_time_cells(name, row)]
    cells.append(f"{row['extra_peak_mib']:.0f}")
    if name == anchor or anchor not in right:
        cells.append("1" if name == anchor else "")
    else:
        peak_ratio = row["extra_peak_mib"] / right[anchor]["extra_peak_mib"]
        cells.append(_at_least(peak_ratio, implementation.memory_target))
    cells += [f"{row['errors'][tensor]['relative_l2']:.1e}" for tensor in ("d_hidden", "d_weight")]
    return f"| {' | '.join(cells)} | {_load(row) if 'times' in row else ''} |"


def _time_cells(name: str, row: Row) -> list[str]:
    if "times" not in row:
        return ["not timed", "", "", ""]
    anchor, wall_s, taken = row["ours"], seconds(row, name), row["times"][name]["wall_s"]
    return [
        f"{wall_s:.2f} ({min(taken):.2f} to {max(taken):.2f})",
        _at_most(ratio(row, name, BARE), BARE_TARGET if name == anchor else None),
        f"{gflops(row, 6, wall_s):.0f}",
        "1" if name == anchor else _at_least(ratio(row, name, anchor), IMPLEMENTATIONS[name].time_target),
    ]


def _other_targets(workload: str, timed: dict[str, Row]) -> list[str]:
    """Targets between two implementations other than "theirs over ours"."""
    lines = []
    exact, naive = timed.get("ours-exact"), timed.get("naive-rows")
    if exact and naive:
        time_ratio = ratio(exact, "ours-exact", "naive-rows")
        peak_ratio = exact["extra_peak_mib"] / naive["extra_peak_mib"]
        lines.append(
            f"- Exact over naive on response rows: time {_at_most(time_ratio, 1.0)}, peak {_at_most(peak_ratio, 0.2)}."
        )
    if exact and "ours-active" in exact["times"]:
        target = FALLBACK_TARGET if workload == "random-init" else None
        lines.append(f"- Active over exact: time {_at_most(ratio(exact, 'ours-active', 'ours-exact'), target)}.")
    return lines


def _at_least(value: float, target: float | None) -> str:
    return _against(value, target, ">=", "<", target is not None and value >= target)


def _at_most(value: float, target: float | None) -> str:
    return _against(value, target, "<=", ">", target is not None and value <= target)


def _against(value: float, target: float | None, met: str, missed: str, is_met: bool) -> str:
    """The value, bold where it meets its target."""
    if target is None:
        return f"{value:.2f}"
    return f"**{value:.2f}** {met} {target:g}" if is_met else f"{value:.2f} {missed} {target:g}"


def gflops(row: Row, products: int, wall_s: float) -> float:
    """Useful rate: `products` x R x V x H, whatever the implementation really computes."""
    shape = row["shape"]
    return products * shape["rows"] * shape["vocab"] * shape["hidden"] / wall_s / 1e9


def _load(row: Row) -> str:
    load = max(row["load_average"])
    return f"{load:.1f}, busy" if load > BUSY_LOAD else f"{load:.1f}"
