"""The curves of a run: loss, margins, accuracies and log-probs of training and evaluation, from `metrics.jsonl`."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastpref.errors import ConfigError, DataError, MissingDependencyError
from fastpref.files import write_durably
from fastpref.run.record.reporting import METRICS_FILE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TRAIN, _EVAL = "#4c72b0", "#dd8452"
_CHOSEN, _REJECTED = "#2a9d5c", "#c44e52"
_SMALL = 9
_FORMATS = (".png", ".pdf", ".svg")
# (title, curves) of a panel; a curve is (metric, label, colour, line style).
_PANELS: tuple[tuple[str, tuple[tuple[str, str, str, str], ...]], ...] = (
    ("Loss", (("loss", "train", _TRAIN, "-"), ("eval_loss", "evaluation", _EVAL, "o-"))),
    (
        "Reward margin",
        (("rewards/margins", "train", _TRAIN, "-"), ("eval_rewards/margins", "evaluation", _EVAL, "o-")),
    ),
    (
        "Reward accuracy",
        (("rewards/accuracies", "train", _TRAIN, "-"), ("eval_rewards/accuracies", "evaluation", _EVAL, "o-")),
    ),
    (
        "Log-prob of the answers",
        (
            ("logps/chosen", "chosen", _CHOSEN, "-"),
            ("logps/rejected", "rejected", _REJECTED, "-"),
            ("eval_logps/chosen", "chosen, evaluation", _CHOSEN, "o--"),
            ("eval_logps/rejected", "rejected, evaluation", _REJECTED, "o--"),
        ),
    ),
)


def read_metrics(run_dir: str | Path) -> list[dict[str, float]]:
    """Read the records of a run, oldest first; a last line that was cut off is left out.

    Raises:
        DataError: the run has no metrics, or a line is no JSON object.
    """
    path = Path(run_dir) / METRICS_FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read: {error}; give the output_dir of a run", str(path)) from error
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == len(lines):  # the run was killed, or is writing
                break
            raise DataError(f"is not JSON: {error}", str(path), number) from error
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise DataError('must be a JSON object with a whole "step"', str(path), number)
        records.append(record)
    if not records:
        raise DataError("holds no record yet; wait for the first log", str(path))
    return records


def draw_curves(records: Sequence[Mapping[str, float]], output: str | Path, title: str = "") -> None:
    """Draw a 2 x 2 figure; the suffix of `output` chooses the format (png, pdf, svg).

    Raises:
        ConfigError: `output` has another suffix.
        DataError: no record has a metric of any panel.
        MissingDependencyError: matplotlib is not installed.
    """
    if Path(output).suffix not in _FORMATS:
        raise ConfigError(f"the picture must end in {', '.join(_FORMATS)}; got {str(output)!r}")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise MissingDependencyError('curves need matplotlib: pip install "fastpref[megatron]"') from error
    # The object interface: no global state, no window, and none of the user's style files.
    figure = Figure(
        figsize=(10, 6.4), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12), facecolor="white"
    )
    FigureCanvasAgg(figure)
    drawn = [
        _draw_panel(axes, name, curves, records)
        for axes, (name, curves) in zip(figure.subplots(2, 2).flat, _PANELS, strict=True)
    ]
    if not any(drawn):
        raise DataError("no record has a loss, margin, accuracy or log-prob to draw")
    if title:
        figure.suptitle(title, fontsize=13)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    picture = io.BytesIO()
    figure.savefig(picture, format=Path(output).suffix.removeprefix("."))
    write_durably(Path(output), picture.getvalue())


def _draw_panel(
    axes: Axes, name: str, curves: Sequence[tuple[str, str, str, str]], records: Sequence[Mapping[str, float]]
) -> bool:
    """Draw one panel; returns whether it has a curve."""
    for metric, label, color, style in curves:
        points = [(record["step"], record[metric]) for record in records if metric in record]
        if points:
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, style, color=color, label=label, linewidth=1.6, markersize=4)
    axes.set_title(name, fontsize=11, loc="left", fontweight="bold")
    axes.grid(color="#e3e3e3", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=_SMALL, color="#999999")
    axes.set_xlabel("step", fontsize=_SMALL)
    axes.locator_params(axis="x", integer=True)
    axes.margins(x=0.02)
    if name == "Reward accuracy":
        axes.axhline(0.5, color="#999999", linewidth=0.9, linestyle=":")
        axes.set_ylim(-0.03, 1.03)
    if axes.lines and axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=_SMALL, frameon=False)
        return True
    return False
