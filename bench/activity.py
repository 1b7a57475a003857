"""Whether as many columns are active in drawn activations as on real text: checked before a head is timed on them.

    python -m bench.activity                             draw, count, store; minutes on two cores
    python -m bench.activity --into docs/benchmarks.md   put the stored table between the marks of this page

What is expected: where a real model was measured at as many rows (`bench.active_error`), its share; else the rule of
`workloads.expected_active`. Of fewer than 96 rows or 16,384 columns the rule says nothing, of real activations nothing
is expected.

Dims: see `workloads`.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch

from bench.pages import replace_in
from bench.workloads import ROOT, Case, draw_head, expected_active
from fastpref import SequenceLogps, linear_logps
from fastpref.kernels import native
from fastpref.kernels.engine import CHUNK_ROWS

MEASURED = ROOT / "bench" / "results" / "active_error.json"
RESULTS = ROOT / "bench" / "results" / "activity.json"
OPEN = "<!-- table: python -m bench.activity --into docs/benchmarks.md -->"
ACTIVE_EPS = 2.0**-8
ALIKE = (0.8, 1.2)
"""Active columns of drawn activations over those that are expected, at least and at most."""
LEAST_ROWS, LEAST_VOCAB = 96, 16_384
SHAPES = {
    "gemma3-270m": (262_144, 640, (387, 1576)),
    "smollm2-135m": (49_152, 576, (397, 1614)),
    "V = 131,072": (131_072, 512, (96, 512, 4096)),
    "V = 32,768": (32_768, 512, (512, 4096)),
}
"""What the table draws: vocabulary, hidden size, rows."""


def compare(case: Case) -> dict[str, Any]:
    """Count the active columns of a case and compare them with what is expected.

    Returns:
        {} where nothing is expected; else the share found, the share expected and what that rests on, with a "reason"
        where they are not alike.
    """
    rests_on, expected = expected_share(case)
    if expected is None:
        return {}
    found = active_share(case)
    row = {"active_fraction": round(found, 4), "expected": round(expected, 4), "rests_on": rests_on}
    if ALIKE[0] <= found / expected <= ALIKE[1]:
        return row
    return row | {"reason": f"{found / expected:.2f} times the active columns that are expected by {rests_on}"}


def expected_share(case: Case) -> tuple[str, float | None]:
    """What is expected of a case rests on (what, which share of its columns); None = nothing is expected."""
    vocab, rows = case.weight_VH.shape[0], case.rows_R.numel()
    model = re.fullmatch(r"(.+)-r\d+", case.name)
    for line in _measured():
        if model and (line["workload"], line["rows"], line["active_eps"]) == (model[1], rows, ACTIVE_EPS):
            return "the measured model", line["active_fraction"]
    is_of_rule = re.search(r"(^|-)r\d+(-f\d+)?$", case.name) is not None
    if not is_of_rule or rows < LEAST_ROWS or vocab < LEAST_VOCAB:
        return "nothing", None
    return "the rule", expected_active(vocab, ACTIVE_EPS)


def active_share(case: Case) -> float:
    """The share of columns that get gradients in one pass of the active plan."""
    active, _ = left_out(case)
    return active


def screened(case: Case) -> dict[str, Any]:
    """The share of columns that a screened pass multiplies exactly, for how many rows at once, and how the others.

    Where the exact pass takes its place all of them are.
    """
    active, cold_mass = left_out(case, has_gradient=False, forward="screened", screened=case.screened)
    if case.weight_VH.is_cuda or case.backend == "triton":
        path = "Triton"
    else:
        path = native.build_name() if native.supports(case.weight_VH.dtype) else "PyTorch operators"
    rows = min(case.rows_R.numel(), CHUNK_ROWS)
    return {"active_fraction": round(active, 4), "cold_mass": cold_mass, "chunk_rows": rows, "path": path}


def left_out(
    case: Case, *, active_eps: float = ACTIVE_EPS, has_gradient: bool = True, **options: Any
) -> tuple[float, float]:
    """The share of active columns, and the mass per row of the others, of one forward pass."""
    rows, cu_rows = case.host_rows
    with torch.set_grad_enabled(has_gradient):
        scores: SequenceLogps = linear_logps(
            case.hidden_SLH.detach().requires_grad_(),
            case.weight_VH.detach(),
            case.labels_SL,
            rows=rows,
            cu_rows=cu_rows,
            backward="active",
            active_eps=active_eps,
            stats=("active_fraction", "cold_mass"),
            backend=case.backend,
            **options,
        )
    assert scores.active_fraction is not None and scores.cold_mass is not None
    return float(scores.active_fraction), float(scores.cold_mass)


def draw_points() -> list[dict[str, Any]]:
    """Draw the shapes of the table and count."""
    lines = []
    for name, (vocab, hidden, counts) in SHAPES.items():
        for rows in counts:
            weight_VH, hidden_SLH, labels_SL = draw_head(vocab, hidden, rows, [rows])
            case = Case(name, hidden_SLH, weight_VH, labels_SL, torch.zeros(1, dtype=torch.float32))
            line = {"shape": name, "vocab": vocab, "rows": rows, "active_fraction": active_share(case)}
            lines.append(line)
            print(line, flush=True)
    return lines


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: columns that are active on text, by the rule and when drawn, at the default tolerance."""
    measured = {
        (line["workload"], line["rows"]): line["active_fraction"]
        for line in _measured()
        if line["active_eps"] == ACTIVE_EPS
    }
    rows = ["| | rows | on text | by the rule | drawn | drawn over expected |", "|---|---|---|---|---|---|"]
    for line in lines:
        real, rule = measured.get((line["shape"], line["rows"])), expected_active(line["vocab"], ACTIVE_EPS)
        counts = [f"{share * line['vocab']:,.0f}" if share else "" for share in (real, rule, line["active_fraction"])]
        ratio = line["active_fraction"] / (real or rule)
        rows.append(f"| {line['shape']} | {line['rows']} | {' | '.join(counts)} | {ratio:.2f} |")
    return "\n".join(rows)


def _measured() -> list[dict[str, Any]]:
    return json.loads(MEASURED.read_text(encoding="utf-8"))["lines"]


def main() -> None:
    """Draw and store, or write the table of what is stored."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--into", type=Path, help="draw nothing; put the stored table between the marks of this page")
    options = parser.parse_args()
    if options.into is not None:
        replace_in(options.into, table(json.loads(RESULTS.read_text(encoding="utf-8"))["lines"]), OPEN)
        return
    lines = draw_points()
    row = {"benchmark": "activity", "active_eps": ACTIVE_EPS, "torch": torch.__version__, "lines": lines}
    RESULTS.write_text(json.dumps(row, indent=2) + "\n", encoding="utf-8")
    print(table(lines))


if __name__ == "__main__":
    main()
