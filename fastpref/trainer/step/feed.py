"""From data sets to the microbatches of one rank at one step: a function of (seed, step), with nothing to restore."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from fastpref.data import (
    FILLER_ID,
    PackedCollator,
    PairSampler,
    plan_rows,
    rows_of_rank,
)
from fastpref.errors import ConfigError
from fastpref.losses import DPOConfig
from fastpref.run.config.arguments import TrainingArguments
from fastpref.run.plan.rows import default_collator, row_capacity
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
        data_collator: Callable[[list], Mapping[str, Tensor]] | None,
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

    @property
    def global_batch_pairs(self) -> int:
        """Pairs in one optimizer step over all ranks."""
        return self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.dp_size

    @property
    def sampler(self) -> PairSampler:
        """Order of the training pairs."""
        if self.train_dataset is None:
            raise ConfigError("training needs a train_dataset")
        return PairSampler(
            len(self.train_dataset),
            self.global_batch_pairs,
            seed=self.args.seed,
            shuffle=self.args.shuffle,
            drop_last=self.args.drop_last,
        )

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.args.max_steps or self.args.num_train_epochs * self.sampler.steps_per_epoch

    def train_batches(self, step: int) -> list[Microbatch]:
        """This rank's microbatches of optimizer step `step`, counted from 0."""
        sampler = self.sampler
        if self._row_length is not None:
            return self._packed(self.train_dataset, sampler.batch(step), self._row_length)
        shards = sampler.shard(
            step,
            self.dp_rank,
            self.dp_size,
            self.args.per_device_train_batch_size,
            self.args.gradient_accumulation_steps,
        )
        return [self._microbatch(self.train_dataset, sampler.batch(step), shard) for shard in shards]

    def eval_batches(self, dataset: Any) -> Iterator[list[Microbatch]]:
        """This rank's microbatches of one pass over `dataset`, in groups that fill the pipeline.

        Raises:
            DataError: a pair is larger than a packed row.
        """
        row_length = self._capacity(dataset)
        if row_length is not None:
            sampler = PairSampler(len(dataset), self.global_batch_pairs, shuffle=False)
            for step in range(sampler.steps_per_epoch):
                yield self._packed(dataset, sampler.batch(step), row_length)
            return
        pairs, group = self.args.eval_batch_pairs, self.args.pipeline_model_parallel_size
        sampler = PairSampler(len(dataset), pairs * group * self.dp_size, shuffle=False)
        for step in range(sampler.steps_per_epoch):
            shards = sampler.shard(step, self.dp_rank, self.dp_size, pairs, group)
            yield [self._microbatch(dataset, sampler.batch(step), shard) for shard in shards]

    def _capacity(self, dataset: Any) -> int | None:
        """Positions of a packed row of `dataset`; None where rows are padded."""
        if not isinstance(self.collate, PackedCollator):
            return None
        return row_capacity(dataset, self.collate, self.args.pack_length)

    def _packed(self, dataset: Any, batch: Sequence[int], row_length: int) -> list[Microbatch]:
        """This rank's rows of the pairs `batch`; every rank gets equally many."""
        assert isinstance(self.collate, PackedCollator)
        pairs = [dataset[index] for index in batch]
        costs = [self.collate.cost(pair) for pair in pairs]
        rows = plan_rows(costs, row_length, multiple_of=self.dp_size * _interleaved_stages(), seed=self.args.seed)
        # An empty row repeats the cheapest pair at weight 0, so that every rank runs equally many microbatches.
        filler = replace(pairs[costs.index(min(costs))], pair_id=FILLER_ID, weight=0.0)
        mine = rows_of_rank(rows, costs, self.dp_rank, self.dp_size)
        return [Microbatch.from_dict(self.collate([pairs[index] for index in row] or [filler])) for row in mine]

    def _microbatch(self, dataset: Any, batch: Sequence[int], shard: Sequence[int | None]) -> Microbatch:
        # A filler repeats some pair of the step at weight 0, so that every rank runs equal shapes.
        real = torch.tensor([index is not None for index in shard], dtype=torch.bool, device="cpu")
        indices = [batch[0] if index is None else index for index in shard]
        microbatch = Microbatch.from_dict(self.collate([dataset[index] for index in indices]))
        return replace(microbatch, weights_B=microbatch.weights_B * real)


def _interleaved_stages() -> int:
    """Pipeline stages, where the schedule interleaves them and takes microbatches in groups of that size; else 1."""
    if parallel_state.get_virtual_pipeline_model_parallel_world_size() is None:
        return 1
    return parallel_state.get_pipeline_model_parallel_world_size()
