"""Error of the active backward plan on a workload, against the exact plan in fp32, for a range of tolerances.

    python -m bench.active_error gemma3-270m smollm2-135m random-init       about 5 minutes on two cores

Each workload is stored as soon as it is done, beside what is stored of others.

The exact plan differs from fp64 by 1e-6 of the gradient, far less than what is measured here.

Dims: R rows, S sequences.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shlex
import sys
from pathlib import Path

import torch
from torch import Tensor

from bench.pages import replace_in
from bench.workloads import NAMES, Case, build
from fastpref import SequenceLogps, __version__, linear_logps

RESULTS = Path(__file__).parent / "results" / "active_error.json"
OPEN = "<!-- table: python -m bench.active_error --into docs/numerics.md -->"
BETA = 0.1
TOLERANCES = tuple(2.0**-power for power in range(5, 12))


def gradients(case: Case, rows: Tensor, cu_rows: Tensor, **options) -> tuple[SequenceLogps, Tensor, Tensor]:
    """Gradients of hidden (scored rows only) and weight under the sigmoid DPO loss."""
    hidden_TH = case.hidden_SLH.flatten(0, 1).requires_grad_()
    weight_VH = case.weight_VH.detach().requires_grad_()
    labels_T = case.labels_SL.flatten()
    scores = linear_logps(hidden_TH, weight_VH, labels_T, rows=rows, cu_rows=cu_rows, **options)
    chosen_B, rejected_B = (scores.logps - case.ref_logps_S).chunk(2)
    loss = -torch.nn.functional.logsigmoid(BETA * (chosen_B - rejected_B)).mean()
    d_hidden_TH, d_weight_VH = torch.autograd.grad(loss, (hidden_TH, weight_VH))
    return scores, d_hidden_TH[rows], d_weight_VH


def first_rows(case: Case, share: float) -> tuple[Tensor, Tensor]:
    """Rows of the first part of every response, so that each sequence stays."""
    groups = [group[: max(int(len(group) * share), 1)] for group in case.rows_R.tensor_split(case.cu_rows[1:-1])]
    lengths = torch.tensor([0, *map(len, groups)], dtype=torch.int64)
    return torch.cat(groups), lengths.cumsum(0)


def relative(actual: Tensor, exact: Tensor) -> float:
    """Relative L2 error."""
    return float((actual - exact).norm() / exact.norm())


def measure(name: str, share: float) -> list[dict[str, float | int | str]]:
    """One line per tolerance."""
    case = build(name)
    rows, cu_rows = first_rows(case, share)
    _, d_x_RH, d_weight_VH = gradients(case, rows, cu_rows, backward="recompute")
    lines = []
    for active_eps in TOLERANCES:
        scores, found_x_RH, found_weight_VH = gradients(
            case, rows, cu_rows, backward="active", active_eps=active_eps, stats=("active_fraction", "cold_mass")
        )
        assert scores.active_fraction is not None and scores.cold_mass is not None
        lines.append(
            {
                "workload": name,
                "rows": len(rows),
                "active_eps": active_eps,
                "active_fraction": float(scores.active_fraction),
                "cold_mass": float(scores.cold_mass),
                "d_hidden_error": relative(found_x_RH, d_x_RH),
                "d_weight_error": relative(found_weight_VH, d_weight_VH),
            }
        )
        print(
            f"{name:14} R={len(rows):5} eps=2^{math.log2(active_eps):.0f} "
            f"active {lines[-1]['active_fraction']:6.1%}  cold mass {lines[-1]['cold_mass']:.1e}  "
            f"dX {lines[-1]['d_hidden_error']:.1e}  dW {lines[-1]['d_weight_error']:.1e}",
            flush=True,
        )
    return lines


def table(lines: list[dict]) -> str:
    """Markdown of the stored lines, every second tolerance."""
    rows = [
        f"| {line['workload']} | {line['rows']} | 2^{math.log2(line['active_eps']):.0f} "
        f"| {line['active_fraction']:.1%} | {line['cold_mass']:.1e} "
        f"| {line['d_hidden_error']:.1e} | {line['d_weight_error']:.1e} |"
        for line in lines
        if math.log2(line["active_eps"]) % 2 == 0
    ]
    header = "| model | rows | `active_eps` | active | `cold_mass` | error of rows | error of weight |"
    return "\n".join([header, "|---|---|---|---|---|---|---|", *rows])


def store(path: Path, name: str, lines: list[dict]) -> None:
    """Write the lines of a workload to a file; those of others stay in it, in the order of `NAMES`."""
    others = json.loads(path.read_text())["lines"] if path.exists() else []
    kept = [line for line in others if line["workload"] != name]
    row = {
        "benchmark": "active_error",
        "command": shlex.join(["python", "-m", "bench.active_error", *sys.argv[1:]]),
        "versions": {"fastpref": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "lines": sorted([*kept, *lines], key=lambda line: NAMES.index(line["workload"])),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(row, indent=2) + "\n")


def main() -> None:
    """Measure, print and write JSON; or write the table of what is stored."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 1.0], help="parts of each response")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--into", type=Path, help="measure nothing; put the stored table between the marks of this page"
    )
    options = parser.parse_args()
    if options.into is not None:
        replace_in(options.into, table(json.loads(options.out.read_text())["lines"]), OPEN)
        return
    for name in options.workloads:
        store(options.out, name, [line for share in options.shares for line in measure(name, share)])


if __name__ == "__main__":
    main()
