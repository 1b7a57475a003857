"""Peak memory and time of the head, forward and backward on a CPU: `linear_logps` beside naive PyTorch.

    python bench/head_memory.py                                   the size of Gemma-3-270m, about 6 minutes on two cores
    python bench/head_memory.py --rows 256 --vocab 32768          smaller

Each implementation runs in a process of its own, on the same labelled rows. Peak memory is the kernel's own high-water
mark (VmHWM, reset after the inputs exist) minus the resident memory before the first pass. The result is checked by the
numeric rule against fp64 first, with naive PyTorch as yardstick; if it is wrong, nothing is printed or written.

Dims: R rows, H hidden, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from fastpref import __version__, linear_logps
from fastpref.testing.numerics import assert_within_rule

IMPLEMENTATIONS = ("torch", "reference")
NUM_SEQUENCES = 8
SLACK_MIB = 256
RESULTS = Path(__file__).parent / "results" / "head_memory.json"
ORACLE_ROWS = 64


def make_inputs(args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Draw hidden [R, H], weight [V, H] and labels [R], the same in every process."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, args.dtype)
    hidden_RH = torch.randn(args.rows, args.hidden, generator=generator).to(dtype)
    weight_VH = (torch.randn(args.vocab, args.hidden, generator=generator) * (3.0 / args.hidden**0.5)).to(dtype)
    return hidden_RH, weight_VH, torch.randint(0, args.vocab, (args.rows,), generator=generator)


def one_pass(hidden_RH: Tensor, weight_VH: Tensor, labels_R: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Score equal sequences and differentiate; the upstream gradients differ between sequences, as a loss's do."""
    num_rows = labels_R.shape[0]
    cu_rows = torch.linspace(0, num_rows, NUM_SEQUENCES + 1).long()
    rows = torch.arange(num_rows)
    logps = linear_logps(hidden_RH, weight_VH, labels_R, rows=rows, cu_rows=cu_rows, backend=backend).logps
    upstream = torch.linspace(-1.0, 1.0, NUM_SEQUENCES, dtype=logps.dtype) + 0.05
    d_hidden_RH, d_weight_VH = torch.autograd.grad((logps * upstream).sum(), (hidden_RH, weight_VH))
    return logps.detach(), d_hidden_RH, d_weight_VH


def status_mib(field: str) -> float:
    """One memory field of this process in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"/proc/self/status has no {field}; this benchmark needs Linux")


def measure(args: argparse.Namespace) -> None:
    """Run one implementation in this process; write results for the gate and print the measurement."""
    hidden_RH, weight_VH, labels_R = make_inputs(args)
    hidden_RH.requires_grad_()
    weight_VH.requires_grad_()
    one_pass(hidden_RH[:16], weight_VH[:64], labels_R[:16] % 64, args.measure)  # threads and BLAS buffers exist
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before_mib = status_mib("VmRSS")
    logps, d_hidden_RH, d_weight_VH = one_pass(hidden_RH, weight_VH, labels_R, args.measure)
    peak_mib = status_mib("VmHWM")
    torch.save({"logps": logps, "d_hidden": d_hidden_RH, "d_weight": d_weight_VH}, args.keep)
    del logps, d_hidden_RH, d_weight_VH
    wall_s, cpu_s = [], []
    for _ in range(args.repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        one_pass(hidden_RH, weight_VH, labels_R, args.measure)
        wall_s.append(time.perf_counter() - wall)
        cpu_s.append(time.process_time() - cpu)
    fastest = {"wall_s": round(min(wall_s), 3), "cpu_s": round(min(cpu_s), 3)}
    print(json.dumps({"extra_peak_mib": round(peak_mib - before_mib, 1), **fastest}))


def oracle(args: argparse.Namespace) -> dict[str, Tensor]:
    """The reference in fp64, a few rows at a time, so that it fits."""
    hidden_RH, weight_VH, labels_R = make_inputs(args)
    hidden_RH, weight_VH = hidden_RH.double(), weight_VH.double().requires_grad_()
    cu_rows = torch.linspace(0, args.rows, NUM_SEQUENCES + 1).long()
    upstream = torch.linspace(-1.0, 1.0, NUM_SEQUENCES, dtype=torch.float64) + 0.05
    logps_R, d_hidden_RH = torch.empty(args.rows, dtype=torch.float64), torch.empty_like(hidden_RH)
    for start in range(0, args.rows, ORACLE_ROWS):
        block = slice(start, min(start + ORACLE_ROWS, args.rows))
        x_RH = hidden_RH[block].requires_grad_()
        logps_RV = torch.log_softmax(x_RH @ weight_VH.t(), dim=1)
        picked_R = logps_RV.gather(1, labels_R[block, None]).squeeze(1)
        sequence_R = torch.searchsorted(cu_rows, torch.arange(block.start, block.stop), right=True) - 1
        (picked_R * upstream[sequence_R]).sum().backward()
        logps_R[block], d_hidden_RH[block] = picked_R.detach(), x_RH.grad
    sums = torch.stack([part.sum() for part in logps_R.tensor_split(cu_rows[1:-1])])
    assert weight_VH.grad is not None
    return {"logps": sums, "d_hidden": d_hidden_RH, "d_weight": weight_VH.grad}


def gate(args: argparse.Namespace, kept: dict[str, Path]) -> None:
    """Refuse to go on unless the tiled result is right, by the rule with naive PyTorch as yardstick."""
    truth = oracle(args)
    tiled, naive = (torch.load(kept[name], mmap=True, weights_only=True) for name in IMPLEMENTATIONS)
    for name, expected in truth.items():
        kind = "output" if name == "logps" else "gradient"
        try:
            assert_within_rule(tiled[name], naive[name], expected, kind=kind)
        except AssertionError as error:
            raise SystemExit(f"no numbers: {name} of linear_logps is wrong: {error}") from None


def machine() -> dict[str, str | int | float]:
    """What a reader needs to judge the numbers."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count() or 0,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load_average": round(os.getloadavg()[0], 1),
    }


def main() -> None:
    """Measure both implementations, check them, print a table and write the JSON row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=262144)
    parser.add_argument("--hidden", type=int, default=640)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=2, help="timed passes; the fastest counts")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--measure", choices=IMPLEMENTATIONS, help=argparse.SUPPRESS)
    parser.add_argument("--keep", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args)
        return
    measured = {}
    with tempfile.TemporaryDirectory() as directory:
        kept = {name: Path(directory) / name for name in IMPLEMENTATIONS}
        for name in IMPLEMENTATIONS:
            command = [sys.executable, __file__, *sys.argv[1:], "--measure", name, "--keep", str(kept[name])]
            measured[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        gate(args, kept)
    gradient_mib = args.vocab * args.hidden * getattr(torch, args.dtype).itemsize / 2**20
    budget_mib = gradient_mib + SLACK_MIB
    row = {
        "benchmark": "head_memory",
        "command": shlex.join(["python", "bench/head_memory.py", *sys.argv[1:]]),
        "shape": {"rows": args.rows, "vocab": args.vocab, "hidden": args.hidden, "dtype": args.dtype},
        "machine": machine() | {"threads": torch.get_num_threads()},
        "versions": {"fastpref": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "weight_gradient_mib": round(gradient_mib, 1),
        "budget_mib": round(budget_mib, 1),
        "linear_logps": measured["torch"],
        "naive_torch": measured["reference"],
    }
    for name in ("linear_logps", "naive_torch"):
        peak_mib, wall_s, cpu_s = (row[name][field] for field in ("extra_peak_mib", "wall_s", "cpu_s"))
        print(f"{name:14} peak +{peak_mib:7.0f} MiB  wall {wall_s:6.2f} s  cpu {cpu_s:6.2f} s")
    print(f"budget         peak +{budget_mib:7.0f} MiB  (weight gradient {gradient_mib:.0f} + {SLACK_MIB})")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows = json.loads(args.out.read_text()) if args.out.exists() else []
    rows = [
        old for old in rows if (old["shape"], old["machine"]["threads"]) != (row["shape"], row["machine"]["threads"])
    ]
    args.out.write_text(json.dumps([*rows, row], indent=2) + "\n")
    if measured["torch"]["extra_peak_mib"] > budget_mib:
        raise SystemExit("linear_logps exceeds its memory budget")


if __name__ == "__main__":
    main()
