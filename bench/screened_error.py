"""Error of the screened forward pass on real activations, beside what 16-bit operands and 16-bit logits cost.

    python -m bench.screened_error gemma3-270m smollm2-135m      a quarter of an hour on one core
    python -m bench.screened_error --into docs/numerics.md       put the stored table between the marks of this page

Everything is compared with fp64 on the same inputs in fp32: log-probs of single tokens in nat, gradients of the sigmoid
DPO loss. Each workload is stored as soon as it is done, beside what is stored of others.

Dims: `N` rows, `R` response rows, `H` hidden, `V` vocabulary.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shlex
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench import activity
from bench.implementations import IMPLEMENTATIONS, ours
from bench.oracle import errors, solve, token_errors, token_truth, truth
from bench.pages import replace_in
from bench.registry import HeadResult, Implementation, call
from bench.workloads import NAMES, Case, build, row_logps
from fastpref import __version__
from fastpref.kernels import screening
from fastpref.kernels.engine import CHUNK_ROWS

RESULTS = Path(__file__).parent / "results" / "screened_error.json"
OPEN = "<!-- table: python -m bench.screened_error --into docs/numerics.md -->"
TOLERANCES = (2.0**-6, 2.0**-8, 2.0**-10)
DEFAULT_EPS = 2.0**-8
ROTATIONS = (1, 16, 64, 128)
"""Numbers that a rotation mixes, tried at the default tolerance; 1 is none."""
SAMPLE = 64
"""Rows whose int8 logits are compared one by one, evenly spread."""
ROUNDED = {
    "operands in bf16, logits in fp32": None,
    "operands and logits in bf16": torch.bfloat16,
}
"""What is measured beside -> what logits and their gradient are rounded to."""
Line = dict[str, Any]


def screened_with(active_eps: float) -> Implementation:
    """The screened pass of the registry at another tolerance."""
    logps = partial(ours, forward="screened", backward="active", active_eps=active_eps)
    return replace(IMPLEMENTATIONS["ours-screened"], logps=logps, run=None)


def measure(name: str) -> Iterator[Line]:
    """Yield the lines of a workload: tolerances with and without a rotation, other rotations, rounded numbers."""
    case = build(name)
    largest = screening.rotation_size(case.weight_VH.shape[1])
    jobs = [(active_eps, size) for active_eps in TOLERANCES for size in (largest, 1)]
    jobs += [(DEFAULT_EPS, size) for size in ROTATIONS if 1 < size < largest]
    for active_eps, size in jobs:
        with mock.patch.object(screening, "rotation_size", lambda hidden_size, size=size: size):
            yield _screened_line(case, active_eps, size)
    for what, logits_dtype in ROUNDED.items():
        yield _rounded_line(case, what, logits_dtype)


def _screened_line(case: Case, active_eps: float, size: int) -> Line:
    implementation = screened_with(active_eps)
    active, cold_mass = activity.left_out(case, active_eps=active_eps, has_gradient=False, forward="screened")
    found = call(implementation, case, case.hidden_SLH, case.weight_VH)
    return _line(case, f"screened, 2^{math.log2(active_eps):.0f}", found) | {
        "active_eps": active_eps,
        "rotation": size,
        "active_fraction": active,
        "cold_mass": cold_mass,
        "logit_rms": int8_logit_error(case),
        **_tokens(token_errors(implementation, case, token_truth(case))["token_logps"]),
    }


def _rounded_line(case: Case, what: str, logits_dtype: torch.dtype | None) -> Line:
    rounded = replace(case, hidden_SLH=_rounded(case.hidden_SLH), weight_VH=_rounded(case.weight_VH))
    solved = solve(rounded, "dpo", torch.float32, logits_dtype)
    found = HeadResult(solved["logps"], solved["d_hidden"], solved["d_weight"])
    with torch.no_grad():
        off_R = row_logps(rounded, torch.float32, logits_dtype).double() - token_truth(case)
    return _line(case, what, found) | _tokens(
        {"rms": float(off_R.square().mean().sqrt()), "max": float(off_R.abs().amax())}
    )


def _rounded(values: Tensor) -> Tensor:
    return values.detach().bfloat16().float()


def _line(case: Case, what: str, found: HeadResult) -> Line:
    """Errors of gradients."""
    off = errors(found, truth(case))
    return {
        "workload": case.name,
        "rows": case.rows_R.numel(),
        "chunk_rows": min(case.rows_R.numel(), CHUNK_ROWS),
        "what": what,
        "d_hidden_error": off["d_hidden"]["relative_l2"],
        "d_weight_error": off["d_weight"]["relative_l2"],
    }


def _tokens(error: dict[str, float]) -> Line:
    return {"token_rms": error["rms"], "token_max": error["max"]}


@torch.no_grad()
def int8_logit_error(case: Case) -> float:
    """Root mean square error of the int8 logits of `SAMPLE` rows and every column, before any is taken exactly."""
    every = max(case.rows_R.numel() // SAMPLE, 1)
    x_NH, weight_VH = case.hidden_SLH.flatten(0, 1)[case.rows_R[::every][:SAMPLE]], case.weight_VH.detach()
    rows, columns = screening.quantise_rows(x_NH), screening.quantise_rows(weight_VH)
    # Sums of so many products of int8 numbers are whole numbers that fp32 holds.
    assert 127**2 * x_NH.shape[1] < 2**24
    total, places = 0.0, weight_VH.shape[0] // 8192 + 1
    for part in torch.arange(weight_VH.shape[0], dtype=torch.int64).chunk(places):
        int8_Nv = rows.values_NH.float() @ columns.values_NH[part].float().t()
        int8_Nv = int8_Nv * rows.scales_N[:, None] * columns.scales_N[part]
        total += float((int8_Nv - x_NH @ weight_VH[part].t()).double().square().sum())
    return math.sqrt(total / (x_NH.shape[0] * weight_VH.shape[0]))


def table(lines: list[Line]) -> str:
    """Markdown of the stored lines."""
    header = [
        *("model", "rows", "what", "rotation", "active", "`cold_mass`", "logit in int8"),
        *("log-prob of a token", "largest", "error of rows", "error of weight"),
    ]
    rows = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for line in lines:
        cells = [line["workload"], str(line["rows"]), line["what"]]
        if "rotation" in line:
            rotation = str(line["rotation"]) if line["rotation"] > 1 else "none"
            cells += [
                rotation,
                f"{line['active_fraction']:.1%}",
                f"{line['cold_mass']:.1e}",
                f"{line['logit_rms']:.1e}",
            ]
        else:
            cells += [""] * 4
        cells += [f"{line[key]:.1e}" for key in ("token_rms", "token_max", "d_hidden_error", "d_weight_error")]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def store(path: Path, name: str, lines: list[Line]) -> None:
    """Write the lines of a workload to a file; those of others stay in it, in the order of `NAMES`."""
    others = json.loads(path.read_text(encoding="utf-8"))["lines"] if path.exists() else []
    kept = [line for line in others if line["workload"] != name]
    row = {
        "benchmark": "screened_error",
        "command": shlex.join(["python", "-m", "bench.screened_error", *sys.argv[1:]]),
        "versions": {"fastpref": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "lines": sorted([*kept, *lines], key=lambda line: NAMES.index(line["workload"])),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(row, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Measure, print and write JSON; or write the table of what is stored."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--into", type=Path, help="measure nothing; put the stored table between the marks of this page"
    )
    options = parser.parse_args()
    if options.into is not None:
        replace_in(options.into, table(json.loads(options.out.read_text(encoding="utf-8"))["lines"]), OPEN)
        return
    for name in options.workloads:
        lines = []
        for line in measure(name):
            lines.append(line)
            print(line, flush=True)
        store(options.out, name, lines)


if __name__ == "__main__":
    main()
