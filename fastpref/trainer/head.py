"""The language-model head that returns sequence log-probs and never makes logits.

Design decisions:
- The output layer stays the module that Megatron built, in its place: only its class changes. Hooks of DDP and of the
  distributed optimizer, tied weights and state-dict names keep working.
- Scoring is asked for by one attribute, `request`, set right before the model runs; without it the layer is the stock
  vocabulary projection.

Dims: S sequences, L positions, H hidden, T = L*S tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor

from fastpref.errors import ConfigError
from fastpref.kernels import linear_logps
from fastpref.trainer.batch import HeadRequest
from fastpref.trainer.timing import DeviceTimer

TOKEN_STATS = ("entropy", "hits", "mean_logit")


class LogpsHead(ColumnParallelLinear):
    """A vocabulary projection that answers a `HeadRequest` with per-sequence sums instead of logits."""

    request: HeadRequest | None
    token_stats: tuple[str, ...]
    vocab_size: int
    timer: DeviceTimer

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Scores the requested rows.

        Args:
            input_: hidden states [L, S, H], or this rank's [L/P, S, H] under sequence parallelism.
            weight: the tied embedding shard; None uses the layer's own.
            runtime_gather_output: only for the stock projection, when nothing is requested.

        Returns:
            (scores [S, K] fp32, None) with the columns logps, then nll where asked, then `token_stats`; or the stock
            layer's (logits, bias) when `request` is None.
        """
        request = self.request
        if request is None:
            return super().forward(input_, weight, runtime_gather_output)
        self.timer.start()
        weight_VH = self.weight if weight is None else weight
        vocab_start = self.tp_group.rank() * self.output_size_per_partition
        # Rows that only pad the vocabulary to a multiple of the tensor-parallel size must not enter the softmax.
        num_real = min(max(self.vocab_size - vocab_start, 0), self.output_size_per_partition)
        if num_real < self.output_size_per_partition:
            weight_VH = weight_VH[:num_real]
        bias = None if self.bias is None else self.bias[:num_real]
        scores = linear_logps(
            input_.flatten(0, 1),
            weight_VH,
            request.labels_T,
            rows=request.rows_R,
            cu_rows=request.cu_rows,
            nll_labels=request.nll_labels_T,
            bias=bias,
            tp_group=self.tp_group if self.tp_group.size() > 1 else None,
            vocab_start=min(vocab_start, self.vocab_size) if self.tp_group.size() > 1 else None,
            sequence_parallel=self.sequence_parallel,
            stats=self.token_stats,
        )
        columns = [scores.logps] if scores.nll is None else [scores.logps, scores.nll]
        columns += [getattr(scores, name).float() for name in self.token_stats]
        self.timer.stop()
        if scores.logps.requires_grad and input_.requires_grad:
            scores.logps.register_hook(lambda _: self.timer.start())
            input_.register_hook(lambda _: self.timer.stop())
        return torch.stack(columns, dim=1), None


def unwrap(model: torch.nn.Module) -> GPTModel:
    """The `GPTModel` inside Megatron's DDP and precision wrappers."""
    inner: object = model
    while not isinstance(inner, GPTModel):
        if not hasattr(inner, "module"):
            raise ConfigError(f"model chunks must be megatron.core GPTModel, got {type(inner).__name__}")
        inner = inner.module
    return inner


def head_of(model: torch.nn.Module) -> LogpsHead | None:
    """The scoring head of a model chunk; None on chunks without the last pipeline stage."""
    chunk = unwrap(model)
    return chunk.output_layer if chunk.post_process else None


def install_heads(models: Sequence[torch.nn.Module], token_stats: tuple[str, ...] = ()) -> None:
    """Turns the output layers of `models` into scoring heads, in place.

    A chunk may carry `real_vocab_size`, the vocabulary without the rows that pad it; otherwise `vocab_size` counts.

    Raises:
        ConfigError: a chunk is no `GPTModel`, uses another output layer, multi-token prediction, or a per-token loss.
    """
    for model in models:
        chunk = unwrap(model)
        if chunk.config.mtp_num_layers:
            raise ConfigError("mtp_num_layers must be unset: preference losses do not train multi-token prediction")
        if chunk.config.calculate_per_token_loss:
            raise ConfigError(
                "calculate_per_token_loss must be False: a preference loss is a mean over pairs, not over tokens"
            )
        if not chunk.post_process:
            continue
        head = chunk.output_layer
        if type(head) not in (ColumnParallelLinear, LogpsHead):
            raise ConfigError(f"output_layer must be Megatron's ColumnParallelLinear, got {type(head).__name__}")
        head.__class__ = LogpsHead
        head.request = None
        head.token_stats = token_stats
        head.vocab_size = getattr(chunk, "real_vocab_size", chunk.vocab_size)
        head.timer = DeviceTimer()
