"""The policy with its reference and its optimizer, and one optimizer step of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from fastpref.checkpoint.reference_cache import ReferenceCache
from fastpref.errors import NonFiniteError
from fastpref.losses import DPOConfig
from fastpref.run.config.arguments import TrainingArguments
from fastpref.run.plan.announce import announce
from fastpref.trainer.model.chunks import unwrap, vocab_size_of
from fastpref.trainer.model.head import HeadOptions, install_heads
from fastpref.trainer.model.lora import lora_of
from fastpref.trainer.model.moe import install_routers, provisional_bias
from fastpref.trainer.model.packing import install_packing
from fastpref.trainer.reference.first_step import check_first_step
from fastpref.trainer.reference.reference import build_reference
from fastpref.trainer.step import guard
from fastpref.trainer.step.batch import Microbatch
from fastpref.trainer.step.feed import PairFeed
from fastpref.trainer.step.metrics import metric_names
from fastpref.trainer.step.optimizer import (
    build_optimizer,
    build_scheduler,
    checked_warmup,
    learning_rate,
    update,
    wrap_for_training,
)
from fastpref.trainer.step.schedule import NO_SIGNALS, TOKEN_STATS, PreferenceSchedule, Signals, StepResult


class Engine:
    """Everything that an optimizer step works on.

    Args:
        models: this rank's chunks of the policy; heads, packing and routers are installed in them, and Megatron's DDP
            wraps them.
        ref_model: chunks of the reference, its cached scores, or None to take it from the policy.
        loss: the preference loss.
        args: all other settings.
        feed: the run's pairs.

    Attributes:
        models: the chunks, bare.
        wrapped: the chunks in DDP.
        reference: where reference log-probs come from; None where the loss reads none.
        starts_at_reference: policy and reference are still one model.
        schedule: runs microbatches, and holds the loss's running mean.
        balance: what the routers measure; None without a load-balancing loss.
        metric_names: metrics of a microbatch.
        vocab_size: of the model, without padding.

    Raises:
        ConfigError: the reference or the chunks do not fit the settings.
        CheckpointError: cached scores are damaged, or not those of these data sets.
    """

    def __init__(
        self,
        models: Sequence[torch.nn.Module],
        ref_model: Sequence[torch.nn.Module] | ReferenceCache | None,
        loss: DPOConfig,
        args: TrainingArguments,
        feed: PairFeed,
    ) -> None:
        self.args, self.loss, self.feed = args, loss, feed
        self.models = [unwrap(model) for model in models]
        self.reference = build_reference(self.models, ref_model, loss, args, feed.datasets)
        lora = lora_of(self.models)
        starts_at_base = lora is None or lora.config.path is None
        self.starts_at_reference = (self.reference is not None and starts_at_base) and (
            ref_model.starts_at_policy if isinstance(ref_model, ReferenceCache) else ref_model is None
        )
        install_heads(self.models, HeadOptions.of(args))
        if args.head_forward == "screened":
            announce(
                args,
                "The head screens the vocabulary in 8 bits: the last bits of a pair's log-probs depend on what else is "
                "in its microbatch, up to about 1e-3 nat a token; with training.head_forward: exact they do not",
            )
        if args.packing:
            install_packing(self.models, prefix_sharing=args.prefix_sharing)
        self.balance = install_routers(self.models, is_reference=lora is not None)
        self.wrapped = wrap_for_training(models, args)
        token_stats = TOKEN_STATS if args.log_token_stats else ()
        self.schedule = PreferenceSchedule(loss, token_stats)
        self.metric_names = metric_names(loss, token_stats)
        self.vocab_size = vocab_size_of(self.models[0])
        self._optimizer: MegatronOptimizer | None = None
        self._lr_scheduler: OptimizerParamScheduler | None = None
        self._skips_in_a_row = 0

    def create_optimizer(self, num_steps: int) -> None:
        """Builds the optimizer and its learning-rate schedule for a run of `num_steps` updates."""
        checked_warmup(self.args, num_steps)
        optimizer = build_optimizer(self.wrapped, self.args)
        # Both or neither: what is kept is taken for made.
        self._optimizer, self._lr_scheduler = optimizer, build_scheduler(optimizer, self.args, num_steps)

    @property
    def has_optimizer(self) -> bool:
        """Whether `create_optimizer` was called."""
        return self._optimizer is not None

    @property
    def optimizer(self) -> MegatronOptimizer:
        """Megatron's optimizer; made for the whole run of the training set when nobody made it before."""
        if self._optimizer is None:
            self.create_optimizer(self.feed.schedule.total_steps)
        assert self._optimizer is not None
        return self._optimizer

    @property
    def lr_scheduler(self) -> OptimizerParamScheduler:
        """Megatron's learning-rate schedule, made together with the optimizer."""
        if self._lr_scheduler is None:
            self.create_optimizer(self.feed.schedule.total_steps)
        assert self._lr_scheduler is not None
        return self._lr_scheduler

    def attach_reference(self, batches: Sequence[Microbatch], dataset: Any) -> list[Microbatch]:
        """Returns microbatches of `dataset` with the log-probs of the reference, where the loss reads one."""
        return list(batches) if self.reference is None else self.reference.attach(batches, dataset)

    def seed_dropout(self, step: int) -> None:
        """Makes a step's dropout a function of (seed, step), as the data order is; free where nothing is dropped."""
        config, lora = self.models[0].config, lora_of(self.models)
        if config.hidden_dropout or config.attention_dropout or (lora is not None and lora.config.lora_dropout):
            rank = parallel_state.get_data_parallel_rank(with_context_parallel=True)
            seed = self.args.seed + 1_000_003 * (step + 1) + 101 * rank
            # stages hold other layers, which must not draw the same masks
            seed += 10_000_019 * parallel_state.get_pipeline_model_parallel_rank()
            torch.manual_seed(seed)
            tensor_parallel.model_parallel_cuda_manual_seed(seed)

    def run_step(
        self,
        models: Sequence[DistributedDataParallel],
        batches: Sequence[Microbatch],
        step: int | None = None,
        signals: Signals = NO_SIGNALS,
    ) -> StepResult:
        """Reference, forward, backward, guard, update.

        Args:
            models: the chunks in DDP, `wrapped`.
            batches: this rank's microbatches of training pairs.
            step: number of the step, from 1, for messages and records.
            signals: what this rank has to tell; every rank's result says what any of them told.

        Raises:
            NonFiniteError: a loss or gradient is not finite on any rank, and `on_nonfinite` is stop, or three steps
                have been skipped just before; nothing was updated.
            FastprefError: policy and reference should be equal before the first update, and are not; likewise.
        """
        with provisional_bias(self.models) as keep_bias:
            outcome = self._run_step(models, batches, step, signals)
            if not outcome.skipped_iter:
                keep_bias()
        return outcome

    def _run_step(
        self,
        models: Sequence[DistributedDataParallel],
        batches: Sequence[Microbatch],
        step: int | None,
        signals: Signals,
    ) -> StepResult:
        optimizer = self.optimizer
        batches = self.attach_reference(batches, self.feed.train_dataset)
        for model in models:
            model.train()
            model.zero_grad_buffer()
        optimizer.zero_grad()
        results = self.schedule.forward_backward(models, batches)
        verdict = guard.check_step(models, batches, results, scaled=self.args.fp16, signals=signals)
        outcome = StepResult(
            batches=batches,
            loss=verdict.loss,
            learning_rate=learning_rate(optimizer),
            signals=verdict.signals,
        )
        if verdict.findings:
            self._refuse_or_skip(verdict, step)
            return outcome
        self._skips_in_a_row = 0
        if step == 1 and self.starts_at_reference and self.args.check_initial_loss:
            assert self.reference is not None
            config, screened_eps = self.models[0].config, self.args.screened_eps
            check_first_step(verdict.loss, results, self.reference, self.loss, config, screened_eps)
        answer = update(optimizer)
        if answer.done:
            self.starts_at_reference = False
            self.lr_scheduler.step(1)
            self.schedule.update_running_mean(results)
        return replace(
            outcome,
            results=results,
            skipped_iter=int(not answer.done),
            grad_norm=answer.grad_norm,
            num_zeros_in_grad=answer.num_zeros,
        )

    def _refuse_or_skip(self, verdict: guard.Verdict, step: int | None) -> None:
        """Records what is not finite, and raises unless this step may be skipped."""
        if step is not None and torch.distributed.get_rank() == 0:
            directory = Path(self.args.output_dir) / "nonfinite"
            guard.write_findings(directory, verdict, step, self.feed.train_dataset)
        self._skips_in_a_row += 1
        if self.args.on_nonfinite == "stop" or self._skips_in_a_row > guard.MAX_SKIPS:
            raise NonFiniteError(verdict.describe(step))
