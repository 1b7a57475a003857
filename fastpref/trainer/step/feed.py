"""From data sets to the microbatches of one rank at one step: a function of (seed, step), with nothing to restore."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from fastpref.data import FILLER_ID, PackedCollator, rows_of_rank
from fastpref.errors import ConfigError
from fastpref.losses import DPOConfig
from fastpref.run.config.arguments import TrainingArguments
from fastpref.run.plan.pair_schedule import PairSchedule, Slots
from fastpref.run.plan.rows import default_collator, packed_rows, row_capacity
from fastpref.trainer.ranks.platform import current_layout
from fastpref.trainer.step.batch import Microbatch


class PairFeed:
    """Deals pairs to data-parallel ranks and microbatches.

    Args:
        args: batch sizes, epochs and seed.
        config: the loss; decides which second label mask the collator makes.
        train_dataset: indexable pairs, or None.
        eval_dataset: indexable pairs, or None.
        data_collator: list of items -> batch; None for `PreferenceCollator`, or `PackedCollator` with packing.
        tokenizer: names the padding token of the default collator; 0 without one.

    Raises:
        ConfigError: packing with a collator that pads, or the other way round; a pack_length that rows cannot have.
        DataError: a pair is larger than a packed row.
    """

    def __init__(
        self,
        args: TrainingArguments,
        config: DPOConfig,
        train_dataset: Any,
        eval_dataset: Any,
        data_collator: Callable[[list[Any]], Mapping[str, Tensor]] | None,
        tokenizer: Any,
    ) -> None:
        self.args = args
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        pad_token_id = getattr(tokenizer, "pad_token_id", None)
        self.collate = data_collator or default_collator(config, args, 0 if pad_token_id is None else pad_token_id)
        self.dp_size = parallel_state.get_data_parallel_world_size()
        self.dp_rank = parallel_state.get_data_parallel_rank()
        if args.packing != isinstance(self.collate, PackedCollator):
            raise ConfigError(
                f"packing is {args.packing}, but data_collator is a {type(self.collate).__name__}: rows are packed by "
                "PackedCollator alone; leave data_collator out or change packing"
            )
        self._row_length = None if train_dataset is None else self._capacity(train_dataset)

    @property
    def datasets(self) -> dict[str, Any]:
        """The data sets that are there, by what they are called in a message."""
        found = {"training pairs": self.train_dataset, "evaluation pairs": self.eval_dataset}
        return {name: dataset for name, dataset in found.items() if dataset is not None}

    @cached_property
    def schedule(self) -> PairSchedule:
        """The training pairs of every optimizer step."""
        if self.train_dataset is None:
            raise ConfigError("training needs a train_dataset")
        return PairSchedule.training(self.args, len(self.train_dataset), self.dp_size)

    def train_batches(self, step: int) -> list[Microbatch]:
        """This rank's microbatches of optimizer step `step`, counted from 0."""
        return self._batches(self.train_dataset, self.schedule, step, self._row_length)

    def eval_batches(self, dataset: Any) -> Iterator[list[Microbatch]]:
        """This rank's microbatches of one pass over `dataset`, in groups that fill the pipeline.

        Raises:
            DataError: a pair is larger than a packed row.
        """
        row_length = self._capacity(dataset)
        schedule = PairSchedule.one_pass(self.args, len(dataset), self.dp_size, packed=row_length is not None)
        for step in range(schedule.total_steps):
            yield self._batches(dataset, schedule, step, row_length)

    def _capacity(self, dataset: Any) -> int | None:
        """Positions of a packed row of `dataset`; None where rows are padded."""
        if not isinstance(self.collate, PackedCollator):
            return None
        return row_capacity(dataset, self.collate, self.args.pack_length)

    def _batches(self, dataset: Any, schedule: PairSchedule, step: int, row_length: int | None) -> list[Microbatch]:
        """This rank's microbatches of one step, as many as every rank's."""
        if row_length is None:
            return [collated(self.collate, dataset, slots) for slots in schedule.microbatches(step, self.dp_rank)]
        assert isinstance(self.collate, PackedCollator)
        pairs = [dataset[index] for index in schedule.batch(step)]
        costs = [self.collate.cost(pair) for pair in pairs]
        rows = packed_rows(costs, row_length, current_layout(), self.dp_size, self.args.seed)
        mine = rows_of_rank(rows, costs, self.dp_rank, self.dp_size)
        return [collated(self.collate, pairs, Slots.of_packed_row(row, costs)) for row in mine]


def collated(
    collate: Callable[[list[Any]], Mapping[str, Tensor]], dataset: Any, slots: Slots, vocab_size: int | None = None
) -> Microbatch:
    """The microbatch of some pairs of `dataset`; fillers get the weight 0 and `FILLER_ID`."""
    batch = Microbatch.from_dict(collate([dataset[place] for place in slots.places]), vocab_size)
    is_real_B = torch.arange(len(slots.places), dtype=torch.int64, device="cpu") < slots.num_real
    return replace(
        batch, weights_B=batch.weights_B * is_real_B, pair_ids_B=batch.pair_ids_B.where(is_real_B, FILLER_ID)
    )
