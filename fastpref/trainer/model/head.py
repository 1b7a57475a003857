"""The language-model head that returns sequence log-probs and never makes logits.

Design decisions:
- The output layer stays the module that Megatron built, in its place: only its class changes. Hooks of DDP and of the
  distributed optimizer, tied weights and state-dict names keep working.
- Scoring is asked for by one attribute, `request`, set while the model runs (`answering`); without it the layer is the
  stock vocabulary projection.
- Where Megatron's DDP keeps an fp32 gradient of the weight, the op adds to it in place: no gradient of the size of the
  vocabulary is ever made, and none is rounded to 16 bits.

Dims: S sequences, L positions, H hidden, T = L*S tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor

from fastpref.errors import ConfigError
from fastpref.kernels import linear_logps, plan_name, screen_weight, sum_weight
from fastpref.run.config.arguments import TrainingArguments
from fastpref.trainer.model.chunks import unwrap, vocab_size_of
from fastpref.trainer.model.context_parallel import sum_over_context_ranks
from fastpref.trainer.model.request import PassRequest
from fastpref.trainer.model.weight_forms import WeightForms
from fastpref.trainer.ranks.platform import current_device
from fastpref.trainer.ranks.timing import DeviceTimer

ACTIVITY_STATS = ("active_fraction", "cold_mass")
# What `read_activity` makes of them.
ACTIVITY = ("active_fraction", "active_imbalance", "cold_mass", "active_fallbacks")


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """How the heads of a model score."""

    forward: str = "exact"
    """Forward plan of `linear_logps`."""
    backward: str = "auto"
    """Backward plan of `linear_logps`."""
    active_eps: float | None = None
    """Tolerance of both; None takes the default."""
    overlaps_grad_reduce: bool = False
    """DDP waits for a gradient of every parameter during the backward pass."""

    @classmethod
    def of(cls, args: TrainingArguments) -> HeadOptions:
        """How the policy of a run scores."""
        return cls(
            forward=args.head_forward,
            backward=args.head_backward,
            active_eps=args.active_eps,
            overlaps_grad_reduce=args.overlap_grad_reduce,
        )

    @property
    def of_reference(self) -> HeadOptions:
        """How the reference in memory scores beside such a policy: by the same forward pass, so to the same bits."""
        return HeadOptions(forward=self.forward, active_eps=self.active_eps if self.forward == "screened" else None)


class ActivityMeter:
    """Adds up what the active plan reports, on the device, until somebody reads it."""

    def __init__(self) -> None:
        self._sum_4: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, object]) -> ActivityMeter:
        """The meter of a copied model: it has seen nothing."""
        return ActivityMeter()

    def add(self, active_fraction: Tensor, cold_mass: Tensor) -> None:
        """Adds one forward pass; a fraction of 1 is one that left nothing out."""
        is_whole = (active_fraction == 1.0).double()
        seen_4 = torch.stack([active_fraction, cold_mass, is_whole, torch.ones_like(cold_mass)])
        self._sum_4 = seen_4 if self._sum_4 is None else self._sum_4 + seen_4

    def read(self) -> list[float]:
        """Returns the sums of fractions and cold masses, the whole passes and all, and starts again at 0."""
        total_4, self._sum_4 = self._sum_4, None
        return [0.0] * 4 if total_4 is None else total_4.tolist()


class LogpsHead(ColumnParallelLinear):
    """A vocabulary projection that answers a `PassRequest` with per-sequence sums instead of logits."""

    request: PassRequest | None
    options: HeadOptions
    vocab_size: int
    timer: DeviceTimer
    activity: ActivityMeter
    forms: WeightForms

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Scores the requested rows.

        Args:
            input_: hidden states [L, S, H], or this rank's [L/P, S, H] under sequence parallelism.
            weight: the tied embedding shard; None uses the layer's own.
            runtime_gather_output: only for the stock projection, when nothing is requested.

        Returns:
            (scores [S, K] fp32, None) with the request's `columns`; or the stock layer's (logits, bias) when `request`
            is None.
        """
        request = self.request
        if request is None:
            return super().forward(input_, weight, runtime_gather_output)
        if request.is_reference:
            return sum_over_context_ranks(self._score(input_, weight, request, self.options.of_reference)), None
        with self.timer:
            scores_SK = self._score(input_, weight, request, self.options)
        if scores_SK.requires_grad and input_.requires_grad:
            scores_SK.register_hook(lambda _: self.timer.start())
            input_.register_hook(lambda _: self.timer.stop())
        return sum_over_context_ranks(scores_SK), None

    def _score(self, input_: Tensor, weight: Tensor | None, request: PassRequest, options: HeadOptions) -> Tensor:
        """The columns [S, K] of this rank's rows."""
        asked = request.head
        assert asked is not None, "a head is asked for rows"
        weight_VH = given_VH = self.weight if weight is None else weight
        main_grad_VH = _main_grad(weight_VH)
        if main_grad_VH is not None and options.overlaps_grad_reduce:
            weight_VH = _AddedToMainGrad.apply(weight_VH)
        is_active = plan_name(options.backward, weight_VH.dtype, options.forward) == "active"
        vocab_start = self.tp_group.rank() * self.output_size_per_partition
        # Rows that only pad the vocabulary to a multiple of the tensor-parallel size must not enter the softmax.
        num_real = min(max(self.vocab_size - vocab_start, 0), self.output_size_per_partition)
        if num_real < self.output_size_per_partition:
            weight_VH = weight_VH[:num_real]
        bias = None if self.bias is None else self.bias[:num_real]
        operands = [operand for operand in (input_, weight_VH, bias) if operand is not None]
        has_gradient = torch.is_grad_enabled() and any(operand.requires_grad for operand in operands)
        leaves_out = is_active and has_gradient
        is_screened = options.forward == "screened"
        scores = linear_logps(
            input_.flatten(0, 1),
            weight_VH,
            asked.labels_T,
            rows=asked.rows_R,
            cu_rows=asked.cu_rows,
            nll_labels=asked.nll_labels_T,
            bias=bias,
            tp_group=self.tp_group if self.tp_group.size() > 1 else None,
            vocab_start=min(vocab_start, self.vocab_size) if self.tp_group.size() > 1 else None,
            sequence_parallel=self.sequence_parallel,
            main_grad=None if main_grad_VH is None else main_grad_VH[:num_real],
            weight_sum=self.forms.get(sum_weight, given_VH, num_real) if leaves_out else None,
            screened=self.forms.get(screen_weight, given_VH, num_real) if is_screened else None,
            forward=options.forward,
            backward=options.backward,
            active_eps=options.active_eps,
            stats=request.token_stats + (ACTIVITY_STATS if leaves_out else ()),
        )
        if scores.active_fraction is not None and scores.cold_mass is not None:
            self.activity.add(scores.active_fraction, scores.cold_mass)
        return torch.stack([getattr(scores, name).float() for name in request.columns], dim=1)


def _main_grad(weight_VH: Tensor) -> Tensor | None:
    """Returns DDP's fp32 gradient buffer of a parameter that is about to get a gradient; None where there is none."""
    if not (torch.is_grad_enabled() and weight_VH.requires_grad):
        return None
    main_grad_VH = getattr(weight_VH, "main_grad", None)
    return main_grad_VH if main_grad_VH is not None and main_grad_VH.dtype == torch.float32 else None


class _AddedToMainGrad(torch.autograd.Function):
    """Hands DDP the empty gradient that it waits for, and tells it that the real one is in `main_grad`."""

    @staticmethod
    def forward(ctx: Any, weight_VH: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.weight_VH = weight_VH
        return weight_VH.view_as(weight_VH)

    @staticmethod
    def backward(ctx: Any, d_weight_VH: Tensor | None) -> Tensor:
        assert d_weight_VH is None, "the gradient must have gone to main_grad"
        # An embedding that shares the weight brings a gradient of its own, which DDP then still has to add.
        ctx.weight_VH.grad_added_to_main_grad = not getattr(ctx.weight_VH, "zero_out_wgrad", False)
        return torch.zeros_like(ctx.weight_VH)


def head_of(model: torch.nn.Module) -> LogpsHead | None:
    """The scoring head of a model chunk; None on chunks without the last pipeline stage."""
    chunk = unwrap(model)
    return chunk.output_layer if chunk.post_process else None


def forget_forms(models: Sequence[torch.nn.Module]) -> None:
    """Lets go of what heads computed of their weights; to be called when a step is over, or has ended in an error."""
    for head in _scoring_heads(models):
        head.forms.forget()


@contextmanager
def weights_at_rest(models: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Inside, nobody writes to the weights: what heads compute of them serves every run of the schedule."""
    heads = _scoring_heads(models)
    for head in heads:
        head.forms.is_at_rest = True
    try:
        yield
    finally:
        for head in heads:
            head.forms.is_at_rest = False
            head.forms.forget()


def _scoring_heads(models: Sequence[torch.nn.Module]) -> list[LogpsHead]:
    return [head for head in map(head_of, models) if isinstance(head, LogpsHead)]


def read_activity(head: LogpsHead) -> dict[str, float]:
    """Reads a head's `ActivityMeter` on every tensor-parallel rank; the same result on each.

    Returns:
        `active_fraction` of the whole vocabulary, `active_imbalance` (largest share of a rank over the mean: hot tokens
        have low ids, so the first rank is the busiest), `cold_mass` per row and `active_fallbacks`, the share of passes
        with exact gradients because nothing could be left out; all 0.0 without an active pass.
    """
    size = head.tp_group.size()
    mine_4 = torch.tensor(head.activity.read(), dtype=torch.float64, device=current_device())
    ranks_P4 = mine_4.new_empty(size, 4)
    torch.distributed.all_gather_into_tensor(ranks_P4.view(-1), mine_4, group=head.tp_group)
    fractions_P, colds_P, whole_P, passes_P = ranks_P4.unbind(1)
    if not passes_P[0]:
        return dict.fromkeys(ACTIVITY, 0.0)
    passes = float(passes_P[0])
    values = (fractions_P.mean() / passes, fractions_P.max() / fractions_P.mean(), colds_P.sum() / passes)
    return dict(zip(ACTIVITY, (*map(float, values), float(whole_P.min()) / passes), strict=True))


def install_heads(models: Sequence[torch.nn.Module], options: HeadOptions) -> None:
    """Turns the output layers of `models` into scoring heads, in place.

    A chunk may carry `real_vocab_size`, the vocabulary without the rows that pad it; otherwise `vocab_size` counts.

    Raises:
        ConfigError: a chunk is no `GPTModel`, uses another output layer, multi-token prediction, or a per-token loss.
    """
    # All are looked at before one is changed.
    chunks = [unwrap(model) for model in models]
    for chunk in chunks:
        if chunk.config.mtp_num_layers:
            raise ConfigError("mtp_num_layers must be unset: preference losses do not train multi-token prediction")
        if chunk.config.calculate_per_token_loss:
            raise ConfigError(
                "calculate_per_token_loss must be False: a preference loss is a mean over pairs, not over tokens"
            )
        if chunk.post_process and type(chunk.output_layer) not in (ColumnParallelLinear, LogpsHead):
            raise ConfigError(
                f"output_layer must be Megatron's ColumnParallelLinear, got {type(chunk.output_layer).__name__}"
            )
    for chunk in (chunk for chunk in chunks if chunk.post_process):
        head = chunk.output_layer
        head.__class__ = LogpsHead
        head.request = None
        head.options = options
        head.vocab_size = vocab_size_of(chunk)
        head.timer = DeviceTimer()
        head.activity = ActivityMeter()
        head.forms = WeightForms()
