"""Figures: every implementation on one head; time and memory against vocabulary, response rows and their share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from bench.figures import dress, pyplot, save
from bench.implementations import BARE
from bench.measure import Row
from bench.report import gflops, peak_mib, ratio, seconds
from bench.roofline import Ceilings, Point, draw_roofline, intensity

STYLES = {
    "ours-screened": ("fastpref, screened", "#7b2cbf", "h"),
    "ours-screened-shared": ("fastpref, screened, int8 copy shared", "#b388eb", "p"),
    "ours-active": ("fastpref, active", "#c1121f", "o"),
    "ours-exact": ("fastpref, exact", "#f08a5d", "s"),
    "cce": ("Apple CCE", "#2a9d8f", "^"),
    "torch-lce": ("torch linear_cross_entropy", "#3a7d44", "<"),
    "naive-rows": ("naive, response rows", "#1d3557", "v"),
    "trl": ("TRL chunked", "#8d6a9f", "D"),
    "naive-pairs": ("naive, all positions", "#6c757d", "P"),
    "liger": ("Liger DPO", "#b08900", "X"),
}
"""(label, colour, marker) of what is drawn."""

NOTE = "The kernels of Liger and CCE are made for GPUs; here both run as what torch.compile makes of them for a CPU."
"""On every figure with these two on a CPU."""
IN_PRODUCTS = ("naive-rows", "cce", "ours-exact", "ours-active", "ours-screened")
"""What is drawn in units of the bare product, from above."""

_VOCAB_TICKS = {2**power: f"{2 ** (power - 10)}k" if power < 20 else "1M" for power in range(14, 21)}
AXES: dict[str, tuple[str, dict[int, str] | None]] = {
    "vocab": ("vocabulary", _VOCAB_TICKS),
    "rows": ("response rows", {2**power: str(2**power) for power in range(7, 11)}),
    "fraction": ("response rows / positions", None),
}
"""Of a sweep: the label of its axis, and its ticks."""


def draw_bars(workload: str, rows: dict[str, Row], file: Path) -> None:
    """Draw time and extra peak memory of every implementation on one head.

    Args:
        workload: name of the head, for the title.
        rows: by implementation; those that were not timed are left out.
        file: the PNG to write.
    """
    timed = sorted((name for name in STYLES if rows.get(name, {}).get("status") == "ok"), key=_time_over_ours(rows))
    labels, colours, _ = zip(*(STYLES[name] for name in reversed(timed)), strict=True)
    figure, panels = pyplot().subplots(1, 2, figsize=(11, 0.42 * len(timed) + 1.9), layout="constrained", sharey=True)
    measures = {
        "Time, forward + backward (s)": [seconds(rows[name], name) for name in reversed(timed)],
        "Extra peak memory (MiB)": [peak_mib(rows[name]) for name in reversed(timed)],
    }
    for panel, (title, values) in zip(panels, measures.items(), strict=True):
        bars = panel.barh(labels, values, color=colours, height=0.68)
        panel.bar_label(
            bars, [f"{value:.1f}" if value < 100 else f"{value:.0f}" for value in values], padding=3, fontsize=8
        )
        panel.set_title(title, fontsize=10, loc="left")
        panel.set_xlim(0, 1.12 * max(values))
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.tick_params(labelsize=9, left=False)
        panel.grid(axis="x", linewidth=0.5, alpha=0.4)
        panel.set_axisbelow(True)
    shape = rows[timed[0]]["shape"]
    title = (
        f"DPO head of {workload} on two CPU cores: R = {shape['rows']} response rows, V = {shape['vocab']:,}, "
        f"H = {shape['hidden']}, fp32"
    )
    save(figure, title, file, note=NOTE)


def draw_products(workload: str, rows: dict[str, Row], file: Path) -> bool:
    """Draw the time of passes forward and backward in units of the bare product, all from the turns of one row.

    Args:
        workload: name of the head, for the title.
        rows: by implementation.
        file: the PNG to write.

    Returns:
        Whether it is drawn: not while one of `IN_PRODUCTS` has no right row, or was not timed beside the screened pass.
    """
    right = {name for name in IN_PRODUCTS if rows.get(name, {}).get("status") == "ok"}
    if right != set(IN_PRODUCTS) or not right <= set(rows["ours-screened"]["times"]):
        return False
    row, shape = rows["ours-screened"], rows["ours-screened"]["shape"]
    names = [*reversed(IN_PRODUCTS)]
    labels, colours, _ = zip(*(STYLES[name] for name in names), strict=True)
    figure, panel = pyplot().subplots(figsize=(8, 0.42 * len(names) + 1.9), layout="constrained")
    bars = panel.barh(labels, [ratio(row, name, BARE) for name in names], color=colours, height=0.68)
    panel.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    panel.axvline(1.0, color="#333333", linewidth=1, linestyle=":")
    panel.set_title("Time, forward + backward / time of one product X W^T", fontsize=10, loc="left")
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.tick_params(labelsize=9, left=False)
    title = f"{workload} on {row['threads']} CPU cores: R = {shape['rows']}, V = {shape['vocab']:,}, fp32"
    save(figure, title, file, note=NOTE)
    return True


def _time_over_ours(rows: dict[str, Row]) -> Callable[[str], float]:
    return lambda name: seconds(rows[name], name) / seconds(rows[name], rows[name]["ours"])


def draw(rows: list[dict[str, Row]], axis: str, file: Path) -> None:
    """Draw one sweep.

    Args:
        rows: one dict of rows by implementation for each workload of the sweep.
        axis: a key of `AXES`.
        file: the PNG to write.
    """
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for name, (label, colour, marker) in STYLES.items():
        found = [workload[name] for workload in rows if workload.get(name, {}).get("status") == "ok"]
        if not found:
            continue
        found.sort(key=lambda row: _position(row, axis))
        x = [_position(row, axis) for row in found]
        style = {"label": label, "color": colour, "marker": marker, "markersize": 5, "linewidth": 1.6}
        if name.startswith("ours"):
            style |= {"linewidth": 2.6, "zorder": 3 if name == "ours-exact" else 4}
        left.plot(x, [seconds(row, name) for row in found], **style)
        right.plot(x, [peak_mib(row) / 1024 for row in found], **style)
    shapes = [row["shape"] for workload in rows for row in workload.values() if row["status"] == "ok"]
    shape = max(shapes, key=lambda shape: (shape["vocab"], shape["positions"]))
    held = {
        "vocab": f"R = {shape['rows']} response rows of {shape['positions']} positions",
        "rows": f"R of 2R positions in the response, V = {shape['vocab']:,}",
        "fraction": f"T = {shape['positions']} positions, V = {shape['vocab']:,}",
    }[axis]
    for panel, title in ((left, "Time, forward + backward (s)"), (right, "Extra peak memory (GiB)")):
        dress(panel, title, *AXES[axis])
    save(figure, f"DPO head on a CPU: {held}, H = {shape['hidden']}, fp32", file, left, NOTE)


def draw_heads_roofline(heads: Sequence[dict[str, Row]], machine: Row, file: Path) -> None:
    """Draw every timed pass of every head below what `machine` does at best.

    Args:
        heads: rows by implementation, for each head.
        machine: rates from `measure.ceilings`.
        file: the PNG to write.
    """
    points = [
        Point(name, intensity(row["shape"], 4, is_backward=True), gflops(row, 6, seconds(row, name)))
        for rows in heads
        for name, row in rows.items()
        if row["status"] == "ok"
    ]
    ceilings = Ceilings(machine["gflops"], machine["copy_gb_per_s"], "G")
    title = f"DPO heads, forward + backward, on {machine['threads']} CPU cores in fp32"
    draw_roofline(points, STYLES, ceilings, title, file, NOTE)


def _position(row: Row, axis: str) -> float:
    shape = row["shape"]
    return shape["rows"] / shape["positions"] if axis == "fraction" else shape[axis]
