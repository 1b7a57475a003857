"""Part 2: the head of a preference-trained model on a GPU, forward and backward, beside its peers.

Each row: one implementation on one workload. It passes the gate before it is timed. Three passes are timed: `reference`
(log-probs without a gradient, as the reference model is scored), `forward` (log-probs that a backward pass can follow)
and `both` (with loss and gradients). They take turns with a fastpref pass and with bare matrix products of the same
operations, on hidden states that are new in every turn and with a flushed cache.

Dims: see `workloads`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial

import torch
from torch import Tensor

from bench import activity
from bench.gpu import clock
from bench.implementations import BARE, IMPLEMENTATIONS
from bench.measure import Row
from bench.oracle import Errors, errors, solve, token_errors, verdict
from bench.registry import Implementation, call, score
from bench.workloads import Case, row_logps

ANCHOR = "ours-active"
"""What every row is timed beside, so that ratios are of one minute."""
PRODUCTS = {"reference": 1, "forward": 1, "both": 3}
"""Passes, and how many products of R x H x V useful operations each has: 2 RHV operations a product."""
REPEATS = 7
Pass = Callable[[Case, Tensor, Tensor], object]


class Prepared:
    """A workload, and what is right for it; what costs most is made once and shared by its rows."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self._expected: dict[str, dict[str, Tensor]] = {}
        self._naive: Errors | None = None

    @cached_property
    def activity(self) -> Row:
        """How many columns are active, beside how many should be; see `activity.compare`."""
        return activity.compare(self.case)

    def expected(self, loss: str) -> dict[str, Tensor]:
        """The fp64 result under a loss; one is kept at a time."""
        if loss not in self._expected:
            self._expected = {loss: solve(self.case, loss)}
        return self._expected[loss]

    @cached_property
    def tokens_R(self) -> Tensor:
        """The fp64 log-prob of every token."""
        with torch.no_grad():
            return row_logps(self.case, torch.float64)

    def naive_errors(self) -> Errors | None:
        """Errors of naive PyTorch, the yardstick of the numeric rule; None where it runs out of memory."""
        if self._naive is None:
            try:
                self._naive = self.errors_of(IMPLEMENTATIONS["naive-rows"])
            except torch.OutOfMemoryError:
                return None
        return self._naive

    def errors_of(self, implementation: Implementation) -> Errors:
        """Errors of one pass."""
        case = self.case
        result = call(implementation, case, case.hidden_SLH, case.weight_VH)
        found = errors(result, self.expected(implementation.loss))
        return found | (token_errors(implementation, case, self.tokens_R) if implementation.is_screened else {})

    def reason(self, implementation: Implementation, found: Errors) -> str | None:
        """What is wrong with errors, or None."""
        yardstick = self.naive_errors() if implementation.is_exact else None
        flags = {"is_exact": implementation.is_exact, "is_screened": implementation.is_screened}
        return verdict(found, yardstick, dtype=self.case.hidden_SLH.dtype, **flags)


def measure(prepared: Prepared, name: str, repeats: int = REPEATS) -> Row:
    """Check, weigh and time one implementation.

    Args:
        prepared: the workload.
        name: in the registry.
        repeats: timed turns after one that warms up.

    Returns:
        A row; "wrong", without times, where the gate or the activity of the workload says so, and "missing" where a
        peer is not installed or is made for another device.
    """
    implementation, case = IMPLEMENTATIONS[name], prepared.case
    device, dtype = case.hidden_SLH.device, case.hidden_SLH.dtype
    missing = implementation.unavailable(device)
    if missing is not None:
        return {"status": "missing", "reason": missing}
    if "reason" in prepared.activity:
        return {"status": "wrong", "activity": prepared.activity, "reason": prepared.activity["reason"]}
    found = prepared.errors_of(implementation)
    active = float(prepared.expected(implementation.loss)["active_fraction"])
    row: Row = {
        "title": implementation.title,
        "loss": implementation.loss,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": case.shape | {"active_fraction": round(active, 4)},
        "activity": prepared.activity,
        "errors": found,
    }
    case = implementation.given(case, case.weight_VH)
    if implementation.is_screened:
        row["screened"] = activity.screened(case)
    if case.screened is not None:
        row["shared_mib"] = round(case.screened.num_bytes / 2**20, 1)
    if (reason := prepared.reason(implementation, found)) is not None:
        return row | {"status": "wrong", "reason": reason}
    passes = passes_of(implementation)
    gradients = case.hidden_SLH.nbytes + case.weight_VH.nbytes
    row["returned_mib"] = {name: round(gradients / 2**20 if name == "both" else 0.0, 1) for name in passes}
    for run in passes.values():
        run(case, case.hidden_SLH, case.weight_VH)  # compilers and workspaces do not count
    row["extra_peak_mib"] = {
        kind: round(clock.extra_peak_mib(partial(run, case, case.hidden_SLH, case.weight_VH), device), 1)
        for kind, run in passes.items()
    }
    row["times_ms"] = {kind: time_in_turns(case, kind, name, run, repeats) for kind, run in passes.items()}
    return row


def passes_of(implementation: Implementation) -> dict[str, Pass]:
    """What can be timed of an implementation, by the names of `PRODUCTS`."""
    passes: dict[str, Pass] = {"both": partial(call, implementation)}
    if implementation.logps is None:
        return passes
    logps = implementation.logps

    def forward(case: Case, hidden_SLH: Tensor, weight_VH: Tensor) -> None:
        given = implementation.given(case, weight_VH)
        logps(given, hidden_SLH.detach().requires_grad_(), weight_VH.requires_grad_())

    return {"reference": partial(score, implementation), "forward": forward} | passes


def bare_products(kind: str, case: Case, hidden_SLH: Tensor, weight_VH: Tensor) -> None:
    """The matrix products of a pass and nothing else: X W^T, and where there is a backward pass dZ W and dZ^T X."""
    x_RH, weight_VH = hidden_SLH.detach().flatten(0, 1)[case.rows_R], weight_VH.detach()
    z_RV = x_RH @ weight_VH.t()
    if PRODUCTS[kind] == 3:
        _ = z_RV @ weight_VH
        _ = z_RV.t() @ x_RH


def time_in_turns(case: Case, kind: str, name: str, run: Pass, repeats: int) -> dict[str, list[float]]:
    """Times in ms of a pass, of the anchor's and of the bare products, after one turn that warms up.

    What the implementation gets from its caller is made before.
    """
    case = IMPLEMENTATIONS[name].given(case, case.weight_VH)
    device = case.hidden_SLH.device
    passes: dict[str, Pass] = {BARE: partial(bare_products, kind)}
    passes[ANCHOR] = passes_of(IMPLEMENTATIONS[ANCHOR])[kind]
    passes[name] = run
    times: dict[str, list[float]] = {name: [] for name in passes}
    scale = 1e-2 * float(case.hidden_SLH.float().std())
    for turn in range(repeats + 1):
        hidden_SLH = case.hidden_SLH + scale * torch.randn_like(case.hidden_SLH)
        for each, timed in passes.items():
            taken = clock.time_ms(partial(timed, case, hidden_SLH, case.weight_VH), device)
            if turn:
                times[each].append(round(taken, 4))
    return times
