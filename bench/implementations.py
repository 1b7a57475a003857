"""The registry of what is measured: forward and backward of the sigmoid DPO loss from hidden states and head.

Every implementation gets the same padded hidden states [S, L, H], the whole weight [V, H] and fixed reference
log-probs, and leaves gradients of both shapes. Peers are called through their own functions with their defaults.

Dims: see `workloads`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.oracle import HeadResult
from bench.workloads import BETA, IGNORE, Case

BARE = "bare-product"
BARE_COLUMNS = 2048
"""Columns at a time of the bare product: the fastest of 1k ... 64k, R=1650, H=640, on two EPYC cores (L3 32 MiB)."""

Run = Callable[[Case, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """One way to compute the head."""

    title: str
    run: Run
    """(case, hidden, weight) -> logps [S]; leaves `.grad` on hidden [S, L, H] and weight [V, H], which come without."""
    is_ours: bool = False
    is_exact: bool = False
    """Gated by the numeric rule with naive PyTorch as yardstick; else by relative errors."""
    module: str | None = None
    """What must be installed."""
    install: str = ""
    """How."""
    is_compiled: bool = False
    """Whether the first pass compiles, so that peak memory is that of a later pass."""
    beside: tuple[str, ...] = ()
    """Others to time in the same turns."""
    time_target: float | None = None
    """What its time over ours should at least be."""
    memory_target: float | None = None
    """What its peak memory over ours should at least be."""

    @property
    def is_installed(self) -> bool:
        """Whether the peer can be imported."""
        return self.module is None or importlib.util.find_spec(self.module) is not None


def dpo_loss(logps_S: Tensor, ref_logps_S: Tensor) -> Tensor:
    """Sigmoid DPO, mean over pairs."""
    chosen_B, rejected_B = (logps_S - ref_logps_S).chunk(2)
    return -F.logsigmoid(BETA * (chosen_B - rejected_B)).mean()


def call(implementation: Implementation, case: Case, hidden_SLH: Tensor, weight_VH: Tensor) -> HeadResult:
    """One pass; `weight_VH` may be reused afterwards, its gradient is taken off."""
    hidden_SLH = hidden_SLH.detach().requires_grad_()
    weight_VH.requires_grad_()
    logps_S = implementation.run(case, hidden_SLH, weight_VH)
    d_hidden_SLH, d_weight_VH = hidden_SLH.grad, weight_VH.grad
    assert d_hidden_SLH is not None and d_weight_VH is not None
    weight_VH.grad = None
    return HeadResult(logps_S.detach(), d_hidden_SLH, d_weight_VH)


def bare_product(case: Case, hidden_SLH: Tensor, weight_VH: Tensor) -> None:
    """X W^T over the response rows, a few columns at a time into one buffer: 2 RHV operations and nothing else."""
    x_RH = hidden_SLH.detach().flatten(0, 1)[case.rows_R]
    tile_RV = torch.empty(x_RH.shape[0], BARE_COLUMNS)
    for weight in weight_VH.detach().split(BARE_COLUMNS):
        torch.mm(x_RH, weight.t(), out=tile_RV[:, : weight.shape[0]])


def _backward(case: Case, logps_S: Tensor) -> Tensor:
    dpo_loss(logps_S, case.ref_logps_S).backward()
    return logps_S


def _sum_rows(case: Case, logps_R: Tensor) -> Tensor:
    return torch.zeros(case.labels_SL.shape[0]).index_add(0, case.row_sequences_R, logps_R)


def _naive_rows(case: Case, hidden_SLH: Tensor, weight_VH: Tensor) -> Tensor:
    logits_RV = hidden_SLH.flatten(0, 1)[case.rows_R] @ weight_VH.t()
    logps_R = torch.log_softmax(logits_RV, dim=1).gather(1, case.row_labels_R[:, None]).squeeze(1)
    del logits_RV
    return _backward(case, _sum_rows(case, logps_R))


def _naive_pairs(case: Case, hidden_SLH: Tensor, weight_VH: Tensor) -> Tensor:
    """Trainers with one pair a microbatch: every position of both sides, padded to the longer one."""
    logps_S = torch.empty(case.labels_SL.shape[0])
    for pair, length in enumerate(case.pair_lengths):
        sides = [pair, pair + case.num_pairs]
        labels_2L = case.labels_SL[sides, :length]
        logits_2LV = hidden_SLH[sides, :length] @ weight_VH.t()
        logps_2LV = torch.log_softmax(logits_2LV, dim=-1)
        picked_2L = logps_2LV.gather(2, labels_2L.clamp(min=0)[..., None]).squeeze(2)
        pair_logps = torch.where(labels_2L != IGNORE, picked_2L, 0.0).sum(1)
        (dpo_loss(pair_logps, case.ref_logps_S[sides]) / case.num_pairs).backward()
        logps_S[sides] = pair_logps.detach()
        # Python would keep this pair's logits alive while the next pair's are made.
        del logits_2LV, logps_2LV, picked_2L
    return logps_S


def _liger(case: Case, hidden_SLH: Tensor, weight_VH: Tensor) -> Tensor:
    """Liger's DPO function; its public form runs the reference model too, or has none, so constants are put in."""
    from liger_kernel.chunked_loss.dpo_loss import LigerFusedLinearDPOFunction as Function

    chosen_B, rejected_B = case.ref_logps_S.chunk(2)
    pending = list(zip(chosen_B.split(1), rejected_B.split(1), strict=True))  # Liger's default chunk is one pair

    class FixedReference(Function):
        @staticmethod
        def preference_loss_fn(chosen_logps: Tensor, rejected_logps: Tensor, full_target: Tensor, **options):
            reference = pending.pop(0)
            return Function.preference_loss_fn(chosen_logps, rejected_logps, full_target, *reference, **options)

    no_bias = no_ref_input = no_ref_weight = no_ref_bias = None
    compute_nll, is_compiled, use_ref_model, average, chunk_size = False, True, False, False, 1
    loss, (chosen_logps, rejected_logps, *_) = FixedReference.apply(
        *(hidden_SLH, weight_VH, case.labels_SL, no_bias, no_ref_input, no_ref_weight, no_ref_bias),
        *(IGNORE, BETA, compute_nll, is_compiled, use_ref_model, average, chunk_size),
    )
    loss.backward()
    return torch.cat([chosen_logps, rejected_logps])


def _cce(case: Case, hidden_SLH: Tensor, weight_VH: Tensor) -> Tensor:
    """Apple's function drops the ignored positions itself."""
    from cut_cross_entropy import linear_cross_entropy

    losses_SL = linear_cross_entropy(hidden_SLH, weight_VH, case.labels_SL, reduction="none", impl="torch_compile")
    return _backward(case, -losses_SL.sum(1))


def _trl(case: Case, hidden_SLH: Tensor, weight_VH: Tensor) -> Tensor:
    """TRL's function on the labelled positions, as its fused head calls it with Triton; without, it takes all."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    rows_RH = hidden_SLH.flatten(0, 1)[case.rows_R]
    temperature, softcap, logit_scale = 1.0, None, 1.0
    logps_R, *_ = ChunkedLogProbFunction.apply(
        *(rows_RH, weight_VH, None, case.row_labels_R, temperature),
        *(_CHUNKED_LOGPROB_CHUNK_SIZE, softcap, logit_scale, ("log_probs",)),
    )
    return _backward(case, _sum_rows(case, logps_R))


def _ours(backward: str, case: Case, hidden_SLH: Tensor, weight_VH: Tensor) -> Tensor:
    from fastpref import linear_logps

    scores = linear_logps(
        hidden_SLH, weight_VH, case.labels_SL, rows=case.rows_R, cu_rows=case.cu_rows, backward=backward
    )
    return _backward(case, scores.logps)


IMPLEMENTATIONS = {
    "ours-active": Implementation(title="fastpref, active", run=partial(_ours, "active"), is_ours=True),
    "ours-cached": Implementation(title="fastpref, cached", run=partial(_ours, "cached"), is_ours=True),
    "ours-exact": Implementation(
        title="fastpref, exact", run=partial(_ours, "exact"), is_ours=True, is_exact=True, beside=("naive-rows",)
    ),
    "naive-rows": Implementation(title="naive torch, response rows", run=_naive_rows, time_target=4.5, memory_target=5),
    "naive-pairs": Implementation(
        title="naive torch, pair by pair, all positions", run=_naive_pairs, time_target=12, memory_target=3
    ),
    "liger": Implementation(
        title="Liger fused linear DPO",
        run=_liger,
        module="liger_kernel",
        install="pip install --no-deps liger-kernel triton",
        is_compiled=True,
        time_target=13,
        memory_target=3,
    ),
    "cce": Implementation(
        title="Apple CCE, torch_compile",
        run=_cce,
        module="cut_cross_entropy",
        install="pip install --no-deps cut-cross-entropy triton",
        is_compiled=True,
        time_target=2.4,
        memory_target=2,
    ),
    "trl": Implementation(
        title="TRL chunked log-probs, response rows",
        run=_trl,
        module="trl",
        install='pip install "fastpref[trl]"',
        time_target=8,
        memory_target=1.6,
    ),
}
"""By name. The first of ours that this build has is what the others are compared with."""
