"""Times of heads: rows as part 2 of `h100` has them, and the passes of ours at a given share of active columns.

Dims: see `workloads`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

import torch

from bench.gpu import heads, inputs
from bench.gpu.fifteen.context import Context
from bench.gpu.fifteen.phases import profile
from bench.gpu.folder import is_broken
from bench.gpu.parts import DRY_WORKLOADS, DTYPE, FEW, OTHER_MODELS, OTHER_ROWS, OURS, VOCAB_SWEEP, Session
from bench.implementations import IMPLEMENTATIONS
from bench.measure import Row
from bench.workloads import Case, with_reference
from fastpref import linear_logps

CLOSE_ENOUGH, HALVINGS = 0.05, 14
"""How near a share of active columns must come to the one asked for, relatively, and in how many steps."""
SCALES = (0.05, 20.0)
"""Factors on the hidden states among which it is looked for: the larger, the fewer columns are active."""
OTHERS = (*((workload, name) for workload in (*OTHER_ROWS, *OTHER_MODELS, *VOCAB_SWEEP) for name in FEW),)
OTHER_S = 12.0
"""No other head is begun with less left."""


@functools.lru_cache(maxsize=1)
def prepared(session: Session, workload: str) -> heads.Prepared:
    """A workload and what is right for it; the last one is kept."""
    return heads.Prepared(inputs.build_on(workload, session.device, DTYPE, session.backend))


def head(context: Context, workload: str, name: str) -> Row:
    """Check, weigh and time one implementation; ours with a profile of the passes."""
    missing = IMPLEMENTATIONS[name].unavailable(context.session.device)
    if missing is not None:  # before inputs are made for it
        return {"status": "missing", "reason": missing}
    here = prepared(context.session, workload)
    row = heads.measure(here, name, context.session.repeats)
    if row.get("status", "ok") == "ok" and IMPLEMENTATIONS[name].is_ours:
        context.note(row)
        case = IMPLEMENTATIONS[name].given(here.case, here.case.weight_VH)
        row["phases"] = {
            kind: profile(functools.partial(run, case, case.hidden_SLH, case.weight_VH), context.session.device)
            for kind, run in heads.passes_of(IMPLEMENTATIONS[name]).items()
        }
    return row


def phases(context: Context, workload: str, share: float) -> Row:
    """Time forward and backward of all plans of ours, bare products beside them, where so many columns are active."""
    session = context.session
    case, active = with_activity(prepared(session, workload).case, share)
    row: Row = {"shape": case.shape | {"active_fraction": round(active, 4)}, "plans": {}}
    for name in OURS:
        plan = heads.passes_of(IMPLEMENTATIONS[name])
        times = heads.time_in_turns(case, "both", name, plan["both"], session.repeats)
        run = functools.partial(plan["both"], case, case.hidden_SLH, case.weight_VH)
        row["plans"][name] = {"times_ms": {"both": times}, "phases": {"both": profile(run, session.device)}}
        context.note(row)
    if abs(active / share - 1) > 2 * CLOSE_ENOUGH and not session.is_dry:
        return row | {"status": "wrong", "reason": f"{active:.1%} of the columns are active, {share:.0%} were wanted"}
    return row


def with_activity(case: Case, share: float) -> tuple[Case, float]:
    """Make the softmax flatter or steeper until so many columns are active; return the case and what they are."""
    low, high = SCALES
    found, active = case, 0.0
    for _ in range(HALVINGS):
        middle = (low * high) ** 0.5
        found = replace(case, hidden_SLH=case.hidden_SLH * middle)
        active = _active_fraction(found)
        if abs(active / share - 1) < CLOSE_ENOUGH:
            break
        low, high = (middle, high) if active > share else (low, middle)
    # What the old reference says of other logits would leave no row a gradient.
    with torch.no_grad():  # the weight asks for a gradient since its first pass
        wide = with_reference(found.to(found.hidden_SLH.device, torch.float32))
    return replace(found, ref_logps_S=wide.ref_logps_S), active


def _active_fraction(case: Case) -> float:
    rows, cu_rows = case.host_rows
    scores = linear_logps(
        case.hidden_SLH.detach().requires_grad_(),
        case.weight_VH.detach(),
        case.labels_SL,
        rows=rows,
        cu_rows=cu_rows,
        backward="active",
        stats=("active_fraction",),
        backend=case.backend,
    )
    assert scores.active_fraction is not None
    return float(scores.active_fraction)


def others(context: Context) -> Row:
    """Rows of other models, numbers of rows and vocabularies, as long as there is time."""
    rows: Row = {}
    for workload, name in _others(context):
        try:
            rows[f"{name} on {workload}"] = {"status": "ok"} | head(context, workload, name)
        except Exception as error:  # as in `Folder.measure`
            if is_broken(error):
                raise
            rows[f"{name} on {workload}"] = {
                "status": "failed",
                "reason": f"{type(error).__name__}: {error}".splitlines()[0],
            }
        context.note({"rows": rows})
    return {"rows": rows}


def _others(context: Context) -> Iterator[tuple[str, str]]:
    if context.session.is_dry:
        yield DRY_WORKLOADS[0], "ours-active"
        return
    for job in OTHERS:
        if context.left() < OTHER_S:
            return
        yield job
