"""Part 1: what the device is, whether the kernels are right on it, and which tiles are fastest."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from bench.gpu import clock
from bench.measure import Row
from bench.workloads import ROOT
from fastpref.kernels import tuning

SANITIZED = "outside_the_vocabulary or odd_sizes"
"""Tests that run under compute-sanitizer: small, with labels and sizes that tempt a kernel to leave its tensors."""
TEST_LIMIT_S = 240
SANITIZER_LIMIT_S = 100
WORKERS = 6
"""Test processes at once, where pytest-xdist is there: most of their time goes into compiling."""
GEMM_SIZE, COPY_BYTES = 8192, 2**30
HIDDEN_SIZES = (4096, 2048)
"""What is tuned, most wanted first."""


def device_report(device: torch.device) -> Row:
    """Name, sizes and driver of the device; the rates of a large bf16 product and of a large copy."""
    row: Row = {"device": str(device)}
    size, copied = GEMM_SIZE, COPY_BYTES
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        row |= {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "l2_mib": round(properties.L2_cache_size / 2**20, 1),
            "cuda": torch.version.cuda,
            "nvidia_smi": _output(["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit", *_CSV]),
        }
    else:
        size, copied = 256, 2**20
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randint(2**31 - 1, (copied // 4,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    product_ms = _median_ms(lambda: a @ b, device)
    copy_ms = _median_ms(lambda: target.copy_(source), device)
    return row | {
        "gemm_tflops": float(f"{2 * size**3 / product_ms / 1e9:.3g}"),
        "copy_tb_per_s": float(f"{2 * copied / copy_ms / 1e9:.3g}"),
    }


def run_tests(out: Path, limit_s: float) -> Row:
    """Run `tests/gpu`: every kernel by the numeric rule on a grid, 250 repeats bit for bit, addresses, graphs."""
    command = tests_command(WORKERS, f"--junitxml={out / 'gpu-tests.xml'}")
    return run_logged(command, out / "gpu-tests.log", min(limit_s, TEST_LIMIT_S))


def tests_command(workers: int, *options: str) -> list[str]:
    """Return the command that runs `tests/gpu`, in so many processes where pytest-xdist and a GPU are there."""
    can_share = importlib.util.find_spec("xdist") is not None and torch.cuda.is_available()
    return [*_pytest(), "tests/gpu", *options, *(["-n", str(workers)] if can_share else [])]


def run_sanitizer(out: Path, limit_s: float, log: Path | None = None) -> Row:
    """Run some of the tests under compute-sanitizer's memcheck; to a log of its own unless one is given."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"status": "missing", "reason": "compute-sanitizer is not on the PATH; it comes with the CUDA toolkit"}
    command = [tool, "--tool=memcheck", "--error-exitcode=9", *_pytest(), "tests/gpu", "-k", SANITIZED]
    return run_logged(command, log or out / "compute-sanitizer.log", min(limit_s, SANITIZER_LIMIT_S))


def tune(out: Path, limit_s: float, hidden_sizes: tuple[int, ...] = HIDDEN_SIZES) -> Row:
    """Measure the tiles of the 16-bit kernels and write the table of the fastest to `tiles.json`."""
    if not torch.cuda.is_available():
        return {"status": "missing", "reason": "tuning measures on a GPU, and PyTorch sees none"}
    measured: dict[str, list[Row]] = {}

    def note(key: str, hidden_size: int, found: list[tuning.Measurement]) -> None:
        measured[f"{key} H={hidden_size}"] = [
            {"tile": vars(one.tile), "ms": one.milliseconds, "error": one.error} for one in found
        ]

    # The last H that is begun takes as long as those before it.
    table = tuning.tune(str(out / "tiles.json"), hidden_sizes, widths=(16,), seconds=limit_s / 3, report=note)
    return {"measured": measured, "table": {key: [vars(tile) for tile in tiles] for key, tiles in table.items()}}


def jobs(out: Path, device: torch.device, left: Callable[[], float]) -> dict[str, Callable[[], Row]]:
    """What this part measures, by name, in order."""
    return {
        "device": partial(device_report, device),
        "tests": lambda: run_tests(out, left()),
        "compute-sanitizer": lambda: run_sanitizer(out, left()),
        "tiles": lambda: tune(out, left()),
    }


_CSV = ("--format=csv,noheader",)


def _pytest() -> list[str]:
    # A line per test, so that a run that is cut short says how far it came.
    return [sys.executable, "-m", "pytest", "-vv", "-p", "no:cacheprovider", "-rs"]


def run_logged(command: list[str], log: Path, limit_s: float) -> Row:
    """Run a command whose output is added to a log as it comes; "wrong" where it fails, with its last line."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment.pop("TRITON_INTERPRET", None)
    with log.open("ab") as file:
        start = file.tell()
        code = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            # In the session of the part, which ends with all that is in it.
            code = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False, timeout=limit_s
            ).returncode
    output = log.read_bytes()[start:].decode(errors="replace")
    if code is None:
        counts = ", ".join(f"{len(re.findall(word, output))} {word}" for word in ("PASSED", "FAILED"))
        return {"status": "failed", "reason": f"not done within {limit_s:.0f} s; {counts} by then", "log": log.name}
    if code:
        return {"status": "wrong", "reason": f"code {code}: {_summary(output)}", "log": log.name}
    return {"summary": _summary(output), "log": log.name}


def _summary(output: str) -> str:
    """The last line that counts something, as "5 passed, 2 skipped in 3.1s"."""
    counted = [line for line in output.splitlines() if re.search(r"\d+ (passed|failed|skipped|error)", line)]
    return counted[-1].strip("= ") if counted else (output.strip().splitlines() or ["no output"])[-1]


def _output(command: list[str]) -> str:
    if shutil.which(command[0]) is None:
        return f"{command[0]} is not there"
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _median_ms(run: Callable[[], object], device: torch.device) -> float:
    times = sorted(clock.time_ms(run, device) for _ in range(8))
    return times[len(times) // 2]
