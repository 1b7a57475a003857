"""How each peer is called: through the fastest way that its own documentation names, on what every one of them gets.

What is said of a library was read in the code of the version named. `bench.peers` says what each needs, and by which
autograd function a pass is recognised as the one that is meant.

Dims: see `workloads`.
"""

from __future__ import annotations

import functools
import inspect
import os

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from bench.registry import sum_rows
from bench.workloads import BETA, IGNORE, Case

TORCH_CHUNK_ROWS = {"cpu": 256, "cuda": 2048}
"""`batch_chunk_size` of `torch.nn.functional.linear_cross_entropy`: its own choice ("aspect_ratio:2") is 2 rows on
Gemma's head and 128 on Llama-3.1-8B's, and each chunk reads the weight and adds to all of its gradient."""


def liger_dpo(case: Case, hidden_SLH: Tensor, weight_VH: Tensor) -> Tensor:
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


def liger_orpo(case: Case, hidden_SLH: Tensor, weight_VH: Tensor) -> Tensor:
    """Liger's ORPO loss; it returns mean log-probs."""
    from liger_kernel.chunked_loss import LigerFusedLinearORPOLoss

    loss, (chosen_B, rejected_B, *_) = LigerFusedLinearORPOLoss(beta=BETA)(weight_VH, hidden_SLH, case.labels_SL)
    loss.backward()
    return torch.cat([chosen_B, rejected_B]).detach() * case.cu_rows.diff()


def liger_ce(case: Case, hidden_SLH: Tensor, weight_VH: Tensor) -> Tensor:
    """Liger 0.8.5's default fused cross entropy: Triton, the same on every device."""
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight_VH, _rows(case, hidden_SLH), case.row_labels_R)


def liger_ce_sm90(case: Case, hidden_SLH: Tensor, weight_VH: Tensor) -> Tensor:
    """Liger 0.8.5's fused cross entropy in CuTe: `liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90`.

    The head of that module says what it takes (bf16, R a multiple of 128, V of 256) and names its times on an H200.
    Nothing dispatches to it: it must be called by this name.
    """
    from liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90 import liger_fused_linear_cross_entropy_sm90

    return liger_fused_linear_cross_entropy_sm90(_rows(case, hidden_SLH), weight_VH, case.row_labels_R)


def liger_ce_scaled(case: Case, hidden_SLH: Tensor, weight_VH: Tensor) -> Tensor:
    """Liger 0.8.5's per-token cross entropy, with a free gradient to each token: `LigerFusedLinearScaledCrossEntropy`.

    On compute capability 9.0 it dispatches to CuTe kernels, elsewhere to chunks of 512 rows in PyTorch
    (`liger_kernel.ops.fused_linear_scaled_cross_entropy._resolve_implementation`). The variable leaves out a check of
    the targets that waits for the device (head of `liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90`).
    """
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    os.environ["LIGER_SCALED_CE_SM90_VALIDATE_TARGETS"] = "0"
    nll_R = LigerFusedLinearScaledCrossEntropyFunction.apply(_rows(case, hidden_SLH), weight_VH, case.row_labels_R)
    return sum_rows(case, -nll_R)


def liger_ce_tp(case: Case, hidden_SLH: Tensor, weight_VH: Tensor) -> Tensor:
    """Liger 0.8.5's tensor-parallel form, `liger_fused_linear_scaled_cross_entropy_tp`, over CUTLASS and NVSHMEM.

    `liger_kernel.ops.configure` prepares the native kernels once, and must say that it did; without them the function
    takes chunks of 512 rows in PyTorch. This rank's part of the weight is `weight_VH`, labels are those of all.
    """
    from liger_kernel.transformers.functional import liger_fused_linear_scaled_cross_entropy_tp

    rows_RH, group = _rows(case, hidden_SLH), _tensor_parallel_group(case)
    _configure_liger_tp(group, *rows_RH.shape, weight_VH.shape[0])
    nll_R = liger_fused_linear_scaled_cross_entropy_tp(rows_RH, weight_VH, case.row_labels_R, group)
    return sum_rows(case, -nll_R)


@functools.cache
def _configure_liger_tp(group: ProcessGroup, rows: int, hidden: int, local_vocab: int) -> None:
    from liger_kernel.ops.configure import FusedLinearCrossEntropyConfig, configure

    sizes = FusedLinearCrossEntropyConfig(
        max_tokens=rows, hidden_size=hidden, local_vocab_size=local_vocab, group="tensor"
    )
    if not configure(process_groups={"tensor": group}, bootstrap_group=group, device="cuda", flsce=sizes):
        raise RuntimeError("liger-cute-kernels did not set itself up on this device; its warning says why")


def quack_ce(case: Case, hidden_SLH: Tensor, weight_VH: Tensor) -> Tensor:
    """Quack 0.6.5's `chunked_linear_cross_entropy`, gradients made in its forward pass.

    Its docstring has a faster pipeline for compute capability 9.0 in bf16 (`use_scaled_exp`), which it takes by itself
    where it may; asked for by name it fails where it may not, instead of falling back.
    """
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    is_hopper = torch.cuda.get_device_capability(hidden_SLH.device)[0] == 9
    rows_RH, use_scaled_exp = _rows(case, hidden_SLH), True if is_hopper else None
    return chunked_linear_cross_entropy(
        rows_RH, weight_VH, case.row_labels_R, reduction="mean", use_scaled_exp=use_scaled_exp
    )


def cce(case: Case, hidden_SLH: Tensor, weight_VH: Tensor) -> Tensor:
    """Apple's CCE 25.1.1, `cut_cross_entropy.linear_cross_entropy`; it drops the ignored positions itself.

    It has two implementations: "cce", its own kernels, for GPUs, and "torch_compile". `filter_eps` "high", its default,
    leaves small gradients out and is its fastest.
    """
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if hidden_SLH.is_cuda else "torch_compile"
    losses_SL = linear_cross_entropy(hidden_SLH, weight_VH, case.labels_SL, reduction="none", impl=impl)
    return -losses_SL.sum(1)


def torch_lce(case: Case, hidden_SLH: Tensor, weight_VH: Tensor) -> Tensor:
    """PyTorch 2.13's `torch.nn.functional.linear_cross_entropy` in chunks, as `LinearCrossEntropyOptions` documents.

    Without options it makes all logits, as `naive-rows` does. `reduction="none"` takes a free gradient to each row and
    makes the logits once more in the backward pass; the other reductions make their gradients in the forward pass,
    with one weight for all rows, which DPO has not.
    """
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=TORCH_CHUNK_ROWS[hidden_SLH.device.type])
    nll_R = F.linear_cross_entropy(
        _rows(case, hidden_SLH), weight_VH, case.row_labels_R, reduction="none", options=options
    )
    return sum_rows(case, -nll_R)


def trl(case: Case, hidden_SLH: Tensor, weight_VH: Tensor) -> Tensor:
    """TRL's function on the labelled positions, as its fused head calls it with Triton; without, it takes all."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    temperature, softcap, logit_scale = 1.0, None, 1.0
    logps_R, *_ = ChunkedLogProbFunction.apply(
        *(_rows(case, hidden_SLH), weight_VH, None, case.row_labels_R, temperature),
        *(_CHUNKED_LOGPROB_CHUNK_SIZE, softcap, logit_scale, ("log_probs",)),
    )
    return sum_rows(case, logps_R)


def verl(case: Case, hidden_SLH: Tensor, weight_VH: Tensor) -> Tensor:
    """The kernel of verl on the labelled positions; its releases order the arguments differently."""
    from verl.utils.kernel.linear_cross_entropy import LinearCrossEntropy

    given = {"hidden": _rows(case, hidden_SLH), "weight": weight_VH, "labels": case.row_labels_R}
    given |= {"reduction": "none", "temperature": 1.0, "dist_process_group": None}
    names = list(inspect.signature(LinearCrossEntropy.forward).parameters)[1:]
    logps_R, _ = LinearCrossEntropy.apply(*(given[name] for name in names))
    return sum_rows(case, logps_R)


def megatron(is_fused: bool, case: Case, hidden_SLH: Tensor, weight_VH: Tensor) -> Tensor:
    """Megatron's cross entropy over logits of every position, as its stock head makes them, on any number of ranks.

    The fused one is what `cross_entropy_loss_fusion` with `cross_entropy_fusion_impl` "native" calls (Megatron-Core
    0.16 to 0.19).
    """
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
    from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, vocab_parallel_cross_entropy

    group = _tensor_parallel_group(case)
    logits_LSV = F.linear(copy_to_tensor_model_parallel_region(hidden_SLH.transpose(0, 1)), weight_VH)
    labels_LS = case.labels_SL.t().contiguous()
    targets_LS = labels_LS.clamp(min=0)
    if is_fused:
        losses_LS = fused_vocab_parallel_cross_entropy(logits_LSV, targets_LS, group)
    else:
        losses_LS = vocab_parallel_cross_entropy(logits_LSV, targets_LS)
    return -torch.where(labels_LS != IGNORE, losses_LS.float(), 0.0).sum(0)


def megatron_linear(case: Case, hidden_SLH: Tensor, weight_VH: Tensor) -> Tensor:
    """Megatron's head and loss in one, `megatron.core.fusions.fused_linear_cross_entropy`, on the labelled positions.

    It is on Megatron-LM's main branch and in no release up to 0.19.2, and refuses every device but capability 10.x.
    """
    from megatron.core.fusions.fused_linear_cross_entropy import linear_cross_entropy

    nll_R = linear_cross_entropy(
        _rows(case, hidden_SLH), weight_VH, case.row_labels_R, tp_group=case.tp_group, reduction="none"
    )
    return sum_rows(case, -nll_R)


def _rows(case: Case, hidden_SLH: Tensor) -> Tensor:
    """Hidden states of the response rows, [R, H]."""
    return hidden_SLH.flatten(0, 1)[case.rows_R]


def _tensor_parallel_group(case: Case) -> ProcessGroup:
    """The case's ranks; where it has none, Megatron's group, which is made of one rank where there is none yet."""
    if case.tp_group is not None:
        return case.tp_group
    from megatron.core import parallel_state

    from fastpref.trainer import TrainingArguments, initialize_megatron

    if not parallel_state.model_parallel_is_initialized():
        initialize_megatron(TrainingArguments(report_to=()))
    return parallel_state.get_tensor_model_parallel_group()
