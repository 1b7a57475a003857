"""`TrainingArguments`: how a run optimises, parallelises, logs and saves; names as in HF and Megatron.

A batch size counts preference pairs; a microbatch of n pairs is 2n rows. The global batch of an optimizer step is
`per_device_train_batch_size * gradient_accumulation_steps * data_parallel_size` pairs, also with packing, which then
chooses the number of microbatches and the pairs of each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from fastpref.errors import Problem
from fastpref.kernels.plan_options import DEFAULT_ACTIVE_EPS
from fastpref.run.config.layout import ParallelLayout, schedule_problems, size_problems
from fastpref.validation import Rule, validate

LR_SCHEDULES = ("constant", "linear", "cosine", "inverse-square-root")
MISSING_WRITERS = {
    "tensorboard": 'report_to "tensorboard" needs that package: pip install "fastpref[megatron]"',
    "wandb": 'report_to "wandb" needs that package: pip install wandb',
}
"""What is said where the package of a target of `report_to`, which has its name, is not installed."""
REPORT_TARGETS = tuple(MISSING_WRITERS)
CHANGEABLE = (
    *("learning_rate", "min_lr", "lr_scheduler_type", "warmup_steps", "total_steps", "weight_decay"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("head_forward", "head_backward", "active_eps", "moe_aux_loss_coeff", "loss"),
)
"""What a run may go on with changed, by request. Any other change would lose or repeat pairs (seed, batch, data), or
misread what was saved (model, adapters, number format, form of the optimizer)."""
_SCHEDULES_ELSEWHERE = {
    "constant_with_warmup": "write constant, with warmup_steps or warmup_ratio",
    **dict.fromkeys(("cosine_with_min_lr", "cosine_warmup_with_min_lr"), "write cosine, with min_lr"),
    "inverse_sqrt": "write inverse-square-root",
    "polynomial": "with power 1 it is linear",
}
_TARGETS_ELSEWHERE = {
    "none": "write [] for no writer; metrics.jsonl is always written",
    "all": "write [tensorboard, wandb]",
}
_RULES = {
    "seed": Rule(at_least=0),
    "learning_rate": Rule(at_least=0, at_most=10),
    "min_lr": Rule(at_least=0, at_most=10),
    "lr_scheduler_type": Rule(choices=LR_SCHEDULES, elsewhere=_SCHEDULES_ELSEWHERE),
    "warmup_steps": Rule(at_least=0),
    "warmup_ratio": Rule(at_least=0, below=1),
    "adam_beta1": Rule(at_least=0, below=1),
    "adam_beta2": Rule(at_least=0, below=1),
    "adam_epsilon": Rule(above=0),
    "max_steps": Rule(at_least=1, hint="leave it out for num_train_epochs"),
    "eval_steps": Rule(at_least=1, hint="leave it out to evaluate at the end only"),
    "save_steps": Rule(at_least=1, hint="leave it out to save at the end only"),
    "active_eps": Rule(above=0, below=1),
    "virtual_pipeline_model_parallel_size": Rule(at_least=2, hint="leave it out for one chunk per stage"),
    "report_to": Rule(choices=REPORT_TARGETS, elsewhere=_TARGETS_ELSEWHERE),
    "save_total_limit": Rule(at_least=2, hint="one good checkpoint has to survive a bad one"),
    "resume_allow_changes": Rule(choices=CHANGEABLE),
}


@dataclass(frozen=True, kw_only=True)
class OptimizationArguments:
    """Batch, learning rate and AdamW."""

    per_device_train_batch_size: int = 1
    """Pairs in one microbatch of one data-parallel rank."""
    per_device_eval_batch_size: int | None = None
    """Pairs in one evaluation microbatch; None takes the training value."""
    gradient_accumulation_steps: int = 1
    """Microbatches that each data-parallel rank adds up before an update."""
    packing: bool = False
    """Lay the pairs of an optimizer step end to end in rows, one row per microbatch: no padding between them."""
    prefix_sharing: bool = False
    """Compute the prompt of a packed pair once for both answers."""
    pack_length: int | None = None
    """Most positions of a packed row; None = the longest pair of the data set, so that no row is larger than it."""
    num_train_epochs: int = 1
    """Passes over the training pairs, each exact; used when `max_steps` is None."""
    max_steps: int | None = None
    """Optimizer steps to run; overrides `num_train_epochs`."""
    drop_last: bool = False
    """Drop an epoch's last partial batch instead of training on it."""
    shuffle: bool = True
    """Shuffle every epoch with a permutation of (seed, epoch)."""
    seed: int = 42
    """Seed of initial weights, dropout streams and data order."""
    learning_rate: float = 1e-6
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the schedule."""
    lr_scheduler_type: str = "cosine"
    """Decay after the warm-up: constant, linear, cosine or inverse-square-root (Megatron's schedules)."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0; the first update of a warm-up runs at learning rate 0."""
    warmup_ratio: float | None = None
    """Warm-up as a fraction of all steps (rounded up); excludes `warmup_steps`."""
    weight_decay: float = 0.0
    """Decoupled decay; biases and norm weights are exempt."""
    adam_beta1: float = 0.9
    """Decay of AdamW's first moment."""
    adam_beta2: float = 0.999
    """Decay of AdamW's second moment."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: float = 1.0
    """Global L2 norm to clip gradients to; 0 only measures the norm."""
    log_num_zeros_in_grad: bool = False
    """Count exact zeros in the gradient at every step (one more pass over it)."""
    moe_aux_loss_coeff: float | None = None
    """Weight of the load-balancing loss of experts, summed over layers; None takes the model's router_aux_loss_coef."""


@dataclass(frozen=True, kw_only=True)
class PrecisionArguments:
    """Number formats and memory."""

    bf16: bool = False
    """Parameters and activations in bfloat16 with fp32 master weights."""
    fp16: bool = False
    """Parameters and activations in float16 with fp32 master weights and dynamic loss scaling."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute activations in the backward pass: whole layers, or the attention core only."""
    transformer_impl: Literal["transformer_engine", "local"] | None = None
    """Whose layers compute: Transformer Engine's, or Megatron's own; None = the former where it runs (on a GPU)."""
    head_forward: Literal["exact", "screened"] = "exact"
    """Which logits the head multiplies exactly (`linear_logps`): all, or the active ones, which 8 bits tell from the
    others; of policy, evaluation and a reference in memory. Precomputed scores are exact. Screened log-probs depend in
    their last bits on the microbatch."""
    head_backward: Literal["auto", "active", "exact", "recompute", "cached"] = "auto"
    """How the head's backward pass goes about the vocabulary (`linear_logps`): auto = active in 16 bits and with a
    screened forward pass, else exact."""
    active_eps: float | None = None
    """Probability per row that an active backward pass may leave out, and a screened forward pass in 8 bits; None =
    2**-8."""


@dataclass(frozen=True, kw_only=True)
class ParallelArguments:
    """Layout of the ranks; data parallelism takes what is left of the world size."""

    tensor_model_parallel_size: int = 1
    """Ranks that share every layer's matrices and the vocabulary."""
    pipeline_model_parallel_size: int = 1
    """Stages that the layers are cut into."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Model chunks on each stage, at least 2 (interleaved schedule: a shorter pipeline bubble); None for one."""
    expert_model_parallel_size: int = 1
    """Ranks that share out every layer's experts, taken from all ranks of a stage; with 1, tensor parallelism does."""
    context_parallel_size: int = 1
    """Ranks that share every row along its length, for rows too long for one of them."""
    pipeline_balance: Literal["even", "head_cost"] = "even"
    """How the layers are cut into stages: equally many, or fewer on the last, which also computes the vocabulary."""
    sequence_parallel: bool = False
    """Split norms and dropout along the sequence over the tensor-parallel ranks."""
    use_distributed_optimizer: bool = False
    """Shard optimizer state over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""
    overlap_param_gather: bool = False
    """Gather updated weights while the next forward pass already runs; needs the two settings above."""
    distributed_timeout_seconds: int = 600
    """How long a collective may take before the run fails."""


@dataclass(frozen=True, kw_only=True)
class LoopArguments:
    """Logging, evaluation, saving and guards."""

    output_dir: str = "runs/fastpref"
    """Directory of everything that the run writes."""
    logging_steps: int = 10
    """Steps in one window of averaged metrics."""
    report_to: tuple[str, ...] = ("tensorboard",)
    """Writers beside `metrics.jsonl`: tensorboard, wandb."""
    eval_steps: int | None = None
    """Steps between evaluations; None evaluates only at the end."""
    eval_on_start: bool = False
    """Also evaluate before the first step."""
    save_steps: int | None = None
    """Steps between checkpoints; None saves only at the end."""
    async_save: bool = False
    """Go on training while a checkpoint is written; needs host memory for a copy of the rank's part of it."""
    save_on_end: bool = True
    """Save a checkpoint after the last step."""
    save_total_limit: int | None = None
    """Checkpoints to keep, at least 2; None keeps all."""
    resume_from_checkpoint: str | None = None
    """Checkpoint directory to continue from; "latest" of `output_dir`, or "latest-valid", the newest undamaged one."""
    resume_allow_changes: tuple[str, ...] = ()
    """Settings in `CHANGEABLE` that may differ from those of the run that is continued; its length is total_steps."""
    check_initial_loss: bool = True
    """Where policy and reference start equal: require the loss that the formula gives at zero margin on step 1."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """At a NaN or an infinity in loss or gradient: end the run, or leave the step out, at most 3 in a row."""
    log_token_stats: bool = False
    """Also log entropy, mean_token_accuracy and mean logits of the policy."""
    disable_progress: bool = False
    """No progress bar on rank 0, nor its lines for each phase and, where stderr is no terminal, for each log."""


@dataclass(frozen=True, kw_only=True)
class TrainingArguments(OptimizationArguments, PrecisionArguments, ParallelArguments, LoopArguments):
    """All settings of a training run that are neither model, data nor loss.

    Raises:
        ConfigError: at construction, listing every value that cannot work.
    """

    def __post_init__(self) -> None:
        validate(self, _RULES, TrainingArguments._combination_problems)

    def _combination_problems(self) -> Iterator[Problem]:
        if self.bf16 and self.fp16:
            yield Problem("bf16", "and fp16 exclude each other; set one of them", ("fp16",))
        yield from self._head_problems()
        if self.min_lr > self.learning_rate:
            text = f"({self.min_lr}) must not exceed learning_rate ({self.learning_rate})"
            yield Problem("min_lr", text, ("learning_rate",))
        if self.warmup_ratio is not None and self.warmup_steps:
            yield Problem("warmup_ratio", "and warmup_steps exclude each other; set one of them", ("warmup_steps",))
        yield from self._packing_problems()
        yield from self._saving_problems()
        yield from size_problems(self.layout)
        yield from schedule_problems(self.layout, self.gradient_accumulation_steps)
        if self.pipeline_balance == "head_cost" and self.pipeline_model_parallel_size == 1:
            text = "head_cost needs pipeline_model_parallel_size >= 2, got 1; leave it out"
            yield Problem("pipeline_balance", text, ("pipeline_model_parallel_size",))
        if self.overlap_param_gather and not (self.use_distributed_optimizer and self.overlap_grad_reduce):
            text = "needs use_distributed_optimizer and overlap_grad_reduce; set both or leave it out"
            yield Problem("overlap_param_gather", text, ("use_distributed_optimizer", "overlap_grad_reduce"))

    def _head_problems(self) -> Iterator[Problem]:
        is_screened, is_16_bit = self.head_forward == "screened", self.bf16 or self.fp16
        is_active = self.head_backward == "active" or (self.head_backward == "auto" and (is_16_bit or is_screened))
        if is_screened and not is_active:
            yield Problem(
                "head_forward",
                "screened has the exact logits of active columns only, got head_backward "
                f"{self.head_backward!r}, which looks at all of them; set head_backward to active or auto, or "
                "head_forward to exact",
                ("head_backward",),
            )
        elif self.active_eps is not None and not is_active:
            yield Problem(
                "active_eps",
                f"({self.active_eps}) is used by an active backward pass only, got head_backward "
                f"{self.head_backward!r}; set head_backward to active, or leave active_eps out",
                ("head_backward", "head_forward", "bf16", "fp16"),
            )

    def _packing_problems(self) -> Iterator[Problem]:
        for name in ("prefix_sharing", "pack_length"):
            value = getattr(self, name)
            if value and not self.packing:
                text = f"({value}) is used by packed rows only; set packing to true or leave it out"
                yield Problem(name, text, ("packing",))
        if self.packing and self.per_device_eval_batch_size is not None:
            yield Problem(
                "per_device_eval_batch_size",
                "and packing exclude each other: a packed evaluation takes as many pairs at a time as an optimizer "
                "step; leave one out",
                ("packing",),
            )

    def _saving_problems(self) -> Iterator[Problem]:
        if self.async_save and self.save_steps is None:
            text = "is used by saves between steps only, got save_steps None; set save_steps or leave it out"
            yield Problem("async_save", text, ("save_steps",))
        if self.resume_allow_changes and self.resume_from_checkpoint is None:
            yield Problem(
                "resume_allow_changes",
                f"({', '.join(self.resume_allow_changes)}) is for a run that goes on; set resume_from_checkpoint, or "
                "leave it out",
                ("resume_from_checkpoint",),
            )

    @property
    def layout(self) -> ParallelLayout:
        """The parallel sizes."""
        return ParallelLayout(
            tp=self.tensor_model_parallel_size,
            pp=self.pipeline_model_parallel_size,
            vpp=self.virtual_pipeline_model_parallel_size,
            cp=self.context_parallel_size,
            ep=self.expert_model_parallel_size,
            sequence_parallel=self.sequence_parallel,
        )

    @property
    def params_dtype(self) -> torch.dtype:
        """Number format of parameters and activations."""
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else torch.float32

    @property
    def screened_eps(self) -> float:
        """Probability per row that a screened forward pass leaves in 8 bits; 0.0 where the pass is exact."""
        if self.head_forward == "exact":
            return 0.0
        return DEFAULT_ACTIVE_EPS if self.active_eps is None else self.active_eps

    @property
    def checkpoint_root(self) -> Path:
        """Directory that holds the run's `step-N` checkpoints."""
        return Path(self.output_dir) / "checkpoints"

    @property
    def eval_batch_pairs(self) -> int:
        """Pairs in one evaluation microbatch."""
        return self.per_device_eval_batch_size or self.per_device_train_batch_size

    def warmup_steps_of(self, total_steps: int) -> int:
        """Steps of warm-up in a run of `total_steps` optimizer steps."""
        return self.warmup_steps if self.warmup_ratio is None else math.ceil(self.warmup_ratio * total_steps)
