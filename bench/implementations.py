"""The registry of what is measured: forward and backward of the head of a preference-trained model.

Every implementation gets the same padded hidden states [S, L, H], the whole weight [V, H] and fixed reference
log-probs, and leaves gradients of both shapes. The loss is sigmoid DPO but for peers that have only another one.

Dims: see `workloads`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.peers import PEERS
from bench.registry import Implementation, dpo_loss, sum_rows
from bench.workloads import IGNORE, Case

BARE = "bare-product"
BARE_COLUMNS = 2048
"""Columns at a time of the bare product: the fastest of 1k ... 64k, R=1650, H=640, on two EPYC cores (L3 32 MiB)."""


def bare_product(case: Case, hidden_SLH: Tensor, weight_VH: Tensor) -> None:
    """X W^T over the response rows, a few columns at a time into one buffer: 2 RHV operations and nothing else.

    In fp32: operands in 16 bits are widened, the weight a few columns at a time.
    """
    x_RH = hidden_SLH.detach().flatten(0, 1)[case.rows_R].float()
    tile_RV = torch.empty(x_RH.shape[0], BARE_COLUMNS, dtype=torch.float32)
    for weight in weight_VH.detach().split(BARE_COLUMNS):
        torch.mm(x_RH, weight.float().t(), out=tile_RV[:, : weight.shape[0]])


def _naive_rows(case: Case, hidden_SLH: Tensor, weight_VH: Tensor) -> Tensor:
    logits_RV = hidden_SLH.flatten(0, 1)[case.rows_R] @ weight_VH.t()
    logps_R = torch.log_softmax(logits_RV, dim=1).gather(1, case.row_labels_R[:, None]).squeeze(1)
    del logits_RV
    return sum_rows(case, logps_R)


def _naive_compiled(case: Case, hidden_SLH: Tensor, weight_VH: Tensor) -> Tensor:
    rows_RH = hidden_SLH.flatten(0, 1)[case.rows_R]
    return sum_rows(case, _compiled_logps()(rows_RH, weight_VH, case.row_labels_R))


@functools.cache
def _compiled_logps() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def logps(x_RH: Tensor, weight_VH: Tensor, labels_R: Tensor) -> Tensor:
        return torch.log_softmax(x_RH @ weight_VH.t(), dim=1).gather(1, labels_R[:, None]).squeeze(1)

    return torch.compile(logps, dynamic=False)


def _naive_pairs(case: Case, hidden_SLH: Tensor, weight_VH: Tensor) -> Tensor:
    """Trainers with one pair a microbatch: every position of both sides, padded to the longer one."""
    logps_S = torch.empty(case.labels_SL.shape[0], dtype=torch.float32, device=hidden_SLH.device)
    for pair, length in enumerate(case.pair_lengths):
        sides = [pair, pair + case.num_pairs]
        labels_2L = case.labels_SL[sides, :length]
        logits_2LV = hidden_SLH[sides, :length] @ weight_VH.t()
        logps_2LV = torch.log_softmax(logits_2LV, dim=-1)
        picked_2L = logps_2LV.gather(2, labels_2L.clamp(min=0)[..., None]).squeeze(2)
        pair_logps = torch.where(labels_2L != IGNORE, picked_2L, 0.0).float().sum(1)
        (dpo_loss(pair_logps, case.ref_logps_S[sides]) / case.num_pairs).backward()
        logps_S[sides] = pair_logps.detach()
        # Python would keep this pair's logits alive while the next pair's are made.
        del logits_2LV, logps_2LV, picked_2L
    return logps_S


def ours(case: Case, hidden_SLH: Tensor, weight_VH: Tensor, *, is_shared: bool = False, **options: Any) -> Tensor:
    """The op with the options of a plan; `is_shared`: with the int8 form of the weight that is in the case."""
    from fastpref import linear_logps

    rows, cu_rows = case.host_rows
    return linear_logps(
        hidden_SLH,
        weight_VH,
        case.labels_SL,
        rows=rows,
        cu_rows=cu_rows,
        tp_group=case.tp_group,
        screened=case.screened if is_shared else None,
        backend=case.backend,
        **options,
    ).logps


def _screen(case: Case, weight_VH: Tensor) -> Case:
    """A caller's int8 form of the weight, made once for as long as the weight stays what it is."""
    from fastpref import screen_weight

    if case.screened is not None:
        return case
    screened = replace(case, screened=screen_weight(weight_VH.detach()))
    assert screened.host_rows is not None  # made here, as those of other cases are before a clock starts
    return screened


IMPLEMENTATIONS = {
    "ours-active": Implementation(title="fastpref, active", logps=partial(ours, backward="active"), is_ours=True),
    "ours-cached": Implementation(title="fastpref, cached", logps=partial(ours, backward="cached"), is_ours=True),
    "ours-exact": Implementation(
        title="fastpref, exact",
        logps=partial(ours, backward="exact"),
        is_ours=True,
        is_exact=True,
        beside=("naive-rows",),
    ),
    "ours-screened": Implementation(
        title="fastpref, screened",
        logps=partial(ours, forward="screened", backward="active"),
        is_ours=True,
        is_screened=True,
        beside=("ours-screened-shared", "ours-exact", "naive-rows", "cce", "torch-lce"),
    ),
    "ours-screened-shared": Implementation(
        title="fastpref, screened, int8 copy shared",
        logps=partial(ours, forward="screened", backward="active", is_shared=True),
        prepare=_screen,
        is_ours=True,
        is_screened=True,
    ),
    "naive-rows": Implementation(
        title="naive torch, response rows", logps=_naive_rows, time_target=4.5, memory_target=5
    ),
    "naive-pairs": Implementation(
        title="naive torch, pair by pair, all positions", run=_naive_pairs, time_target=12, memory_target=3
    ),
    "naive-compiled": Implementation(
        title="naive torch, compiled, response rows", logps=_naive_compiled, devices=("cuda",), is_compiled=True
    ),
} | PEERS
"""By name. The first of ours that this build has is what the others are compared with."""
ALIKE_WITHOUT_GRADIENT = ("ours-active", "ours-cached")
"""Whose pass without a gradient is that of "ours-exact"."""


def names_on(device: str) -> list[str]:
    """Return the names of what is measured on "cpu" or "cuda"."""
    return [name for name, found in IMPLEMENTATIONS.items() if device in found.devices]


def scorers_on(device: str) -> list[str]:
    """Return the names of what can score without a gradient on "cpu" or "cuda", no pass twice."""
    names = [name for name in names_on(device) if IMPLEMENTATIONS[name].logps is not None]
    return [name for name in names if name not in ALIKE_WITHOUT_GRADIENT]


NAMES_OF = {"head": names_on, "score": scorers_on}
"""device -> names of what is measured, by the command that does it."""
