"""Tables and a figure of the runs that `training_effect` has stored, also while some are missing."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.figures import pyplot, save
from bench.measure import Row
from bench.training_effect import BASE, RUNS, compared

OPEN = "<!-- tables: python -m bench training-effect --into docs/numerics.md -->"
STYLES: dict[str, dict[str, Any]] = {
    "seed-1": {"color": "#8d99ae", "marker": "v", "linewidth": 1.3},
    "seed-2": {"color": "#c2b8a3", "marker": "^", "linewidth": 1.3},
    "bf16": {"color": "#8d6a9f", "marker": "D", "linewidth": 1.3},
    BASE: {"color": "#1d3557", "marker": "s", "linewidth": 4.5, "alpha": 0.35},
    "active-8": {"color": "#2a9d8f", "marker": "o", "linewidth": 1.8},
    "active-6": {"color": "#c1121f", "marker": "o", "linewidth": 1.4, "linestyle": (0, (3, 2))},
    "screened": {"color": "#7b2cbf", "marker": "h", "linewidth": 1.4, "linestyle": (0, (1, 1))},
}
"""How each run is drawn, in this order: what agrees lies upon each other."""
SEEDS = "exact, other orders"
PARTS = {
    "all": "all weights",
    "others": "all but the head",
    "seen": "head, tokens of the pairs",
    "unseen": "head, other tokens",
}
"""Weights that are compared; the pairs are those that the runs train on."""
WINDOW = 20
"""Steps that a point of a smoothed curve is the mean of."""


def tables(content: Row) -> str:
    """Markdown: what was trained, how each run ended, and how far runs are from each other."""
    plan, pairs = content["plan"], content["pairs"]
    first: Row = next(iter(content["runs"].values()), {})
    machine = (
        f"{first['machine']['cpu']}, torch {first['versions']['torch']}, commit {first['commit']}" if first else ""
    )
    head = (
        f"{plan['model']}, {plan['steps']} steps of {plan['pairs']} pairs in packed rows with shared prompts, fp32, "
        f"learning rate {plan['learning_rate']:g} at most; {pairs['train']} pairs to train on and {pairs['held_out']} "
        f"held out, of at most {plan['max_length']} tokens ({pairs['prompt_tokens']:.0f} of prompt and "
        f"{pairs['answer_tokens']:.0f} of answer on average). {machine}; `{content['command']}`."
    )
    missing = [RUNS[name].title for name in RUNS if name not in content["runs"] and not RUNS[name].bf16]
    note = f"\nNot done yet: {'; '.join(missing)}.\n" if missing else ""
    return "\n".join([head, note, runs_table(content), "", comparisons_table(content)]) + "\n"


def runs_table(content: Row) -> str:
    """One line for each run."""
    last = max(content["plan"]["steps"] // 4, 1)
    lines = [
        f"| run | loss, last {last} steps | margin, last {last} steps | held-out loss | held-out accuracy "
        "| held-out margin | active | weights travelled |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, run in _done(content).items():
        curves, ends = run["curves"], {metric: values[-1] for metric, values in run["evaluations"].items()}
        cells = [
            RUNS[name].title,
            f"{fmean(curves['loss'][-last:]):.4f}",
            f"{fmean(curves['margin'][-last:]):.3f}",
            f"{ends['loss']:.4f}",
            f"{ends['accuracy']:.1%}",
            f"{ends['margin']:.3f}",
            f"{fmean(curves['active_fraction']):.1%}" if "active_fraction" in curves else "",
            f"{content['travelled'][name]['all']:.3f}" if name in content["travelled"] else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def comparisons_table(content: Row) -> str:
    """One line for each run beside `BASE`, the seeds in one line as the mean of all their pairs."""
    columns = ["compared", "loss of a step", "held-out loss", "held-out margin of a pair", *PARTS.values()]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for title, cells in comparisons(content).items():
        texts = [title, *map(_number, cells.values())]
        lines.append(f"| {' | '.join(texts)} |")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if value >= 0.1 else f"{value:.1e}"


def comparisons(content: Row) -> dict[str, dict[str, float | None]]:
    """How far runs are from each other, by what is compared; the pairs of seeds as the mean of all.

    Returns:
        Mean difference of the loss of a step; difference of the held-out loss at the end; root mean square difference
        of a held-out pair's margin; distance of the final weights over the distance travelled. Steps are compared where
        they saw the same pairs, weights where they were kept in fp32; else None.
    """
    found: dict[str, list[dict[str, float | None]]] = {}
    runs = _done(content)
    for first, second in compared([name for name in RUNS if name in runs]):
        are_seeds = RUNS[first].seed != RUNS[second].seed
        title = SEEDS if are_seeds else f"{RUNS[second].title} and {RUNS[first].title}"
        found.setdefault(title, []).append(_compare(content, first, second, are_seeds))
    return {title: {name: _mean([each[name] for each in rows]) for name in rows[0]} for title, rows in found.items()}


def _compare(content: Row, first: str, second: str, are_seeds: bool) -> dict[str, float | None]:
    one, other = content["runs"][first], content["runs"][second]
    margins = [(a - b) ** 2 for a, b in zip(one["held_out_margins"], other["held_out_margins"], strict=True)]
    steps = [abs(a - b) for a, b in zip(one["curves"]["loss"], other["curves"]["loss"], strict=True)]
    apart, travelled = content["apart"].get(f"{first} {second}"), content["travelled"].get(first)
    distances: dict[str, float | None] = dict.fromkeys(PARTS)
    if apart and travelled:
        distances = {part: apart[part] / travelled[part] for part in PARTS}
    return {
        "loss": None if are_seeds else fmean(steps),
        "held_out_loss": abs(one["evaluations"]["loss"][-1] - other["evaluations"]["loss"][-1]),
        "held_out_margin": fmean(margins) ** 0.5,
        **distances,
    }


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return fmean(there) if there else None


def _done(content: Row) -> dict[str, Row]:
    return {name: content["runs"][name] for name in RUNS if name in content["runs"]}


def draw(content: Row, file: Path) -> None:
    """Draw curves of training and evaluation, and how far runs end apart.

    Args:
        content: as stored.
        file: the PNG to write.
    """
    figure, panels = pyplot().subplots(2, 3, figsize=(13.5, 7.4), layout="constrained")
    (loss, margin, held_out), (step, pairs, weights) = panels
    for name in (name for name in STYLES if name in content["runs"]):
        run = content["runs"][name]
        style = STYLES[name] | {"markersize": 5, "label": RUNS[name].title}
        for panel, curve in ((loss, "loss"), (margin, "margin")):
            panel.plot(*_smoothed(run["curves"][curve]), **style | {"marker": ""})
        held_out.plot(run["evaluations"]["step"], run["evaluations"]["loss"], **style)
    _draw_steps(step, content)
    _draw_pairs(pairs, content)
    _draw_weights(weights, content)
    _dress(loss, f"Training loss, mean of {WINDOW} steps", "step")
    _dress(margin, f"Training margin, mean of {WINDOW} steps", "step")
    _dress(held_out, "Held-out loss", "step")
    plan = content["plan"]
    title = (
        f"Exact, active and screened heads through {plan['steps']} DPO steps of {plan['model']}: the same pairs in the "
        "same order, beside other orders"
    )
    save(figure, title, file, loss)


def _smoothed(values: Sequence[float]) -> tuple[list[int], list[float]]:
    window = min(WINDOW, len(values))
    ends = range(window, len(values) + 1)
    return [*ends], [fmean(values[end - window : end]) for end in ends]


def _draw_steps(panel: Any, content: Row) -> None:
    """How the loss of one step moves away from that of `BASE`, for runs of the same order."""
    base = content["runs"].get(BASE)
    same = [name for name in STYLES if name in content["runs"] and name != BASE and RUNS[name].seed == RUNS[BASE].seed]
    for name in same if base else ():
        apart = [
            abs(a - b) for a, b in zip(content["runs"][name]["curves"]["loss"], base["curves"]["loss"], strict=True)
        ]
        panel.plot(*_smoothed(apart), **STYLES[name] | {"marker": "", "linestyle": "-"})
    if base and same:
        losses = base["curves"]["loss"]
        between = fmean(abs(after - before) for before, after in pairwise(losses))
        panel.axhline(between, color="#6c757d", linestyle=":", linewidth=1)
        at = {"xy": (0.02, between), "xycoords": panel.get_yaxis_transform(), "va": "bottom"}
        panel.annotate("change of the loss from one step to the next", fontsize=8, color="#6c757d", **at)
        panel.set_yscale("log")
    _dress(panel, f"Loss of a step, difference from exact, mean of {WINDOW}", "step")


def _draw_pairs(panel: Any, content: Row) -> None:
    """Margins of the held-out pairs against those of `BASE`."""
    base = content["runs"].get(BASE)
    for name in (name for name in STYLES if name in content["runs"] and name != BASE) if base else ():
        style = {"color": STYLES[name]["color"], "marker": STYLES[name]["marker"]}
        found = content["runs"][name]["held_out_margins"]
        panel.scatter(base["held_out_margins"], found, s=22, alpha=0.8, linewidths=0, **style)
    if base:
        corner = min(base["held_out_margins"]), min(base["held_out_margins"])
        panel.axline(corner, slope=1, color="#1d3557", linewidth=0.8, alpha=0.6, zorder=0)
    _dress(panel, "Margin of each held-out pair, against that of exact", "exact")


def _draw_weights(panel: Any, content: Row) -> None:
    """Distance of the final weights over the distance travelled."""
    found = comparisons(content)
    colours = {RUNS[name].title: style["color"] for name, style in STYLES.items()}
    known = {title: cells for title, cells in found.items() if cells["all"] is not None}
    width = 0.8 / max(len(known), 1)
    for place, (title, cells) in enumerate(known.items()):
        colour = colours.get(title.removesuffix(f" and {RUNS[BASE].title}"), STYLES["seed-1"]["color"])
        at = [index + (place - (len(known) - 1) / 2) * width for index in range(len(PARTS))]
        bars = panel.bar(at, [cells[part] for part in PARTS], 0.94 * width, color=colour)
        panel.bar_label(bars, fmt="{:.2g}", fontsize=8, padding=2)
    panel.set_xticks(range(len(PARTS)), [title.replace(", ", ",\n") for title in PARTS.values()])
    if known:
        panel.set_yscale("log")
        panel.set_ylim(bottom=0.3 * min(cells[part] or 1.0 for cells in known.values() for part in PARTS))
    _dress(panel, "Final weights: distance from exact / distance travelled", "")


def _dress(panel: Any, title: str, label: str) -> None:
    panel.set_title(title, fontsize=10, loc="left")
    panel.set_xlabel(label, fontsize=9)
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", linewidth=0.5, alpha=0.4)
    panel.set_axisbelow(True)
    panel.tick_params(labelsize=8)
