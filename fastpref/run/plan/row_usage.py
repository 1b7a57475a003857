"""What padding costs: how many positions the model computes for the pairs of a run, padded, packed, and shared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from fastpref.data import PackedCollator, PairSampler, TokenizedPair, plan_rows
from fastpref.errors import DataError
from fastpref.run.plan.prepare import PreparedRun
from fastpref.run.plan.rows import default_collator, row_capacity

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
    sampler = PairSampler(
        len(dataset), run.global_batch_pairs, seed=args.seed, shuffle=args.shuffle, drop_last=args.drop_last
    )
    steps = range(min(MAX_STEPS, sampler.steps_per_epoch))
    batches = [sampler.batch(step) for step in steps]
    usages = []
    for kind in KINDS:
        try:
            rows = list(_rows(run, kind, dataset, batches))
        except DataError:  # pairs that fit where prompts are shared may not fit where they are not
            continue
        computed = sum(length for length, _ in rows)
        usages.append(
            RowUsage(
                kind=kind,
                rows_per_step=len(rows) / len(steps),
                positions_per_pair=computed / sum(map(len, batches)),
                padding_fraction=1.0 - sum(used for _, used in rows) / computed,
                is_used=kind == kind_of_run,
            )
        )
    return usages


def _rows(
    run: PreparedRun, kind: str, dataset: Sequence[TokenizedPair], batches: list[list[int]]
) -> Iterator[tuple[int, int]]:
    """Yield (positions, positions of pairs) of every row of all ranks."""
    args = run.config.training
    if kind == "padded":
        dp, size = run.data_parallel_size, args.per_device_train_batch_size
        for batch in batches:
            for rank in range(dp):
                yield from _padded_rows([dataset[i] for i in batch[rank::dp]], dataset[batch[0]], run, size)
        return
    layout = args.layout
    multiple_of = run.data_parallel_size * (layout.pp if layout.vpp else 1)
    packed_args = replace(args, packing=True, prefix_sharing=kind == KINDS[2], per_device_eval_batch_size=None)
    collator = default_collator(run.config.loss, packed_args, 0, run.config.data.pad_to_multiple_of)
    assert isinstance(collator, PackedCollator)
    capacity = row_capacity(dataset, collator, args.pack_length)
    for batch in batches:
        costs = [collator.cost(dataset[index]) for index in batch]
        for row in plan_rows(costs, capacity, multiple_of=multiple_of, seed=args.seed):
            used = sum(costs[index] for index in row)
            yield run.row_length(used or min(costs)), used


def _padded_rows(
    pairs: list[TokenizedPair], filler: TokenizedPair, run: PreparedRun, size: int
) -> Iterator[tuple[int, int]]:
    """Yield the rows of one rank's microbatches of `size` pairs; fillers take part in a microbatch's length."""
    for microbatch in range(run.config.training.gradient_accumulation_steps):
        real = pairs[microbatch * size : (microbatch + 1) * size]
        length = run.row_length(max(pair.num_tokens for pair in (real if len(real) == size else [*real, filler])) - 1)
        for pair in real:
            yield length, len(pair.chosen_input_ids) - 1
            yield length, len(pair.rejected_input_ids) - 1
        yield from [(length, 0)] * (2 * (size - len(real)))
