"""What an entry of the registry is, how it is called, and the losses that it may be called under.

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

from bench.workloads import BETA, Case

Run = Callable[[Case, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class HeadResult:
    """What a pass returns: log-probs [S] and, where it has them, both gradients, in the shapes of the inputs."""

    logps: Tensor
    d_hidden: Tensor | None = None
    d_weight: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """One way to compute the head."""

    title: str
    logps: Run | None = None
    """(case, hidden, weight) -> differentiable logps [S]; None where forward and backward cannot be told apart."""
    run: Run | None = None
    """(case, hidden, weight) -> logps [S]; leaves `.grad` on hidden [S, L, H] and weight [V, H], which come without.

    None makes it of `logps` or `mean_nll`.
    """
    mean_nll: Run | None = None
    """(case, hidden, weight) -> mean negative log-prob of the response rows, of heads that make their gradient in the
    forward pass and so have no other loss. `run` is made of it, and returns the sum of all log-probs, [1].
    """
    prepare: Callable[[Case, Tensor], Case] | None = None
    """(case, weight) -> the case with what a caller has at hand before a pass; outside of the clock and of the peak."""
    loss: str = "dpo"
    """What is differentiated: a key of `LOSSES`."""
    devices: tuple[str, ...] = ("cpu", "cuda")
    """Where it is measured."""
    is_ours: bool = False
    is_exact: bool = False
    """Gated by the numeric rule with naive PyTorch as yardstick; else by relative errors."""
    is_screened: bool = False
    """Its log-probs are approximate like its gradients, and held to limits for each token; see `oracle.verdict`."""
    modules: tuple[str, ...] = ()
    """What must be importable."""
    install: str = ""
    """How to have them."""
    capabilities: tuple[int, ...] = ()
    """Major CUDA capabilities that its fast path is written for; none: any."""
    path: tuple[str, ...] = ()
    """Autograd functions of which each pass must run one, or it fell back to something slower: see `require_path`."""
    is_compiled: bool = False
    """Whether the first pass compiles, so that peak memory is that of a later pass."""
    beside: tuple[str, ...] = ()
    """Others to time in the same turns."""
    time_target: float | None = None
    """What its time over ours should at least be, on a CPU."""
    memory_target: float | None = None
    """What its peak memory over ours should at least be, on a CPU."""

    def __post_init__(self) -> None:
        if self.run is None:
            assert (self.logps is None) != (self.mean_nll is None), f"{self.title} must have one way to run"
            object.__setattr__(self, "run", partial(_differentiate, self))

    def given(self, case: Case, weight_VH: Tensor) -> Case:
        """Return what a pass over this weight gets; what is in the case already is not made again."""
        return case if self.prepare is None else self.prepare(case, weight_VH)

    def unavailable(self, device: torch.device) -> str | None:
        """Say why it cannot run here, or None."""
        missing = [module for module in self.modules if not _is_importable(module)]
        if missing:
            return f"{', '.join(missing)} not installed: {self.install}"
        if self.capabilities and device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(device)
            if major not in self.capabilities:
                wanted = " or ".join(f"{capability}.x" for capability in self.capabilities)
                return f"made for compute capability {wanted}; this device has {major}.{minor}"
        return None


def _is_importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a part of a package that is not there
        return False


class WrongPathError(RuntimeError):
    """A peer did not take the path that it is measured for."""


def require_path(output: Tensor, path: tuple[str, ...]) -> None:
    """Check by the autograd graph behind an output that a peer took its fast path.

    Args:
        output: what a forward pass returned; nothing is checked where it carries no gradient.
        path: names of nodes, one of which must be there: "package.module.Function" of a class derived from
            `torch.autograd.Function`, or the bare name of any other node. Empty: nothing is checked.

    Raises:
        WrongPathError: none is; with the nodes that are.
    """
    if not path or output.grad_fn is None:
        return
    pending, seen = [output.grad_fn], dict[str, None]()
    visited = set[object]()
    while pending:
        node = pending.pop()
        if node in visited:
            continue
        visited.add(node)
        name = _node_name(node)
        if name in path:
            return
        seen[name] = None
        pending += [following for following, _ in node.next_functions if following is not None]
    raise WrongPathError(f"{' or '.join(path)} did not run; behind its output are {', '.join(seen)}")


def _node_name(node: object) -> str:
    function = getattr(type(node), "_forward_cls", None)
    if function is None or "<locals>" in function.__qualname__ or function.__name__.startswith("GeneratedBackward"):
        return type(node).__name__
    return f"{function.__module__}.{function.__qualname__}"


def dpo_loss(logps_S: Tensor, ref_logps_S: Tensor) -> Tensor:
    """Sigmoid DPO, mean over pairs."""
    chosen_B, rejected_B = (logps_S - ref_logps_S).chunk(2)
    return -F.logsigmoid(BETA * (chosen_B - rejected_B)).mean()


def _dpo(case: Case, logps_S: Tensor) -> Tensor:
    return dpo_loss(logps_S, case.ref_logps_S.to(logps_S.dtype))


def _mean_nll(case: Case, logps_S: Tensor) -> Tensor:
    """What heads can do that make their gradient in the forward pass: one weight for every row."""
    return -logps_S.sum() / case.rows_R.numel()


def _orpo(case: Case, logps_S: Tensor) -> Tensor:
    """Odds ratio of mean log-probs, plus the mean NLL of the chosen tokens."""
    counts_S = case.cu_rows.diff().to(logps_S)
    chosen_B, rejected_B = (logps_S / counts_S).chunk(2)
    log_odds_B = chosen_B - rejected_B - torch.log1p(-chosen_B.exp()) + torch.log1p(-rejected_B.exp())
    nll = -logps_S[: case.num_pairs].sum() / counts_S[: case.num_pairs].sum()
    return nll - BETA * F.logsigmoid(log_odds_B).mean()


LOSSES: dict[str, Callable[[Case, Tensor], Tensor]] = {"dpo": _dpo, "mean-nll": _mean_nll, "orpo": _orpo}
"""(case, logps [S]) -> scalar."""


def upstream(case: Case, loss: str, logps_S: Tensor) -> Tensor:
    """Gradient of a loss to the log-probs [S]."""
    logps_S = logps_S.detach().requires_grad_()
    (gradient_S,) = torch.autograd.grad(LOSSES[loss](case, logps_S), logps_S)
    return gradient_S


def _differentiate(implementation: Implementation, case: Case, hidden_SLH: Tensor, weight_VH: Tensor) -> Tensor:
    if implementation.mean_nll is not None:
        loss = implementation.mean_nll(case, hidden_SLH, weight_VH)
        require_path(loss, implementation.path)
        loss.backward()
        return -loss.detach().reshape(1) * case.rows_R.numel()
    assert implementation.logps is not None
    logps_S = implementation.logps(case, hidden_SLH, weight_VH)
    require_path(logps_S, implementation.path)
    LOSSES[implementation.loss](case, logps_S).backward()
    return logps_S


def call(implementation: Implementation, case: Case, hidden_SLH: Tensor, weight_VH: Tensor) -> HeadResult:
    """One pass, forward and backward; `weight_VH` may be reused afterwards, its gradient is taken off."""
    case = implementation.given(case, weight_VH)
    hidden_SLH = hidden_SLH.detach().requires_grad_()
    weight_VH.requires_grad_()
    assert implementation.run is not None
    logps_S = implementation.run(case, hidden_SLH, weight_VH)
    d_hidden_SLH, d_weight_VH = hidden_SLH.grad, weight_VH.grad
    assert d_hidden_SLH is not None and d_weight_VH is not None
    weight_VH.grad = None
    return HeadResult(logps_S.detach(), d_hidden_SLH, d_weight_VH)


@torch.no_grad()
def score(implementation: Implementation, case: Case, hidden_SLH: Tensor, weight_VH: Tensor) -> HeadResult:
    """One pass without a gradient, as a reference model or an evaluation is scored."""
    assert implementation.logps is not None, f"{implementation.title} has no forward pass of its own"
    return HeadResult(implementation.logps(implementation.given(case, weight_VH), hidden_SLH, weight_VH))


PASSES: dict[str, Callable[[Implementation, Case, Tensor, Tensor], HeadResult]] = {"head": call, "score": score}
"""What is measured on a CPU, by the command that does it."""


def sum_rows(case: Case, logps_R: Tensor) -> Tensor:
    """Sum rows to sequences."""
    zeros_S = torch.zeros(case.labels_SL.shape[0], dtype=torch.float32, device=logps_R.device)
    return zeros_S.index_add(0, case.row_sequences_R, logps_R.float())
