"""Measured passes below the two ceilings of their machine: its rate of products, and of bytes times intensity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.measure import Row


class Ceilings(NamedTuple):
    """What a machine does at best, in operations and bytes per second with one prefix, and that prefix."""

    operations: float
    bytes: float
    prefix: str


class Point(NamedTuple):
    """One pass: by what, operations per byte that must move, and useful operations per second."""

    name: str
    intensity: float
    rate: float


def intensity(shape: Row, item_bytes: int, *, is_backward: bool) -> float:
    """Useful operations of a pass over the fewest bytes: inputs read once, and gradients written once."""
    rows, hidden, vocab = shape["rows"], shape["hidden"], shape["vocab"]
    products, passes = (3, 2) if is_backward else (1, 1)
    return 2 * products * rows * hidden * vocab / (item_bytes * passes * hidden * (rows + vocab))


def draw_roofline(
    points: Sequence[Point], styles: Mapping[str, tuple[str, str, str]], ceilings: Ceilings, title: str, file: Path
) -> None:
    """Draw one.

    Args:
        points: in the ceilings' prefix; useful operations can pass the ceiling where work is left out.
        styles: by name: (label, colour, marker); what is not in it is left out.
        ceilings: measured on the same machine.
        title: what was measured on which machine.
        file: the PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator

    figure, panel = plt.subplots(figsize=(7.5, 5), layout="constrained")
    ridge = ceilings.operations / ceilings.bytes
    at = [point.intensity for point in points] + [ridge]
    x = [min(at) / 2, ridge, max(at) * 2]
    roof = [min(ceilings.operations, ceilings.bytes * each) for each in x]
    panel.plot(x, roof, color="#333333", label="measured copy and product")
    for name, (label, colour, marker) in styles.items():
        found = [(point.intensity, point.rate) for point in points if point.name == name]
        if found:
            panel.scatter(*zip(*found, strict=True), color=colour, marker=marker, s=22, label=label, zorder=3)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.xaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter("{x:g}")
    panel.set_title(f"{ceilings.prefix}FLOP/s of useful operations", fontsize=10, loc="left")
    panel.set_xlabel("operations per byte that must move", fontsize=9)
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", which="major", linewidth=0.5, alpha=0.4)
    panel.tick_params(labelsize=8)
    figure.suptitle(title, fontsize=11)
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
    plt.close(figure)
