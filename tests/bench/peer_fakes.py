"""Stand-ins for peers that run on no CPU: the parameters of the real functions, over plain PyTorch.

What they say about the libraries is the names of modules, functions, autograd classes and parameters, which
`test_bench_peers` compares with the sources of those that are installed. How the real ones compute is not imitated.

Dims: see `bench.workloads`.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

LIGER = "liger_kernel.ops"
SCALED = f"{LIGER}.fused_linear_scaled_cross_entropy"
SCALED_SM90 = f"{LIGER}.cutedsl.ops.fused_scaled_cross_entropy_sm90"
SM90 = f"{LIGER}.cutedsl.ops.fused_linear_cross_entropy_sm90"
TRITON = f"{LIGER}.fused_linear_cross_entropy"
LOSS = "liger_kernel.transformers.fused_linear_cross_entropy"
FUNCTIONAL = "liger_kernel.transformers.functional"
NATIVE_TP = f"{LIGER}.cute.fused_linear_scaled_cross_entropy_tp"
CONFIGURE = f"{LIGER}.configure"
QUACK = "quack.linear_cross_entropy"
CCE = "cut_cross_entropy"
MEGATRON = "megatron.core.fusions.fused_linear_cross_entropy"


def per_row(module: str, name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Negative log-probs of rows, with an autograd function of that name behind them."""

    class PerRow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x_RH: Tensor, weight_VH: Tensor, labels_R: Tensor) -> Tensor:
            logps_RV = torch.log_softmax(x_RH @ weight_VH.t(), dim=1)
            ctx.save_for_backward(x_RH, weight_VH, labels_R, logps_RV)
            return -logps_RV.gather(1, labels_R[:, None]).squeeze(1)

        @staticmethod
        def backward(ctx: Any, upstream_R: Tensor) -> tuple[Tensor | None, ...]:
            x_RH, weight_VH, labels_R, logps_RV = ctx.saved_tensors
            d_logits_RV = logps_RV.exp()
            d_logits_RV[torch.arange(labels_R.numel()), labels_R] -= 1.0
            d_logits_RV *= upstream_R[:, None]
            return d_logits_RV @ weight_VH, d_logits_RV.t() @ x_RH, None

    PerRow.__module__, PerRow.__qualname__ = module, name
    return PerRow.apply


def mean(module: str, name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The mean of `per_row`."""
    rows = per_row(module, name)
    return lambda *tensors: rows(*tensors).mean()


class ScaledFunction:
    """Dispatches as on a Hopper GPU."""

    run = staticmethod(per_row(SCALED_SM90, "LigerFusedScaledCrossEntropySM90Function"))
    fallback = staticmethod(per_row(SCALED, "_FusedLinearPPOFallbackFunction"))
    is_hopper = True

    @classmethod
    def apply(
        cls,
        _input,
        weight,
        target,
        temperature=1.0,
        ignore_index=-100,
        m_tiles_per_cluster=1,
        return_entropy=False,
        selected_token_ids=None,
    ):
        return (cls.run if cls.is_hopper else cls.fallback)(_input, weight, target)


def scaled_tp(
    input, weight, target, tp_group, temperature=1.0, ignore_index=-100, tiles_per_reduce=1, return_entropy=False
):
    assert tp_group is not None
    return per_row(NATIVE_TP, "LigerFusedLinearScaledCrossEntropyNativeTPFunction")(input, weight, target)


class FlceConfig:
    def __init__(self, max_tokens, hidden_size, local_vocab_size, group=None, tiles_per_reduce=1):
        self.sizes, self.group = (max_tokens, hidden_size, local_vocab_size), group


configured: list[FlceConfig] = []
"""What `configure` was given."""


def configure(*, process_groups=None, bootstrap_group=None, device=None, flsce=None, moe=None):
    assert flsce.group in process_groups
    configured.append(flsce)
    return True


def liger_sm90(_input, weight, target, ignore_index=-100, reduction="mean"):
    return mean(SM90, "LigerFusedLinearCrossEntropySM90Function")(_input, weight, target)


class LigerLoss:
    def forward(self, lin_weight, _input, target, bias=None):
        return mean(TRITON, "LigerFusedLinearCrossEntropyFunction")(_input, lin_weight, target)

    __call__ = forward


def quack_chunked(
    x,
    weight,
    target,
    chunk_size=4096,
    ignore_index=-100,
    reduction="mean",
    tuned=True,
    use_scaled_exp=None,
):
    name = "ScaledExpLinearCrossEntropyFunction" if use_scaled_exp else "ChunkedLinearCrossEntropyFunction"
    return mean(QUACK, name)(x, weight, target)


def cce(e, c, targets, ignore_index=-100, softcap=None, reduction="mean", shift=False, filter_eps="high", impl="cce"):
    kept, losses = (targets != ignore_index).flatten(), torch.zeros(targets.numel())
    found = per_row("cut_cross_entropy.cce", "LinearCrossEntropyFunction")(
        e.flatten(0, 1)[kept], c, targets.flatten()[kept]
    )
    assert reduction == "none"
    return losses.masked_scatter(kept, found).view(targets.shape)


def megatron_linear(
    hidden, weight, labels, tp_group=None, reduction="mean", ignore_index=-100, sequence_parallel=False
):
    assert reduction == "none"
    return per_row(MEGATRON, "LinearCrossEntropy")(hidden, weight, labels)


FAKES: dict[str, dict[str, Any]] = {
    LIGER: {"LigerFusedLinearScaledCrossEntropyFunction": ScaledFunction},
    SM90: {"liger_fused_linear_cross_entropy_sm90": liger_sm90},
    LOSS: {"LigerFusedLinearCrossEntropyLoss": LigerLoss},
    FUNCTIONAL: {"liger_fused_linear_scaled_cross_entropy_tp": scaled_tp},
    CONFIGURE: {"configure": configure, "FusedLinearCrossEntropyConfig": FlceConfig},
    QUACK: {"chunked_linear_cross_entropy": quack_chunked},
    CCE: {"linear_cross_entropy": cce},
    MEGATRON: {"linear_cross_entropy": megatron_linear},
}
SIGNATURES: dict[tuple[str, str], Callable[..., Any]] = {
    (SCALED, "LigerFusedLinearScaledCrossEntropyFunction.apply"): ScaledFunction.apply,
    (SM90, "liger_fused_linear_cross_entropy_sm90"): liger_sm90,
    (LOSS, "LigerFusedLinearCrossEntropyLoss.forward"): LigerLoss.forward,
    (FUNCTIONAL, "liger_fused_linear_scaled_cross_entropy_tp"): scaled_tp,
    (CONFIGURE, "configure"): configure,
    (CONFIGURE, "FusedLinearCrossEntropyConfig"): FlceConfig.__init__,
    (QUACK, "chunked_linear_cross_entropy"): quack_chunked,
    ("cut_cross_entropy.linear_cross_entropy", "linear_cross_entropy"): cce,
    (MEGATRON, "linear_cross_entropy"): megatron_linear,
}
"""(module, function) of the real library -> its stand-in, with the same parameters."""


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the stand-ins in the place of the libraries, whether these are installed or not."""
    names = {".".join(name.split(".")[:depth]) for name in FAKES for depth in range(1, name.count(".") + 2)}
    for name in names:
        module = ModuleType(name)
        module.__path__ = []
        module.__dict__.update(FAKES.get(name, {}))
        monkeypatch.setitem(sys.modules, name, module)


def source_of(module: str) -> ast.Module | None:
    """The parsed source of a module, found without importing it; None where its library is not installed."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or not spec.submodule_search_locations:
        return None
    for root in spec.submodule_search_locations:
        for file in (Path(root, *rest).with_suffix(".py"), Path(root, *rest, "__init__.py")):
            if file.exists():
                return ast.parse(file.read_text(encoding="utf-8"))
    return None


def defined(source: ast.Module, name: str) -> ast.ClassDef | ast.FunctionDef | None:
    """The class or function of that dotted name in a source."""
    nodes: list[ast.stmt] = source.body
    found: ast.ClassDef | ast.FunctionDef | None = None
    for part in name.split("."):
        candidates = [node for node in nodes if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == part]
        if not candidates:
            return None
        found = candidates[0]
        nodes = found.body
    return found


def parameters(node: ast.ClassDef | ast.FunctionDef) -> list[str]:
    """Names of a function's parameters without `self`, `cls`; of a dataclass its fields."""
    if isinstance(node, ast.ClassDef):
        return [field.target.id for field in node.body if isinstance(field, ast.AnnAssign)]  # type: ignore[union-attr]
    names = [each.arg for each in (*node.args.args, *node.args.kwonlyargs)]
    return [name for name in names if name not in ("self", "cls")]
