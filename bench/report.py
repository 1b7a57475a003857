"""Markdown tables from stored rows; no number in them is typed by hand."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import NamedTuple

from bench.implementations import BARE, IMPLEMENTATIONS
from bench.measure import Row
from bench.oracle import TOKEN_LIMITS
from bench.workloads import MODELS, NAMES

BUSY_LOAD = 2.5
"""Load average above which a row says that others used the machine: the measuring process alone makes 2 at most."""
FALLBACK_TARGET = 1.1
"""Time of the active plan over that of the exact one on a flat softmax."""
SCREENED_FALLBACK_TARGET = 1.15
"""Time of a screened pass over that of an exact one on a flat softmax."""


class Layout(NamedTuple):
    """What a table shows of one kind of pass.

    Attributes:
        mark: between which and the end of tables it stands in a page.
        suffix: of the workload's name, for the heading of a section.
        products: of R V H multiply-adds, two operations each, that a pass must do.
        bare_targets: by implementation, what its time over the bare product should at most be.
        errors: the heading of each error column, its tensor, and which of its measures.
    """

    mark: str
    suffix: str
    products: int
    bare_targets: dict[str, float]
    errors: dict[str, tuple[str, str]]

    def header(self) -> str:
        """Return the first two lines of a table."""
        names = ["implementation", "time, s", "x bare product", "GFLOP/s", "time / ours", "extra peak, MiB"]
        names += ["peak / ours", *self.errors, "load"]
        return f"| {' | '.join(names)} |\n{'|---' * len(names)}|"


LAYOUTS = {
    "head": Layout(
        mark="<!-- tables: python -m bench table --into docs/benchmarks.md -->",
        suffix="",
        products=3,
        bare_targets={"ours-active": 1.7, "ours-screened": 0.7},
        errors={"error dX": ("d_hidden", "relative_l2"), "error dW": ("d_weight", "relative_l2")},
    ),
    "score": Layout(
        mark="<!-- tables of scoring: python -m bench table --into docs/benchmarks.md -->",
        suffix=", scoring",
        products=1,
        bare_targets={"ours-screened": 0.4, "ours-screened-shared": 0.4},
        errors={"error of a token, nat": ("token_logps", "rms"), "largest": ("token_logps", "max")},
    ),
}
"""By the command that stores the rows."""
OPEN = LAYOUTS["head"].mark


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


def peak_mib(row: Row) -> float:
    """The peak above what was there before, with what the caller had made for the pass."""
    peak: float = row["extra_peak_mib"] + row.get("shared_mib", 0.0)
    return peak


def tables(kind: str, results: Path) -> str:
    """The sections of all workloads that have rows, or what makes them.

    Args:
        kind: of the pass, a key of `LAYOUTS`.
        results: directory of the rows.
    """
    files = {name: results / f"{kind}-{name}.json" for name in NAMES}
    found = [table(name, read_rows(file), kind) for name, file in files.items() if file.exists()]
    return "\n".join(found) if found else f"Not measured yet: `python -m bench {kind} --workload {NAMES[0]}`.\n"


def table(workload: str, rows: dict[str, Row], kind: str = "head") -> str:
    """One workload as a section: what was measured on what, one line per implementation, and the other targets."""
    right = {name: row for name, row in rows.items() if row["status"] in ("ok", "untimed")}
    timed = {name: row for name, row in right.items() if row["status"] == "ok"}
    lines = [f"### {workload}{LAYOUTS[kind].suffix}", ""]
    if right:
        lines += [_describe(next(iter(right.values()))), "", LAYOUTS[kind].header()]
        lines += [_line(name, row, right, kind) for name, row in right.items()]
    if timed:
        first = next(iter(timed.values()))
        bare_s = seconds(first, BARE)
        lines += [
            f"| bare product X W^T | {bare_s:.2f} | 1 | {gflops(first, 2, bare_s):.0f} | | | | | | {_load(first)} |"
        ]
    lines.append("")
    lines += [
        f"- {IMPLEMENTATIONS[name].title}: {screened_text(row)}." for name, row in right.items() if "screened" in row
    ]
    lines += _other_targets(workload, timed) if kind == "head" else _fallback(workload, timed)
    lines += [
        f"- {IMPLEMENTATIONS[name].title}: {row['status']}, {row['reason']}"
        for name, row in rows.items()
        if name not in right
    ]
    return "\n".join(lines) + "\n"


def _describe(row: Row) -> str:
    shape, machine = row["shape"], row["machine"]
    active = f"{100 * shape['active_fraction']:.1f} %"
    versions = ", ".join(f"{package} {version}" for package, version in row["versions"].items())
    return (
        f"R = {shape['rows']} response rows of T = {shape['positions']} padded positions in {shape['sequences']} "
        f"sequences, V = {shape['vocab']}, H = {shape['hidden']}, {_dtype(row)}; {active} of the "
        f"columns active at 2^-14. {machine['cpu']} ({machine['cpu_capability']}), {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB, {row['threads']} threads, engine {row['engine']}; {versions}; "
        f"commit {row['commit']}, {row['date']}; `{row['command']}`."
    )


def _dtype(row: Row) -> str:
    return {"float32": "fp32", "bfloat16": "bf16"}[row.get("dtype", "float32")]


def _line(name: str, row: Row, right: dict[str, Row], kind: str) -> str:
    """One implementation; times are left out of a row that has none, ratios of ours to itself are 1."""
    implementation, anchor = IMPLEMENTATIONS[name], row["ours"]
    cells = [f"{implementation.title}{' (ours)' if name == anchor else ''}", *_time_cells(name, row, kind)]
    cells.append(_memory(row))
    if name == anchor or anchor not in right:
        cells.append("1" if name == anchor else "")
    else:
        peak_ratio = peak_mib(row) / peak_mib(right[anchor])
        cells.append(_at_least(peak_ratio, implementation.memory_target if kind == "head" else None))
    cells += [f"{row['errors'][tensor][measure]:.1e}" for tensor, measure in LAYOUTS[kind].errors.values()]
    return f"| {' | '.join(cells)} | {_load(row) if 'times' in row else ''} |"


def _memory(row: Row) -> str:
    """The peak above what was there before, and what the caller had made for the pass."""
    shared = f" + {row['shared_mib']:.0f} shared" if "shared_mib" in row else ""
    return f"{row['extra_peak_mib']:.0f}{shared}"


def _time_cells(name: str, row: Row, kind: str) -> list[str]:
    if "times" not in row:
        return ["not timed", "", "", ""]
    anchor, wall_s, taken = row["ours"], seconds(row, name), row["times"][name]["wall_s"]
    target = IMPLEMENTATIONS[name].time_target if kind == "head" else None
    return [
        f"{wall_s:.2f} ({min(taken):.2f} to {max(taken):.2f})",
        _at_most(ratio(row, name, BARE), LAYOUTS[kind].bare_targets.get(name)),
        f"{gflops(row, 2 * LAYOUTS[kind].products, wall_s):.0f}",
        "1" if name == anchor else _at_least(ratio(row, name, anchor), target),
    ]


def screened_text(row: Row) -> str:
    """What a row with a screened forward pass multiplied exactly, and how far the log-prob of a token is off."""
    found, tokens = row["screened"], row["errors"]["token_logps"]
    rms, most = (_small(tokens[measure], limit) for measure, limit in TOKEN_LIMITS.items())
    return (
        f"{found['active_fraction']:.1%} of the columns multiplied exactly for {found['chunk_rows']} rows at once, the "
        f"others in int8 ({found['path']}); log-prob of a token off by {rms} nat (root mean square), {most} at most"
    )


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
    screened = timed.get("ours-screened")
    if screened and "ours-active" in screened["times"]:
        # The same gradients by an exact forward pass: that is what screening must not lose against.
        target = 1.0 if workload in MODELS else None
        over_active = ratio(screened, "ours-screened", "ours-active")
        lines.append(f"- Screened over active with an exact forward pass: time {_at_most(over_active, target)}.")
    return lines + _fallback(workload, timed)


def _fallback(workload: str, timed: dict[str, Row]) -> list[str]:
    """What a flat softmax costs, which a screened pass must see and leave to the exact one."""
    screened = timed.get("ours-screened")
    if workload != "random-init" or screened is None or "ours-exact" not in screened["times"]:
        return []
    over_exact = ratio(screened, "ours-screened", "ours-exact")
    return [f"- Screened over exact: time {_at_most(over_exact, SCREENED_FALLBACK_TARGET)}."]


def _at_least(value: float, target: float | None) -> str:
    return _against(value, target, ">=", "<", target is not None and value >= target)


def _at_most(value: float, target: float | None) -> str:
    return _against(value, target, "<=", ">", target is not None and value <= target)


def _small(value: float, target: float) -> str:
    """The same of an error."""
    return f"**{value:.1e}** <= {target:.0e}" if value <= target else f"{value:.1e} > {target:.0e}"


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
