"""From data sets to the microbatches of one rank at one step: a function of (seed, step), with nothing to restore."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from fastpref.data import PairSampler, PreferenceCollator
from fastpref.data.collate import NllMask
from fastpref.errors import ConfigError
from fastpref.losses import DPOConfig
from fastpref.trainer.arguments import TrainingArguments
from fastpref.trainer.batch import Microbatch


class PairFeed:
    """Deals pairs to data-parallel ranks and microbatches.

    Args:
        args: batch sizes, epochs and seed.
        config: the loss; decides which second label mask the collator makes.
        train_dataset: indexable pairs, or None.
        eval_dataset: indexable pairs, or None.
        data_collator: list of items -> batch; None for `PreferenceCollator`.
        tokenizer: names the padding token of the default collator.
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
        self.collate = data_collator or default_collator(config, tokenizer)
        self.dp_size = parallel_state.get_data_parallel_world_size()
        self.dp_rank = parallel_state.get_data_parallel_rank()

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
        shards = sampler.shard(
            step,
            self.dp_rank,
            self.dp_size,
            self.args.per_device_train_batch_size,
            self.args.gradient_accumulation_steps,
        )
        return [self._microbatch(self.train_dataset, sampler.batch(step), shard) for shard in shards]

    def eval_batches(self, dataset: Any) -> Iterator[list[Microbatch]]:
        """This rank's microbatches of one pass over `dataset`, in groups that fill the pipeline."""
        pairs, group = self.args.eval_batch_pairs, self.args.pipeline_model_parallel_size
        sampler = PairSampler(len(dataset), pairs * group * self.dp_size, shuffle=False)
        for step in range(sampler.steps_per_epoch):
            shards = sampler.shard(step, self.dp_rank, self.dp_size, pairs, group)
            yield [self._microbatch(dataset, sampler.batch(step), shard) for shard in shards]

    def _microbatch(self, dataset: Any, batch: Sequence[int], shard: Sequence[int | None]) -> Microbatch:
        # A filler repeats some pair of the step at weight 0, so that every rank runs equal shapes.
        real = torch.tensor([index is not None for index in shard])
        indices = [batch[0] if index is None else index for index in shard]
        microbatch = Microbatch.from_dict(self.collate([dataset[index] for index in indices]))
        return replace(microbatch, weights_B=microbatch.weights_B * real)


def default_collator(config: DPOConfig, tokenizer: Any) -> PreferenceCollator:
    """The collator whose label masks `config` needs; pads with the tokenizer's padding token, or 0 without one."""
    pad_token_id = getattr(tokenizer, "pad_token_id", None)
    mask: NllMask | None = None
    if config.ld_alpha is not None:
        mask = "shared"
    elif config.needs_nll_mask:
        mask = "prompt_and_response"
    return PreferenceCollator(pad_token_id=0 if pad_token_id is None else pad_token_id, nll_mask=mask)
