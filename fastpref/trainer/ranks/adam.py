"""AdamW with the state layout of FusedAdam, for machines where Megatron has none of its own.

Megatron takes Transformer Engine's FusedAdam, else Apex's, else PyTorch's AdamW, whose checkpoints its distributed
optimizer cannot read back. That optimizer keeps state in FusedAdam's layout (the step count in the parameter group,
`exp_avg` and `exp_avg_sq` per parameter), so a checkpoint written here can be read beside FusedAdam and the other way
round. The arithmetic is torch's own fused kernel, on a CPU or a GPU: one pass over the memory instead of ten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from megatron.core import optimizer
from megatron.core.optimizer import distrib_optimizer
from torch.optim.adam import adam


class FusedLayoutAdam(torch.optim.Optimizer):
    """Adam or AdamW that counts steps per parameter group.

    It runs wherever `torch.optim.AdamW(fused=True)` does, on parameters of one device in each group.

    Equals: `torch.optim.AdamW(fused=True)` (`torch.optim.Adam` with L2 decay for `adam_w_mode=False`), bit for bit. The
    last bit of an element may depend on its place in its tensor, so also on how the optimizer is sharded.

    Args:
        params: parameters, or parameter groups with settings of their own.
        lr: learning rate, >= 0.
        betas: decay rates of the two moments, each in [0, 1).
        eps: term added to the root of the second moment, >= 0.
        weight_decay: decay per step, multiplied by the learning rate.
        adam_w_mode: decoupled weight decay.
        capturable: must be False; Megatron-Core 0.19 passes it on to say whether CUDA graphs are in use.

    Raises:
        ValueError: a setting is out of its range.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        if capturable:
            raise ValueError("capturable must be False without FusedAdam, got True; set optimizer_cuda_graph=False")
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0.0:
                raise ValueError(f"{name} must be >= 0, got {value}")
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas must lie in [0, 1), got {betas}")
        self.adam_w_mode = adam_w_mode
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Returns:
            What `closure` returned, None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            # As FusedAdam does: a group that is empty on this rank does not count.
            if group["params"]:
                group["step"] = group.get("step", 0) + 1
                self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            if not self.state[p]:
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        beta1, beta2 = group["betas"]
        # torch counts the step it is about to take itself, in each of these; its kernel reads them on the device.
        steps = torch.full(
            (len(params),), group["step"] - 1.0, dtype=torch.float32, device=params[0].device if params else "cpu"
        )
        adam(
            params,
            [p.grad for p in params],
            [self.state[p]["exp_avg"] for p in params],
            [self.state[p]["exp_avg_sq"] for p in params],
            [],
            list(steps.unbind()),
            foreach=False,
            fused=True,
            decoupled_weight_decay=self.adam_w_mode,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def install_fused_layout() -> None:
    """Give Megatron `FusedLayoutAdam` where it would take PyTorch's AdamW; a second call changes nothing."""
    if not optimizer.USING_PYTORCH_OPTIMIZER:
        return
    optimizer.Adam = distrib_optimizer.Adam = FusedLayoutAdam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_TE_OPTIMIZER = True
