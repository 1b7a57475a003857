"""Which pairs each step of a run or of a pass holds, and which of them each data-parallel rank; no process group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fastpref.data import PairSampler
from fastpref.run.config.arguments import TrainingArguments


class Slots(NamedTuple):
    """Places of the pairs of one microbatch; those behind the first `num_real` are fillers.

    A filler makes every rank run equally many rows and counts in nothing. It repeats a pair of its own step: the first
    one beside other padded rows, the cheapest one in a packed row that would be empty.
    """

    places: list[int]
    num_real: int

    @classmethod
    def of_packed_row(cls, row: Sequence[int], costs: Sequence[int]) -> Slots:
        """The pairs of a row from `plan_rows`; of these rows, only empty ones are filled."""
        return cls([*row] or [costs.index(min(costs))], len(row))


@dataclass(frozen=True)
class PairSchedule:
    """The pairs of every step, and their microbatches where rows are padded."""

    sampler: PairSampler
    """Deals `dp_size * micro_batch * num_micro` pairs to a step."""
    dp_size: int
    """Data-parallel ranks."""
    micro_batch: int
    """Pairs of a padded microbatch."""
    num_micro: int
    """Padded microbatches of a rank in one step."""
    total_steps: int
    """Steps in all."""

    @classmethod
    def training(cls, args: TrainingArguments, num_pairs: int, dp_size: int) -> PairSchedule:
        """The schedule of a run.

        Raises:
            ConfigError: there is no pair, or less than a whole batch with `drop_last`.
        """
        micro_batch, num_micro = args.per_device_train_batch_size, args.gradient_accumulation_steps
        pairs_per_step = dp_size * micro_batch * num_micro
        sampler = PairSampler(num_pairs, pairs_per_step, seed=args.seed, shuffle=args.shuffle, drop_last=args.drop_last)
        total_steps = args.max_steps or args.num_train_epochs * sampler.steps_per_epoch
        return cls(sampler, dp_size, micro_batch, num_micro, total_steps)

    @classmethod
    def one_pass(cls, args: TrainingArguments, num_pairs: int, dp_size: int, *, packed: bool = False) -> PairSchedule:
        """Every pair once, in order: padded in groups of microbatches that fill the pipeline, or packed as in training.

        Raises:
            ConfigError: there is no pair.
        """
        micro_batch = args.eval_batch_pairs
        num_micro = args.gradient_accumulation_steps if packed else args.pipeline_model_parallel_size
        sampler = PairSampler(num_pairs, dp_size * micro_batch * num_micro, shuffle=False)
        return cls(sampler, dp_size, micro_batch, num_micro, sampler.steps_per_epoch)

    @property
    def global_batch_pairs(self) -> int:
        """Pairs in one step over all ranks."""
        return self.sampler.global_batch_pairs

    @property
    def steps_per_epoch(self) -> int:
        """Steps in one pass over the pairs."""
        return self.sampler.steps_per_epoch

    def batch(self, step: int) -> list[int]:
        """The pairs of step `step`, counted from 0, over all ranks."""
        return self.sampler.batch(step)

    def microbatches(self, step: int, dp_rank: int) -> list[Slots]:
        """The padded microbatches of one rank in step `step`."""
        first = self.batch(step)[0]
        shards = self.sampler.shard(step, dp_rank, self.dp_size, self.micro_batch, self.num_micro)
        return [
            Slots([first if place is None else place for place in shard], len(shard) - shard.count(None))
            for shard in shards
        ]
