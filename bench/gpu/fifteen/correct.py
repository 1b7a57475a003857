"""Whether the kernels are right on this device: all plans against fp64, bit for bit again, and policy as reference.

Dims: see `workloads`.
"""

from __future__ import annotations

import torch

from bench.gpu import heads, inputs
from bench.gpu.fifteen.context import Context
from bench.gpu.parts import DTYPE, OURS
from bench.implementations import IMPLEMENTATIONS
from bench.measure import Row
from bench.registry import HeadResult, call, score
from bench.workloads import Case

REPEATS, DRY_REPEATS = 20, 2


def check(context: Context, workload: str) -> Row:
    """Compare every plan of ours with fp64, with itself and, without a gradient, with the pass that has one.

    Returns:
        A row with one entry per plan; "wrong" where any of them is.
    """
    session = context.session
    prepared = heads.Prepared(inputs.build_on(workload, session.device, DTYPE, session.backend))
    plans: dict[str, Row] = {}
    for name in OURS:
        plans[name] = _check_plan(prepared, name, DRY_REPEATS if session.is_dry else REPEATS)
        context.note({"shape": prepared.case.shape, "plans": plans})
    wrong = [f"{name}: {row['reason']}" for name, row in plans.items() if "reason" in row]
    row: Row = {"shape": prepared.case.shape, "plans": plans}
    return row | ({"status": "wrong", "reason": "; ".join(wrong)} if wrong else {})


def _check_plan(prepared: heads.Prepared, name: str, repeats: int) -> Row:
    """Errors of one plan, and what is wrong with it as `reason`."""
    implementation, case = IMPLEMENTATIONS[name], prepared.case
    found = prepared.errors_of(implementation)
    wrong = [prepared.reason(implementation, found)]
    first = call(implementation, case, case.hidden_SLH, case.weight_VH)
    wrong.append(_differs_again(name, case, first, repeats))
    wrong.append(_differs_from_reference(name, case, first))
    reasons = [reason for reason in wrong if reason is not None]
    return {"errors": found, "repeats": repeats} | ({"reason": ", ".join(reasons)} if reasons else {})


def _differs_again(name: str, case: Case, first: HeadResult, repeats: int) -> str | None:
    """Say which repeat gave other bits, and where."""
    for turn in range(repeats):
        again = call(IMPLEMENTATIONS[name], case, case.hidden_SLH, case.weight_VH)
        for field in ("logps", "d_hidden", "d_weight"):
            if not torch.equal(getattr(first, field), getattr(again, field)):
                return f"repeat {turn + 1} of {repeats} gave other bits of {field}"
    return None


def _differs_from_reference(name: str, case: Case, first: HeadResult) -> str | None:
    """Say whether log-probs without a gradient, as a reference model is scored, have other bits than the policy's."""
    if torch.equal(score(IMPLEMENTATIONS[name], case, case.hidden_SLH, case.weight_VH).logps, first.logps):
        return None
    return "the reference pass gave other bits than the policy's"
