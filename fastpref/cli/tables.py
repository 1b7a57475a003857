"""What the commands show: rich renderables made of plain numbers. Nothing here prints."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from fastpref.data import DataReport, LengthStats
    from fastpref.run.plan.prepare import PreparedRun
    from fastpref.run.plan.preview import LayoutAxis, MemoryEstimate, PairView, StageLoad
    from fastpref.run.plan.row_usage import RowUsage

_PROMPT_TOKENS, _ANSWER_TOKENS = 48, 96
_MAIN_METRICS = (
    "loss",
    "rewards/accuracies",
    "rewards/margins",
    "rewards/chosen",
    "rewards/rejected",
    "logps/chosen",
    "logps/rejected",
)


def evaluation_changes(history: Sequence[Mapping[str, float]]) -> Table | None:
    """First and last evaluation of a run side by side; None where there was none."""
    evaluations = [record for record in history if "eval_loss" in record]
    if not evaluations:
        return None
    first, last = evaluations[0], evaluations[-1]
    columns = [f"step {first['step']:.0f}"]
    if last is not first:
        columns += [f"step {last['step']:.0f}", "change"]
    table = new_table("Evaluation", ("", *columns))
    for name in (f"eval_{metric}" for metric in _MAIN_METRICS):
        if name in first and name in last:
            cells = [f"{first[name]:z.4f}"]
            if last is not first:
                cells += [f"{last[name]:z.4f}", f"{last[name] - first[name]:+z.4f}"]
            table.add_row(name.removeprefix("eval_"), *cells)
    return table


def metrics(values: Mapping[str, float], title: str) -> Table:
    """Every metric of one evaluation."""
    table = new_table(title, ("", "mean"))
    for name, value in values.items():
        table.add_row(name.removeprefix("eval_"), f"{value:.6g}")
    return table


def summary(
    history: Sequence[Mapping[str, float]],
    steps: int,
    seconds: float,
    written: Mapping[str, str],
    steps_run: int | None = None,
) -> Table:
    """What a run did: steps (and how many of them now, where it was resumed), time, speed, and what it wrote where."""
    table = new_table("Run", ("", ""))
    table.add_row("optimizer steps", str(steps) if steps_run in (None, steps) else f"{steps} ({steps_run} of them now)")
    table.add_row("time", duration(seconds))
    rates = [record["perf/tokens_per_second"] for record in history if "perf/tokens_per_second" in record]
    if rates:
        table.add_row("tokens per second (median)", f"{statistics.median(rates):,.0f}")
    for what, where in written.items():
        table.add_row(what, where)
    return table


def data_report(reports: Mapping[str, DataReport]) -> Table:
    """Pairs kept, dropped and truncated, and token lengths, a column for each data set."""
    table = new_table("Data", ("", *reports))
    columns = list(reports.values())
    table.add_row("pairs kept", *(f"{report.kept:,} of {report.read:,}" for report in columns))
    for kind in ("dropped", "truncated"):
        for cause in sorted({cause for report in columns for cause in getattr(report, kind)}):
            table.add_row(f"{kind}: {cause}", *(f"{getattr(report, kind).get(cause, 0):,}" for report in columns))
    for kind, label in (("repeated_prompts", "repeated prompts"), ("unread", "not read")):
        for name in sorted({name for report in columns for name in getattr(report, kind)}):
            table.add_row(f"{label}: {name}", *(f"{getattr(report, kind).get(name, 0):,}" for report in columns))
    if any(report.boundary_moved for report in columns):
        table.add_row("boundary moved", *(f"{report.boundary_moved:,}" for report in columns))
    for part in ("prompt", "chosen", "rejected"):
        table.add_row(f"{part} tokens", *(_lengths(getattr(report, f"{part}_tokens")) for report in columns))
    return table


def _lengths(stats: LengthStats) -> str:
    return f"{stats.min}-{stats.max}, mean {stats.mean:.1f}, 95% <= {stats.p95}"


def plan(run: PreparedRun, axes: Sequence[LayoutAxis], reference: str) -> RenderableType:
    """Layout of the ranks, then batch and schedule."""
    layout = new_table(f"Layout (world size {run.world_size})", ("parallel", "ranks", "with rank 0"))
    for axis in axes:
        shown = ", ".join(map(str, axis.ranks_with_0[:8])) + (", ..." if axis.size > 8 else "")
        layout.add_row(axis.name, str(axis.size), shown)
    args = run.config.training
    batches = new_table("Schedule", ("", ""))
    batches.add_row(
        "global batch",
        f"{run.schedule.global_batch_pairs} pairs = {args.per_device_train_batch_size} per rank x "
        f"{args.gradient_accumulation_steps} accumulated x {run.data_parallel_size} data-parallel",
    )
    batches.add_row("steps per epoch", f"{run.schedule.steps_per_epoch:,}")
    batches.add_row("total steps", f"{run.schedule.total_steps:,}")
    batches.add_row("warm-up steps", f"{args.warmup_steps_of(run.schedule.total_steps):,}")
    batches.add_row("epochs", f"{run.schedule.total_steps / run.schedule.steps_per_epoch:.2f}")
    batches.add_row("reference", reference)
    return Group(layout, batches)


def stages(loads: Sequence[StageLoad], balance: str) -> Table | None:
    """Layers and work of every pipeline stage; None without a pipeline."""
    if len(loads) == 1:
        return None
    table = new_table(f"Pipeline stages ({balance})", ("stage", "layers", "head, in layers (estimate)", "work"))
    for stage, load in enumerate(loads):
        head = f"{load.head_layers:.2f}" if load.head_layers else ""
        table.add_row(str(stage), str(load.layers), head, f"{load.share:.1%}")
    waiting = 1.0 - 1.0 / (len(loads) * max(load.share for load in loads))
    table.add_row("waiting for the slowest", "", "", f"{waiting:.1%}", style="dim")
    return table


def rows(usages: Sequence[RowUsage]) -> Table:
    """What each way of laying out rows computes; the run's own is marked."""
    table = new_table("Rows", ("", "rows/step", "positions/pair", "padding"))
    for usage in usages:
        cells = [f"{usage.rows_per_step:,.1f}", f"{usage.positions_per_pair:,.1f}", f"{usage.padding_fraction:.1%}"]
        name = f"{usage.kind} (this run)" if usage.is_used else usage.kind
        table.add_row(name, *cells, style="bold" if usage.is_used else None)
    return table


def memory(estimate: MemoryEstimate, full_logits: int) -> Table:
    """Memory of the rank that needs most."""
    table = new_table("Memory of the largest rank", ("", "size"))
    trained = "" if estimate.trainable == estimate.parameters else f", {estimate.trainable / 1e6:,.3f} M trained"
    table.add_row(f"weights ({estimate.parameters / 1e6:,.1f} M parameters{trained})", _size(estimate.weights))
    if estimate.active_parameters < estimate.model_parameters:
        whole, active = (f"{size / 1e6:,.1f} M" for size in (estimate.model_parameters, estimate.active_parameters))
        table.add_row("whole model", f"{whole} parameters, {active} per token")
    for name in ("reference", "gradients", "optimizer"):
        table.add_row(name, _size(getattr(estimate, name)))
    if estimate.screened:
        table.add_row("screened heads, int8", _size(estimate.screened))
    table.add_row("activations (estimate)", _size(estimate.activations))
    table.add_row("head, peak (estimate)", _size(estimate.head))
    table.add_row("total (estimate)", _size(estimate.total), style="bold")
    table.add_row("not held: logits of a microbatch", _size(full_logits), style="dim")
    return table


def pair(view: PairView, index: int) -> RenderableType:
    """A tokenised pair: the end of its prompt, then each answer with its scored tokens in ⟦ ⟧."""
    lines: list[RenderableType] = [Text(f"Pair {index}: {view.source}", style="bold")]
    skipped = max(0, len(view.prompt) - _PROMPT_TOKENS)
    prompt = Text(f"  prompt ({len(view.prompt)} tokens, not scored): ", style="dim")
    prompt.append(f"... {skipped} more ... " if skipped else "").append(_joined(view.prompt[skipped:]))
    lines.append(prompt)
    for name, style in (("chosen", "green"), ("rejected", "red")):
        tokens = getattr(view, name)
        line = Text(f"  {name} ({len(tokens)} tokens, scored): ")
        line.append("⟦").append(_shortened(tokens), style=style).append("⟧")
        lines.append(line)
    return Group(*lines, Text(""))


def _shortened(tokens: Sequence[str]) -> str:
    if len(tokens) <= _ANSWER_TOKENS:
        return _joined(tokens)
    head, tail = tokens[: _ANSWER_TOKENS - 16], tokens[-16:]
    return f"{_joined(head)} ... {len(tokens) - _ANSWER_TOKENS} more ... {_joined(tail)}"


def _joined(tokens: Sequence[str]) -> str:
    # token bounds are shown; control characters must not reach the terminal
    return "|".join(tokens).translate({code: repr(chr(code))[1:-1] for code in (*range(32), *range(127, 160))})


def duration(seconds: float) -> str:
    """Format seconds as 1 h 02 min 03 s."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, whole = divmod(rest, 60)
    if hours:
        return f"{hours} h {minutes:02d} min {whole:02d} s"
    return f"{minutes} min {whole:02d} s" if minutes else f"{seconds:.1f} s"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"


def new_table(title: str, headers: Sequence[str]) -> Table:
    """Return an empty table in the style of the command line; columns after the first are numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.show_header = any(headers)
    for index, header in enumerate(headers):
        is_number = index > 0 and header != "with rank 0" and any(headers)
        table.add_column(header, justify="right" if is_number else "left", overflow="fold")
    return table
