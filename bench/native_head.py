"""Rate of the native CPU passes beside the bare product `x @ weight.T`, chunk by chunk, on the same threads.

    python -m bench.native_head                                  Gemma-3-270m's head, fp32 and bf16, 1 and 2 threads
    python -m bench.native_head --hidden 576 --vocab 49152       SmolLM2-135M's

The passes take turns in one process; the table and bench/results/native_head.json have medians. GFLOP/s count the
2 R H V of the product alone, so that a pass that does more than the product in the same time has the same rate. The
bare product is PyTorch's, into one chunk of 2048 columns that stays in the cache, a 16-bit chunk widened to fp32 first;
it reduces nothing, hence a pass that is faster leaves PyTorch operators no way to be. Before anything is timed, both
passes are checked by the numeric rule on a sample of the rows.

Dims: R rows, H hidden, V vocabulary; lower case: one chunk.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from bench.measure import surroundings
from fastpref.kernels import native
from fastpref.kernels.engine import Head, RowScalars
from fastpref.kernels.outputs import STATISTICS, fields_of
from fastpref.kernels.partials import RowResults, finish_rows
from fastpref.testing.numerics import assert_within_rule

RESULTS = Path(__file__).parent / "results" / "native_head.json"
COLUMNS, SAMPLE = 2048, 16


class Case:
    """One head and its rows, and the passes over them."""

    def __init__(self, num_rows: int, hidden_size: int, vocab_size: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x_RH = torch.randn(num_rows, hidden_size, generator=generator).to(dtype)
        weight_VH = torch.randn(vocab_size, hidden_size, generator=generator).mul_(3.0 / hidden_size**0.5).to(dtype)
        self.head = Head(weight_VH, None, 1.0, None)
        self.labels_R = torch.randint(0, vocab_size, (num_rows,), generator=generator, dtype=torch.int64)
        self.bound_R = torch.full((num_rows,), 10.0, dtype=torch.float32)
        self.wide_RH = self.x_RH.float()
        self.buffer = torch.empty(num_rows * COLUMNS, dtype=torch.float32)
        self.scalars: RowScalars | None = None

    def chunks(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield (first column, weight [v, H] in fp32, buffer [R, v])."""
        for start in range(0, self.head.weight_VH.shape[0], COLUMNS):
            weight_vH = self.head.weight_VH[start : start + COLUMNS].float()
            size = self.x_RH.shape[0] * weight_vH.shape[0]
            yield start, weight_vH, self.buffer[:size].view(self.x_RH.shape[0], -1)

    def product(self) -> None:
        """The bare product."""
        for _, weight_vH, out_Rv in self.chunks():
            torch.mm(self.wide_RH, weight_vH.t(), out=out_Rv)

    def forward(self, with_mass: bool = False, stats: tuple[str, ...] = ()) -> RowResults:
        """The forward pass."""
        bound_R = self.bound_R if with_mass else None
        options = {"fields": fields_of(stats), "bound_R": bound_R, "with_cache": False}
        forward = native.forward_rows(self.x_RH, self.head, self.labels_R, **options)
        return finish_rows(forward.partials, torch.float32, stats)

    def gradient(self) -> None:
        """The gradient of the logits, a chunk at a time, of all rows at once."""
        assert self.scalars is not None
        for start, weight_vH, out_Rv in self.chunks():
            head = self.head._replace(weight_VH=weight_vH)
            native.logit_gradient(self.wide_RH, head, self.labels_R - start, self.scalars, out_Rv, None)

    def check(self) -> None:
        """Compare a sample of rows, and their gradient in the last chunk, with fp64; prepare the gradient."""
        results = self.forward()
        self.scalars = RowScalars(torch.ones_like(results.row_sum), results.row_max, results.row_sum)
        *_, (start, weight_vH, out_Rv) = self.chunks()
        logps, gradients = [], []
        for dtype in (torch.float32, torch.float64):
            weight_VH = self.head.weight_VH.to(dtype)
            logps_rV = torch.log_softmax(self.x_RH[:SAMPLE].to(dtype) @ weight_VH.t(), dim=1)
            logps.append(logps_rV.gather(1, self.labels_R[:SAMPLE, None]).squeeze(1))
            onehot_rV = torch.zeros_like(logps_rV).scatter_(1, self.labels_R[:SAMPLE, None], 1.0)
            gradients.append((onehot_rV - logps_rV.exp())[:, start:])
        native.logit_gradient(
            self.wide_RH, self.head._replace(weight_VH=weight_vH), self.labels_R - start, self.scalars, out_Rv, None
        )
        assert_within_rule(results.token_logps[:SAMPLE], logps[0], logps[1])
        assert_within_rule(out_Rv[:SAMPLE], gradients[0], gradients[1], kind="gradient")


def time_in_turns(passes: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Return the wall times of each pass; the first turn does not count."""
    times: dict[str, list[float]] = {name: [] for name in passes}
    for turn in range(repeats + 1):
        for name, run in passes.items():
            start = time.perf_counter()
            run()
            if turn:
                times[name].append(round(time.perf_counter() - start, 4))
    return times


def main() -> None:
    """Time every dtype and thread count, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1653)
    parser.add_argument("--hidden", type=int, default=640)
    parser.add_argument("--vocab", type=int, default=262144)
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    reason = native.unavailable_reason()
    if reason is not None:
        raise SystemExit(f"the native engine cannot be timed: {reason}")
    shape = {"rows": args.rows, "hidden": args.hidden, "vocab": args.vocab}
    gflop = 2e-9 * args.rows * args.hidden * args.vocab
    rows = json.loads(args.out.read_text()) if args.out.exists() else []
    for dtype in args.dtypes:
        case = Case(args.rows, args.hidden, args.vocab, getattr(torch, dtype))
        case.check()
        for threads in args.threads:
            torch.set_num_threads(threads)
            passes = {
                "product": case.product,
                "forward": case.forward,
                "forward, masses": lambda case=case: case.forward(with_mass=True),
                "forward, masses, statistics": lambda case=case: case.forward(with_mass=True, stats=tuple(STATISTICS)),
                "logit gradient": case.gradient,
            }
            times = time_in_turns(passes, args.repeats)
            key = {"shape": shape, "dtype": dtype, "threads": threads}
            rows = [row for row in rows if {name: row[name] for name in key} != key]
            command = shlex.join(["python", "-m", "bench.native_head", *sys.argv[1:]])
            load = round(os.getloadavg()[0], 1)
            rows.append({**key, "command": command, "wall_s": times, "load_average": load, **surroundings()})
            print(f"{dtype}, {threads} threads, R={args.rows} H={args.hidden} V={args.vocab}, load {load}")
            for name, walls in times.items():
                median = statistics.median(walls)
                print(
                    f"  {name:28} {median:7.3f} s  {gflop / median:6.1f} GFLOP/s  (fastest {gflop / min(walls):6.1f})"
                )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
