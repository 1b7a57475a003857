"""The peers of the registry, each called through its own function with its defaults.

Dims: see `workloads`.
"""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.registry import Implementation, sum_rows
from bench.workloads import BETA, IGNORE, Case


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


def _liger_orpo(case: Case, hidden_SLH: Tensor, weight_VH: Tensor) -> Tensor:
    """Liger's ORPO loss; it returns mean log-probs."""
    from liger_kernel.chunked_loss import LigerFusedLinearORPOLoss

    loss, (chosen_B, rejected_B, *_) = LigerFusedLinearORPOLoss(beta=BETA)(weight_VH, hidden_SLH, case.labels_SL)
    loss.backward()
    return torch.cat([chosen_B, rejected_B]).detach() * case.cu_rows.diff()


def _liger_ce(case: Case, hidden_SLH: Tensor, weight_VH: Tensor) -> Tensor:
    """Liger's fused cross entropy on the labelled positions, gradients made in its forward pass."""
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()(weight_VH, hidden_SLH.flatten(0, 1)[case.rows_R], case.row_labels_R)
    loss.backward()
    return -loss.detach().reshape(1) * case.rows_R.numel()


def _quack(case: Case, hidden_SLH: Tensor, weight_VH: Tensor) -> Tensor:
    """Chunked cross entropy of quack, likewise."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    rows_RH = hidden_SLH.flatten(0, 1)[case.rows_R]
    loss = chunked_linear_cross_entropy(rows_RH, weight_VH, case.row_labels_R, reduction="mean")
    loss.backward()
    return -loss.detach().reshape(1) * case.rows_R.numel()


def _cce(case: Case, hidden_SLH: Tensor, weight_VH: Tensor) -> Tensor:
    """Apple's function drops the ignored positions itself."""
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if hidden_SLH.is_cuda else "torch_compile"
    losses_SL = linear_cross_entropy(hidden_SLH, weight_VH, case.labels_SL, reduction="none", impl=impl)
    return -losses_SL.sum(1)


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
    return sum_rows(case, logps_R)


def _verl(case: Case, hidden_SLH: Tensor, weight_VH: Tensor) -> Tensor:
    """The kernel of verl on the labelled positions; its releases order the arguments differently."""
    from verl.utils.kernel.linear_cross_entropy import LinearCrossEntropy

    rows_RH = hidden_SLH.flatten(0, 1)[case.rows_R]
    given = {"hidden": rows_RH, "weight": weight_VH, "labels": case.row_labels_R, "reduction": "none"}
    given |= {"temperature": 1.0, "dist_process_group": None}
    names = list(inspect.signature(LinearCrossEntropy.forward).parameters)[1:]
    logps_R, _ = LinearCrossEntropy.apply(*(given[name] for name in names))
    return sum_rows(case, logps_R)


def _megatron(is_fused: bool, case: Case, hidden_SLH: Tensor, weight_VH: Tensor) -> Tensor:
    """Megatron's cross entropy over logits of every position, as its stock head makes them, on any number of ranks."""
    from megatron.core import parallel_state
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
    from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, vocab_parallel_cross_entropy

    from fastpref.trainer import TrainingArguments, initialize_megatron

    if not parallel_state.model_parallel_is_initialized():
        initialize_megatron(TrainingArguments(report_to=()))  # one rank
    logits_LSV = F.linear(copy_to_tensor_model_parallel_region(hidden_SLH.transpose(0, 1)), weight_VH)
    labels_LS = case.labels_SL.t().contiguous()
    targets_LS = labels_LS.clamp(min=0)
    if is_fused:
        group = parallel_state.get_tensor_model_parallel_group()
        losses_LS = fused_vocab_parallel_cross_entropy(logits_LSV, targets_LS, group)
    else:
        losses_LS = vocab_parallel_cross_entropy(logits_LSV, targets_LS)
    return -torch.where(labels_LS != IGNORE, losses_LS.float(), 0.0).sum(0)


def _megatron_plain(case: Case, hidden_SLH: Tensor, weight_VH: Tensor) -> Tensor:
    return _megatron(False, case, hidden_SLH, weight_VH)


def _megatron_fused(case: Case, hidden_SLH: Tensor, weight_VH: Tensor) -> Tensor:
    return _megatron(True, case, hidden_SLH, weight_VH)


_LIGER_INSTALL = "pip install --no-deps liger-kernel triton"
_CCE_INSTALL = "pip install --no-deps cut-cross-entropy triton"
_MEGATRON_INSTALL = 'pip install "fastpref[megatron]"'

PEERS = {
    "liger": Implementation(
        title="Liger fused linear DPO",
        run=_liger,
        module="liger_kernel",
        install=_LIGER_INSTALL,
        is_compiled=True,
        time_target=13,
        memory_target=3,
    ),
    "cce": Implementation(
        title="Apple CCE, torch_compile",
        logps=_cce,
        devices=("cpu",),
        module="cut_cross_entropy",
        install=_CCE_INSTALL,
        is_compiled=True,
        time_target=2.4,
        memory_target=2,
    ),
    "trl": Implementation(
        title="TRL chunked log-probs, response rows",
        logps=_trl,
        module="trl",
        install='pip install "fastpref[trl]"',
        time_target=8,
        memory_target=1.6,
    ),
    "cce-kernel": Implementation(
        title="Apple CCE",
        logps=_cce,
        devices=("cuda",),
        module="cut_cross_entropy",
        install=_CCE_INSTALL,
        is_compiled=True,
    ),
    "liger-ce": Implementation(
        title="Liger fused linear cross entropy",
        run=_liger_ce,
        loss="mean-nll",
        devices=("cuda",),
        module="liger_kernel",
        install=_LIGER_INSTALL,
        is_compiled=True,
    ),
    "liger-orpo": Implementation(
        title="Liger fused linear ORPO",
        run=_liger_orpo,
        loss="orpo",
        devices=("cuda",),
        module="liger_kernel",
        install=_LIGER_INSTALL,
        is_compiled=True,
    ),
    "verl": Implementation(
        title="verl linear cross entropy",
        logps=_verl,
        devices=("cuda",),
        module="verl.utils.kernel",
        install="pip install --no-deps verl, and what its import asks for",
        is_compiled=True,
    ),
    "megatron": Implementation(
        title="Megatron vocab-parallel cross entropy, all positions",
        logps=_megatron_plain,
        devices=("cuda",),
        module="megatron.core",
        install=_MEGATRON_INSTALL,
    ),
    "megatron-fused": Implementation(
        title="Megatron fused vocab-parallel cross entropy, all positions",
        logps=_megatron_fused,
        devices=("cuda",),
        module="megatron.core",
        install=_MEGATRON_INSTALL,
        is_compiled=True,
    ),
    "quack": Implementation(
        title="quack chunked linear cross entropy",
        run=_quack,
        loss="mean-nll",
        devices=("cuda",),
        module="quack",
        install="pip install quack-kernels",
        is_compiled=True,
    ),
}
