"""What `backward=` and the options that belong to it stand for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.kernels.checks import ACTIVITY_STATS, check_choice

FORWARD_PLANS = ("exact", "screened")
BACKWARD_PLANS = ("auto", "exact", "recompute", "active", "cached")
DEFAULT_ACTIVE_EPS = 2.0**-8
DEFAULT_DEVICE_CACHE_BYTES = 512 * 2**20


class BackwardPlan(NamedTuple):
    """What the backward pass will do, as `ops` takes it.

    Attributes:
        name: "none", "recompute", "exact", "cached" or "active".
        active_eps: probability per row that the columns left out may hold.
        cache_bytes: budget for exponentials.
    """

    name: str
    active_eps: float
    cache_bytes: int


def plan_name(backward: str, dtype: torch.dtype, forward: str = "exact") -> str:
    """Return what `backward` stands for: "auto" is "active" in 16 bits and for a screened forward, else "exact"."""
    if backward != "auto":
        return backward
    return "active" if forward == "screened" or dtype in (torch.bfloat16, torch.float16) else "exact"


def resolve_plan(
    backward: str,
    backend: str,
    hidden: Tensor,
    softcap: float | None,
    active_eps: float | None,
    cache_bytes: int | None,
    stats: Sequence[str],
    forward: str = "exact",
) -> BackwardPlan:
    """Return the plan that `backward` stands for, or say why the combination of options cannot be.

    Raises:
        TypeError: `active_eps` or `cache_bytes` is no number.
        ValueError: unknown name, a number out of range, or an option that the plan does not use.
    """
    check_choice("backward", backward, BACKWARD_PLANS)
    check_choice("forward", forward, FORWARD_PLANS)
    name = plan_name(backward, hidden.dtype, forward)
    if forward == "screened":
        _check_screened(name, backward)
    if backend == "reference":
        if backward not in ("auto", "exact") and (forward, backward) != ("screened", "active"):
            raise ValueError(
                f"backend='reference' keeps the logits and differentiates them, got backward={backward!r}; use "
                "backward='auto' or 'exact'"
            )
        name = "exact" if forward == "exact" else "active"
    if name == "cached" and (softcap is not None or hidden.dtype == torch.float64):
        raise ValueError(
            f"backward='cached' keeps bf16 exponentials, which serve neither a softcap nor fp64, got softcap={softcap} "
            f"and {hidden.dtype}; use backward='exact'"
        )
    _check_active_eps(active_eps, name, backward)
    _check_cache_bytes(cache_bytes, name, backward, backend)
    is_16_bit = hidden.dtype in (torch.bfloat16, torch.float16)
    if cache_bytes and name == "exact" and (softcap is not None or not is_16_bit):
        raise ValueError(
            f"cache_bytes is used by backward='exact' for bf16 and fp16 inputs without a softcap only, got "
            f"{cache_bytes} with {hidden.dtype} and softcap={softcap}, which it recomputes; leave it out"
        )
    for stat in stats:
        if stat in ACTIVITY_STATS and (name != "active" or backend == "reference"):
            raise ValueError(
                f"stats {stat!r} describes backward='active', got backward={backward!r} with {hidden.dtype}, which is "
                f"{name!r}; leave it out, or pass backward='active'"
            )
    if cache_bytes is None:
        cache_bytes = 2**62 if name == "cached" else DEFAULT_DEVICE_CACHE_BYTES if hidden.is_cuda else 0
    return BackwardPlan(name, DEFAULT_ACTIVE_EPS if active_eps is None else float(active_eps), cache_bytes)


def _check_screened(name: str, backward: str) -> None:
    if name != "active":
        raise ValueError(
            f"forward='screened' has the exact logits of active columns only, got backward={backward!r}, which looks "
            "at all of them; use backward='active' or 'auto'"
        )


def _check_active_eps(active_eps: float | None, name: str, backward: str) -> None:
    if active_eps is None:
        return
    if isinstance(active_eps, bool) or not isinstance(active_eps, (int, float)):
        raise TypeError(f"active_eps must be a Python number, got {type(active_eps).__name__}")
    if name != "active":
        raise ValueError(
            f"active_eps is used by backward='active' only, got {active_eps} with backward={backward!r}; leave it out"
        )
    if not 0 < active_eps < 1:
        raise ValueError(
            f"active_eps must be in (0, 1), the probability per row that may be left out, got {active_eps}; "
            "backward='exact' leaves out nothing"
        )


def _check_cache_bytes(cache_bytes: int | None, name: str, backward: str, backend: str) -> None:
    if cache_bytes is None:
        return
    if isinstance(cache_bytes, bool) or not isinstance(cache_bytes, int):
        raise TypeError(f"cache_bytes must be an int, got {cache_bytes!r}")
    if name not in ("exact", "cached") or backend == "reference":
        raise ValueError(
            f"cache_bytes is used by backward='cached' and 'exact' only, got {cache_bytes} with backward={backward!r} "
            f"and backend={backend!r}; leave it out"
        )
    if cache_bytes < 0:
        raise ValueError(f"cache_bytes must be >= 0, got {cache_bytes}; 0 keeps nothing")
