"""How every figure of measured rows is opened, dressed and written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def pyplot() -> Any:
    """Matplotlib's pyplot without a display; imported here because measuring needs none."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def dress(panel: Any, title: str, label: str, ticks: Mapping[int, str] | None = None) -> None:
    """Gives a panel its title, a logarithmic y-axis, and the label of its x-axis.

    Args:
        panel: axes that are drawn already.
        title: what y is, with its unit.
        label: what x is.
        ticks: position -> text on a logarithmic x-axis; None leaves the axis as it is.
    """
    from matplotlib.ticker import LogLocator, NullLocator

    panel.set_title(title, fontsize=10, loc="left")
    panel.set_xlabel(label, fontsize=9)
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_locator(NullLocator())
    if ticks is not None:
        panel.set_xscale("log", base=2)
        panel.set_xticks(list(ticks), list(ticks.values()))
        panel.xaxis.set_minor_locator(NullLocator())
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", which="major", linewidth=0.5, alpha=0.4)
    panel.tick_params(labelsize=8)


def save(figure: Any, title: str, file: Path, legend_of: Any = None, note: str = "") -> None:
    """Writes a figure as PNG, under a title, above the legend of one of its panels and a note, and closes it."""
    figure.suptitle(title, fontsize=11)
    if legend_of is not None:
        handles, labels = legend_of.get_legend_handles_labels()
        size = {"fontsize": 9, "title_fontproperties": {"size": 8, "style": "italic"}}
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, title=note or None, **size)
    elif note:
        figure.supxlabel(note, fontsize=8, style="italic")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
    pyplot().close(figure)
