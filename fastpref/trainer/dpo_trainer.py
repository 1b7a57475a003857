"""`DPOTrainer`: preference training of Megatron-Core models, with the seed system's entry points."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from fastpref.checkpoint.reference_cache import ReferenceCache
from fastpref.errors import ConfigError, DataError, NonFiniteError
from fastpref.losses import DPOConfig, PairLogps, preference_loss
from fastpref.run.config.arguments import TrainingArguments
from fastpref.run.config.run_config import check_combination
from fastpref.trainer import loop
from fastpref.trainer.model.chunks import unwrap, vocab_size_of
from fastpref.trainer.model.head import TOKEN_STATS, HeadOptions, install_heads
from fastpref.trainer.model.lora import lora_of
from fastpref.trainer.model.modes import evaluating
from fastpref.trainer.model.moe import install_routers
from fastpref.trainer.model.packing import install_packing
from fastpref.trainer.ranks.platform import initialize_megatron
from fastpref.trainer.reference.first_step import check_first_step
from fastpref.trainer.reference.reference import build_reference
from fastpref.trainer.step import guard
from fastpref.trainer.step.batch import Microbatch
from fastpref.trainer.step.feed import PairFeed
from fastpref.trainer.step.metrics import metric_names
from fastpref.trainer.step.optimizer import (
    build_optimizer,
    build_scheduler,
    check_model,
    checked_warmup,
    wrap_for_training,
)
from fastpref.trainer.step.schedule import NO_SIGNALS, PreferenceSchedule, Signals, StepResult

if TYPE_CHECKING:
    from fastpref.run.config.run_config import RunConfig


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
        processing_class: tokenizer that is saved with an exported model and names the padding token.

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
        data_collator: Callable[[list], Mapping[str, Tensor]] | None = None,
        processing_class: Any = None,
    ) -> None:
        if not model:
            raise ConfigError("model must be this rank's list of GPTModel chunks; DPOTrainer.from_config builds one")
        self.args = args or TrainingArguments()
        self.train_config = train_config or DPOConfig()
        self.processing_class = processing_class
        initialize_megatron(self.args)
        check_combination(self.args, self.train_config)
        self.model = [unwrap(chunk) for chunk in model]
        check_model(self.model, self.args)
        # What may refuse the settings comes before what changes the models.
        self.feed = PairFeed(self.args, self.train_config, train_dataset, eval_dataset, data_collator, processing_class)
        datasets = {"training pairs": train_dataset, "evaluation pairs": eval_dataset}
        datasets = {name: dataset for name, dataset in datasets.items() if dataset is not None}
        self.reference = build_reference(self.model, ref_model, self.train_config, self.args, datasets)
        lora = lora_of(self.model)
        starts_at_base = lora is None or lora.config.path is None
        self.starts_at_reference = (self.reference is not None and starts_at_base) and (
            ref_model.starts_at_policy if isinstance(ref_model, ReferenceCache) else ref_model is None
        )
        token_stats = TOKEN_STATS if self.args.log_token_stats else ()
        options = HeadOptions(
            token_stats=token_stats,
            backward=self.args.head_backward,
            active_eps=self.args.active_eps,
            overlaps_grad_reduce=self.args.overlap_grad_reduce,
        )
        install_heads(self.model, options)
        if self.args.packing:
            install_packing(self.model, prefix_sharing=self.args.prefix_sharing)
        self.balance = install_routers(self.model)
        self.models_wrapped = wrap_for_training(model, self.args)
        self.schedule = PreferenceSchedule(self.train_config)
        self.metrics_keys = list(metric_names(self.train_config, bool(token_stats)))
        self.vocab_size = vocab_size_of(self.model[0])
        self.settings: str | None = None
        self._optimizer: MegatronOptimizer | None = None
        self._lr_scheduler: OptimizerParamScheduler | None = None
        self.log_history: list[dict[str, float]] = []
        self._skips_in_a_row = 0

    @classmethod
    def from_config(cls, config: RunConfig) -> DPOTrainer:
        """Builds models, reference, tokenizer and data of a run file; see `RunConfig`."""
        from fastpref.trainer.build import build_trainer

        return build_trainer(config)

    @property
    def ref_models(self) -> list[torch.nn.Module] | None:
        """Chunks of the reference; None where the loss reads none or its scores are precomputed."""
        return None if self.reference is None else self.reference.models

    def train(self) -> loop.TrainResult:
        """Runs (or resumes) the training loop; see `fastpref.trainer.loop.train`."""
        return loop.train(self)

    def evaluate(self, eval_dataset: Any = None) -> dict[str, float]:
        """Means of every metric over all pairs of the evaluation set, with the prefix `eval_`."""
        return loop.evaluate(self, eval_dataset)

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        """Builds the optimizer and its schedule for a run of `num_training_steps` updates."""
        checked_warmup(self.args, num_training_steps)
        optimizer = build_optimizer(self.models_wrapped, self.args)
        # Both or neither: what is kept is taken for made.
        self._optimizer, self._lr_scheduler = optimizer, build_scheduler(optimizer, self.args, num_training_steps)

    @property
    def optimizer(self) -> MegatronOptimizer:
        """Megatron's optimizer; made for the whole run of the training set when nobody made it before."""
        if self._optimizer is None:
            self.create_optimizer_and_scheduler(self.feed.schedule.total_steps)
        assert self._optimizer is not None
        return self._optimizer

    @property
    def lr_scheduler(self) -> OptimizerParamScheduler:
        """Megatron's learning-rate schedule, made together with the optimizer."""
        assert self.optimizer is self._optimizer and self._lr_scheduler is not None
        return self._lr_scheduler

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
            batches.append(Microbatch.from_dict(batch, self.vocab_size).padded_to(seq_length))
        step = self.run_step(models, batches)
        metrics = [
            {name: total / weight for name, (total, weight) in result.metrics.items()} for result in step.results
        ]
        loss = torch.tensor(step.loss, dtype=torch.float32, device="cpu")
        return loss, metrics, step.skipped_iter, step.grad_norm, step.num_zeros_in_grad

    def attach_reference(self, batches: Sequence[Microbatch], dataset: Any) -> list[Microbatch]:
        """Returns microbatches of `dataset` with the log-probs of the reference, where the loss reads one."""
        return list(batches) if self.reference is None else self.reference.attach(batches, dataset)

    def run_step(
        self,
        models: Sequence[DistributedDataParallel],
        batches: Sequence[Microbatch],
        step: int | None = None,
        signals: Signals = NO_SIGNALS,
    ) -> StepResult:
        """Reference, forward, backward, guard, update.

        Args:
            models: the wrapped chunks, `models_wrapped`.
            batches: this rank's microbatches.
            step: number of the step, from 1, for messages and records.
            signals: what this rank has to tell; every rank's result says what any of them told.

        Raises:
            NonFiniteError: a loss or gradient is not finite on any rank, and `on_nonfinite` is stop, or three steps
                have been skipped just before; nothing was updated.
            FastprefError: policy and reference should be equal before the first update, and are not; likewise.
        """
        optimizer = self.optimizer
        batches = self.attach_reference(batches, self.feed.train_dataset)
        for model in models:
            model.train()
            model.zero_grad_buffer()
        optimizer.zero_grad()
        results = self.schedule.forward_backward(models, batches)
        verdict = guard.check_step(models, batches, results, scaled=self.args.fp16, signals=signals)
        learning_rate = max(group["lr"] for group in optimizer.param_groups)
        if verdict.findings:
            self._refuse_or_skip(verdict, step)
            return StepResult(
                batches=batches,
                results=(),
                loss=verdict.loss,
                skipped_iter=1,
                grad_norm=None,
                num_zeros_in_grad=None,
                learning_rate=learning_rate,
                signals=verdict.signals,
            )
        self._skips_in_a_row = 0
        if step == 1 and self.starts_at_reference and self.args.check_initial_loss:
            assert self.reference is not None
            check_first_step(verdict.loss, results, self.reference, self.train_config, self.model[0].config)
        updated, grad_norm, num_zeros = optimizer.step()
        if updated:
            self.starts_at_reference = False
            self.lr_scheduler.step(1)
            self.schedule.update_running_mean(results)
        return StepResult(
            batches=batches,
            results=results,
            loss=verdict.loss,
            skipped_iter=int(not updated),
            grad_norm=grad_norm,
            num_zeros_in_grad=num_zeros,
            learning_rate=learning_rate,
            signals=verdict.signals,
        )

    def _refuse_or_skip(self, verdict: guard.Verdict, step: int | None) -> None:
        """Records what is not finite, and raises unless this step may be skipped."""
        if step is not None and self.is_main_process:
            directory = Path(self.args.output_dir) / "nonfinite"
            guard.write_findings(directory, verdict, step, self.feed.train_dataset)
        self._skips_in_a_row += 1
        if self.args.on_nonfinite == "stop" or self._skips_in_a_row > guard.MAX_SKIPS:
            raise NonFiniteError(verdict.describe(step))

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
        batches = [Microbatch.from_dict(batch, self.vocab_size).padded_to(seq_length) for batch in data_list]
        for index, batch in enumerate(batches):
            if batch.num_pairs != micro_batch_size:
                raise DataError(
                    f"data_list[{index}] has {batch.num_pairs} pairs, micro_batch_size is {micro_batch_size}"
                )
        with torch.no_grad(), evaluating(models):
            scores = self.schedule.score(models, batches)
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
        return loop.begin_save(self, step, copies=False).finish()

    @property
    def is_main_process(self) -> bool:
        """Whether this rank prints and writes."""
        return torch.distributed.get_rank() == 0
