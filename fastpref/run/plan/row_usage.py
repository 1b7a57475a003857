"""What padding costs: how many positions the model computes for the pairs of a run, padded, packed, and shared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from fastpref.data import PackedCollator, TokenizedPair
from fastpref.errors import DataError
from fastpref.run.plan.pair_schedule import PairSchedule, Slots
from fastpref.run.plan.prepare import PreparedRun
from fastpref.run.plan.rows import default_collator, packed_rows, row_capacity

MAX_STEPS = 200
"""Steps of the first epoch that are looked at: enough for means, and quick on any data set."""
KINDS = ("padded", "packed", "packed, prompt shared")


@dataclass(frozen=True, kw_only=True)
class RowUsage:
    """Means over the first steps of a run for one way of laying out rows."""

    kind: str
    """One of `KINDS`."""
    rows_per_step: float
    """Rows of the model's input in an optimizer step, over all ranks."""
    positions_per_pair: float
    """Positions that the model computes for a pair, padding and fillers included."""
    padding_fraction: float
    """Share of these positions that belong to no pair."""
    is_used: bool
    """Whether the run lays out rows like this."""


def row_usages(run: PreparedRun) -> list[RowUsage]:
    """Return a line for each kind of rows that the pairs fit into, of the training set where there is one."""
    dataset = run.train if run.train is not None else run.eval
    if dataset is None:
        return []
    args = run.config.training
    kind_of_run = KINDS[args.packing + args.prefix_sharing]
    schedule = PairSchedule.training(args, len(dataset), run.data_parallel_size)
    steps = range(min(MAX_STEPS, schedule.steps_per_epoch))
    usages = []
    for kind in KINDS:
        try:
            rows = list(_rows(run, kind, dataset, schedule, steps))
        except DataError:  # pairs that fit where prompts are shared may not fit where they are not
            continue
        computed = sum(length for length, _ in rows)
        usages.append(
            RowUsage(
                kind=kind,
                rows_per_step=len(rows) / len(steps),
                positions_per_pair=computed / sum(len(schedule.batch(step)) for step in steps),
                padding_fraction=1.0 - sum(used for _, used in rows) / computed,
                is_used=kind == kind_of_run,
            )
        )
    return usages


def _rows(
    run: PreparedRun, kind: str, dataset: Sequence[TokenizedPair], schedule: PairSchedule, steps: range
) -> Iterator[tuple[int, int]]:
    """Yield (positions, positions of pairs) of every row of all ranks."""
    args = run.config.training
    if kind == "padded":
        for step in steps:
            for rank in range(schedule.dp_size):
                for places, num_real in schedule.microbatches(step, rank):
                    yield from _padded_rows([dataset[place] for place in places], num_real, run)
        return
    packed_args = replace(args, packing=True, prefix_sharing=kind == KINDS[2], per_device_eval_batch_size=None)
    collator = default_collator(run.config.loss, packed_args, 0, run.config.data.pad_to_multiple_of)
    assert isinstance(collator, PackedCollator)
    capacity = row_capacity(dataset, collator, args.pack_length)
    for step in steps:
        costs = [collator.cost(dataset[index]) for index in schedule.batch(step)]
        for row in packed_rows(costs, capacity, args.layout, schedule.dp_size, args.seed):
            slots = Slots.of_packed_row(row, costs)
            yield run.row_length(sum(costs[place] for place in slots.places)), sum(costs[place] for place in row)


def _padded_rows(pairs: list[TokenizedPair], num_real: int, run: PreparedRun) -> Iterator[tuple[int, int]]:
    """Yield the rows of one microbatch; fillers take part in its length."""
    length = run.row_length(max(pair.num_tokens for pair in pairs) - 1)
    for index, pair in enumerate(pairs):
        for ids, _ in pair.sides:
            yield length, len(ids) - 1 if index < num_real else 0
