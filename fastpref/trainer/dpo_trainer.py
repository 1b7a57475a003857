"""`DPOTrainer`: preference training of Megatron-Core models, with the seed system's entry points."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from fastpref.checkpoint.reference_cache import ReferenceCache
from fastpref.errors import ConfigError, DataError, raise_if_any
from fastpref.losses import DPOConfig, PairLogps, preference_loss
from fastpref.run.config.arguments import TrainingArguments
from fastpref.run.config.run_config import RunConfig, batch_problems
from fastpref.run.config.run_file import dump_run_config
from fastpref.run.plan.announce import announce
from fastpref.trainer import build, loop
from fastpref.trainer.engine import Engine
from fastpref.trainer.model.chunks import unwrap
from fastpref.trainer.model.modes import evaluating
from fastpref.trainer.model.overlap import settle_overlap
from fastpref.trainer.model.shards import mark_shards
from fastpref.trainer.ranks.meeting import meet
from fastpref.trainer.ranks.platform import initialize_megatron
from fastpref.trainer.saves import state
from fastpref.trainer.session import Session
from fastpref.trainer.step.batch import Microbatch
from fastpref.trainer.step.feed import PairFeed
from fastpref.trainer.step.optimizer import check_model


class EvaluatedCheckpoint(NamedTuple):
    """Where the weights of an evaluation come from."""

    path: Path
    """The checkpoint's directory."""
    step: int
    """Optimizer steps done when it was saved."""


class DPOTrainer:
    """Trains Megatron-Core `GPTModel` chunks on preference pairs.

    Args:
        model: this rank's chunks of the policy (one, or one per virtual pipeline stage); Megatron's parallel state must
            exist (`initialize_megatron(args)`), as it must to build them. They are wrapped in Megatron's DDP.
        train_config: the preference loss; default DPO at beta 0.1.
        ref_model: chunks of the reference, or a `ReferenceCache` of its scores for both data sets; None takes it from
            the policy where the loss reads a reference: a copy as it is now, or, where `add_lora` gave it adapters, the
            policy itself with adapters off.
        args: all other settings.
        train_dataset: indexable pairs for `data_collator`: `fastpref.data.TokenizedPair` or anything it takes.
        eval_dataset: the same, for `evaluate`.
        data_collator: list of items -> batch as in `Microbatch.from_dict`; default `PreferenceCollator`; with
            packing it must be a `PackedCollator`, the default then.
        processing_class: tokenizer that names the padding token.

    Raises:
        ConfigError: settings, models and loss do not fit each other.
    """

    def __init__(
        self,
        model: Sequence[torch.nn.Module] | None = None,
        train_config: DPOConfig | None = None,
        ref_model: Sequence[torch.nn.Module] | ReferenceCache | None = None,
        args: TrainingArguments | None = None,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        data_collator: Callable[[list[Any]], Mapping[str, Tensor]] | None = None,
        processing_class: Any = None,
    ) -> None:
        if not model:
            raise ConfigError("model must be this rank's list of GPTModel chunks; DPOTrainer.from_config builds one")
        args, train_config = args or TrainingArguments(), train_config or DPOConfig()
        self.processing_class = processing_class
        initialize_megatron(args)
        raise_if_any(batch_problems(args, train_config))
        chunks = [unwrap(chunk) for chunk in model]
        check_model(chunks, args)
        settle_overlap(chunks)
        mark_shards(chunks)
        # What may refuse the settings comes before what changes the models.
        self.feed = PairFeed(args, train_config, train_dataset, eval_dataset, data_collator, processing_class)
        self.engine = Engine(model, ref_model, train_config, args, self.feed)
        self.log_history: list[dict[str, float]] = []
        self.settings: str | None = None
        self.evaluated_checkpoint: EvaluatedCheckpoint | None = None

    @classmethod
    def from_config(cls, config: RunConfig) -> Self:
        """Builds models, reference, tokenizer and data of a run file; see `RunConfig`.

        `train` then writes the settings to `config.yaml` in the output directory.

        Raises:
            FastprefError: see `fastpref.trainer.build.trainer_parts`.
        """
        trainer = cls(**build.trainer_parts(config))
        trainer.settings = dump_run_config(config)
        return trainer

    @classmethod
    def for_evaluation(cls, config: RunConfig) -> Self:
        """Builds a trainer for `evaluate` alone, with the weights of `training.resume_from_checkpoint` where it is set.

        The reference of a checkpoint is that of its run: `reference.path`, else the weights that the run started from.

        Raises:
            CheckpointError: the checkpoint is unusable.
            FastprefError: see `fastpref.trainer.build.trainer_parts`.
        """
        trainer = cls(**build.trainer_parts(config, for_training=False))
        wanted = config.training.resume_from_checkpoint
        if wanted is not None:
            path = state.choose(config.training.checkpoint_root, wanted)
            announce(config.training, f"Reading the weights of {path}")
            saved = state.load_weights(path, trainer.model)
            meet(what=f"reading the weights of {path}")
            trainer.engine.schedule.restore(saved)
            trainer.evaluated_checkpoint = EvaluatedCheckpoint(path, saved["step"])
        return trainer

    @property
    def args(self) -> TrainingArguments:
        """All settings but the loss's."""
        return self.engine.args

    @property
    def train_config(self) -> DPOConfig:
        """The preference loss."""
        return self.engine.loss

    @property
    def model(self) -> list[GPTModel]:
        """Chunks of the policy, bare."""
        return self.engine.models

    @property
    def models_wrapped(self) -> list[DistributedDataParallel]:
        """Chunks of the policy in Megatron's DDP."""
        return self.engine.wrapped

    @property
    def ref_models(self) -> list[torch.nn.Module] | None:
        """Chunks of the reference; None where the loss reads none or its scores are precomputed."""
        return None if self.engine.reference is None else self.engine.reference.models

    @property
    def metrics_keys(self) -> list[str]:
        """Names of the metrics of a microbatch."""
        return list(self.engine.metric_names)

    @property
    def optimizer(self) -> MegatronOptimizer:
        """Megatron's optimizer; made for the whole run of the training set when nobody made it before."""
        self._require_optimizer()
        return self.engine.optimizer

    @property
    def lr_scheduler(self) -> OptimizerParamScheduler:
        """Megatron's learning-rate schedule, made together with the optimizer."""
        self._require_optimizer()
        return self.engine.lr_scheduler

    def train(self) -> loop.TrainResult:
        """Runs (or resumes) the training loop; see `fastpref.trainer.loop.train`.

        The first Ctrl-C ends it after the step at hand, with a checkpoint and `was_preempted` in the result.
        """
        return loop.train(self.engine, self.create_optimizer_and_scheduler, self.log_history, self.settings)

    def evaluate(self, eval_dataset: Any = None) -> dict[str, float]:
        """Means of every metric over all pairs of the evaluation set, with the prefix `eval_`."""
        return loop.evaluate(self.engine, eval_dataset)

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        """Builds the optimizer and its schedule for a run of `num_training_steps` updates."""
        self.engine.create_optimizer(num_training_steps)

    def training_step(
        self, models: Sequence[DistributedDataParallel], data_iterator: Iterator[Mapping[str, Tensor]], seq_length: int
    ) -> tuple[Tensor, list[dict[str, Tensor]], int, float | None, int | None]:
        """One optimizer step over `gradient_accumulation_steps` microbatches.

        Args:
            models: the wrapped chunks, `models_wrapped`.
            data_iterator: yields batches as in `Microbatch.from_dict`.
            seq_length: positions to pad every microbatch to.

        Returns:
            (loss, metrics_tensors, skipped_iter, grad_norm, num_zeros_in_grad): the pair mean of the loss over all
            ranks (scalar); one dict of scalar means per microbatch on the last pipeline stage, an empty list elsewhere;
            1 if the optimizer refused the step; the gradient norm before clipping; zeros in the gradient when counted.

        Raises:
            NonFiniteError: a loss or gradient is NaN or infinite on any rank; nothing was updated.
            DataError: a batch breaks the rules, or the iterator ends early.
        """
        batches = []
        for index in range(self.args.gradient_accumulation_steps):
            batch = next(data_iterator, None)
            if batch is None:
                raise DataError(
                    f"data_iterator ended after {index} microbatches; a step takes "
                    f"gradient_accumulation_steps={self.args.gradient_accumulation_steps}"
                )
            batches.append(Microbatch.from_dict(batch, self.engine.vocab_size).padded_to(seq_length))
        self._require_optimizer()
        step = self.engine.run_step(models, batches)
        metrics = [
            {name: total / weight for name, (total, weight) in result.metrics.items()} for result in step.results
        ]
        loss = torch.tensor(step.loss, dtype=torch.float32, device="cpu")
        return loss, metrics, step.skipped_iter, step.grad_norm, step.num_zeros_in_grad

    def compute_reference_log_probs(
        self,
        models: Sequence[torch.nn.Module],
        data_list: Sequence[Mapping[str, Tensor]],
        seq_length: int,
        micro_batch_size: int,
    ) -> list[dict[str, Tensor]] | None:
        """Response log-prob sums of `data_list` under `models`, without gradients.

        Args:
            models: chunks with scoring heads, usually `ref_models`.
            data_list: batches as in `Microbatch.from_dict`.
            seq_length: positions to pad every batch to.
            micro_batch_size: pairs in each batch.

        Returns:
            One `{"chosen_logps", "rejected_logps"}` of fp32 [n] per batch on the last pipeline stage; None elsewhere.
        """
        batches = [Microbatch.from_dict(batch, self.engine.vocab_size).padded_to(seq_length) for batch in data_list]
        for index, batch in enumerate(batches):
            if batch.num_pairs != micro_batch_size:
                raise DataError(
                    f"data_list[{index}] has {batch.num_pairs} pairs, micro_batch_size is {micro_batch_size}"
                )
        with torch.no_grad(), evaluating(models):
            scores = self.engine.schedule.score(models, batches)
        results = []
        for score in scores:
            if score is None:
                return None
            chosen, rejected = score.chunk(2)
            results.append({"chosen_logps": chosen, "rejected_logps": rejected})
        return results

    def dpo_loss(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """DPO loss of response sums.

        Equals: `-(1 - ls) logsigmoid(beta d) - ls logsigmoid(-beta d)`, d the difference of the log-ratios.

        Args:
            policy_chosen_logps: [n] sums under the policy.
            policy_rejected_logps: [n] likewise.
            reference_chosen_logps: [n] sums under the reference.
            reference_rejected_logps: [n] likewise.

        Returns:
            (losses, chosen_rewards, rejected_rewards), each [n]; the rewards carry no gradient.
        """
        config = DPOConfig(beta=self.train_config.beta, label_smoothing=self.train_config.label_smoothing)
        ones = torch.ones_like(policy_chosen_logps)
        logps = PairLogps(
            chosen=policy_chosen_logps,
            rejected=policy_rejected_logps,
            chosen_counts=ones,
            rejected_counts=ones,
            ref_chosen=reference_chosen_logps,
            ref_rejected=reference_rejected_logps,
        )
        output = preference_loss(config, logps)
        return output.losses, output.chosen_rewards, output.rejected_rewards

    def odds_ratio_loss(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        chosen_counts: Tensor | None = None,
        rejected_counts: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """ORPO loss: NLL of the chosen response plus beta times the odds-ratio term.

        Args:
            policy_chosen_logps: [n] sums with `chosen_counts`, else per-token means.
            policy_rejected_logps: [n] likewise.
            chosen_counts: [n] response tokens, or None.
            rejected_counts: [n] response tokens, or None.

        Returns:
            (losses, chosen_rewards, rejected_rewards), each [n]; the rewards carry no gradient.
        """
        ones = torch.ones_like(policy_chosen_logps)
        logps = PairLogps(
            chosen=policy_chosen_logps,
            rejected=policy_rejected_logps,
            chosen_counts=ones if chosen_counts is None else chosen_counts,
            rejected_counts=ones if rejected_counts is None else rejected_counts,
        )
        output = preference_loss(DPOConfig(beta=self.train_config.beta, pref_loss="orpo"), logps)
        return output.losses, output.chosen_rewards, output.rejected_rewards

    def save_checkpoint(self, step: int) -> Path:
        """Saves everything that `resume_from_checkpoint` needs, under `output_dir/checkpoints`; returns its directory.

        Older checkpoints go as `save_total_limit` says.
        """
        self._require_optimizer()
        return Session(self.engine).begin_save(step, copies=False).finish()

    def _require_optimizer(self) -> None:
        """Has the optimizer made by this class's own `create_optimizer_and_scheduler`, where nobody made it before."""
        if not self.engine.has_optimizer:
            self.create_optimizer_and_scheduler(self.feed.schedule.total_steps)

    @property
    def is_main_process(self) -> bool:
        """Whether this rank prints and writes."""
        return torch.distributed.get_rank() == 0
