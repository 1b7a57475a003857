"""Measured passes below the two ceilings of their machine: its rate of products, and of bytes times intensity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.figures import dress, pyplot, save
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
    points: Sequence[Point],
    styles: Mapping[str, tuple[str, str, str]],
    ceilings: Ceilings,
    title: str,
    file: Path,
    note: str = "",
) -> None:
    """Draw one.

    Args:
        points: in the ceilings' prefix; useful operations can pass the ceiling where work is left out.
        styles: by name: (label, colour, marker); what is not in it is left out.
        ceilings: measured on the same machine.
        title: what was measured on which machine.
        file: the PNG to write.
        note: what else a reader must know.
    """
    figure, panel = pyplot().subplots(figsize=(7.5, 5), layout="constrained")
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
    panel.xaxis.set_major_formatter("{x:g}")
    dress(panel, f"{ceilings.prefix}FLOP/s of useful operations", "operations per byte that must move")
    save(figure, title, file, panel, note)
