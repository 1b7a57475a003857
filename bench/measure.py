"""Correctness, peak memory and time of one implementation; each in a process of its own.

Dims: see `workloads`.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench import activity
from bench.implementations import BARE, IMPLEMENTATIONS, bare_product
from bench.oracle import errors, token_errors, token_truth, truth
from bench.registry import PASSES, call
from bench.workloads import ROOT, Case, build
from fastpref.errors import MissingDependencyError
from fastpref.kernels import native

PACKAGES = ("fastpref", "torch", "megatron-core", "liger_kernel", "cut_cross_entropy", "trl", "transformers", "triton")
Row = dict[str, Any]
GEMM_SIZE, COPY_BYTES = 2048, 2**29


def check(workload: str, name: str, kind: str = "head") -> Row:
    """Run one pass: errors against the oracle, and the highest resident memory above what was there before.

    Args:
        workload: a name of `workloads.build`.
        name: of `IMPLEMENTATIONS`.
        kind: of the pass, a key of `PASSES`.
    """
    implementation, case, run = IMPLEMENTATIONS[name], build(workload), PASSES[kind]
    warm_up = case if implementation.is_compiled else case.tiny()
    run(implementation, warm_up, warm_up.hidden_SLH, warm_up.weight_VH)
    given = implementation.given(case, case.weight_VH)
    result, peak_mib = extra_peak_mib(lambda: run(implementation, given, case.hidden_SLH, case.weight_VH))
    expected = truth(case)
    properties = case.shape | {"active_fraction": round(float(expected["active_fraction"]), 4)}
    row: Row = {"shape": properties, "dtype": str(case.weight_VH.dtype).removeprefix("torch.")}
    row |= {"activity": activity.compare(case), "errors": errors(result, expected)}
    if kind == "score" or implementation.is_screened:
        row["errors"] |= token_errors(implementation, given, token_truth(case))
    if implementation.is_screened:
        row["screened"] = activity.screened(given)
    if given.screened is not None:
        row["shared_mib"] = round(given.screened.num_bytes / 2**20, 1)
    peak = {"extra_peak_mib": round(peak_mib, 1), "threads": torch.get_num_threads()}
    return row | {"engine": native.unavailable_reason() or "native"} | peak


def time_in_turns(workload: str, names: list[str], repeats: int, kind: str = "head") -> Row:
    """Time implementations and the bare product by turns, after one pass of each, on inputs that are new every time.

    Args:
        workload: a name of `workloads.build`.
        names: of `IMPLEMENTATIONS`.
        repeats: turns that count.
        kind: of the pass, a key of `PASSES`.
    """
    case = build(workload)
    passes: dict[str, Callable[..., object]] = {name: partial(PASSES[kind], IMPLEMENTATIONS[name]) for name in names}
    passes[BARE] = bare_product
    generator = torch.Generator().manual_seed(4)
    times: dict[str, dict[str, list[float]]] = {name: {"wall_s": [], "cpu_s": []} for name in passes}
    load_before = os.getloadavg()[0]
    for turn in range(repeats + 1):
        hidden_SLH = fresh_hidden(case, generator)
        for name, run in passes.items():
            with torch.no_grad():
                case.weight_VH.mul_(1.0 + (-1) ** turn * 2.0**-16)  # another tensor version; in fp32 other bits
            given = case if name == BARE else IMPLEMENTATIONS[name].given(case, case.weight_VH)
            return_memory()
            wall, cpu = time.perf_counter(), time.process_time()
            run(given, hidden_SLH, case.weight_VH)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if turn:
                times[name]["wall_s"].append(round(wall, 4))
                times[name]["cpu_s"].append(round(cpu, 4))
    loads = [round(load, 1) for load in (load_before, os.getloadavg()[0])]
    return {"times": times, "load_average": loads}


def fresh_hidden(case: Case, generator: torch.Generator) -> Tensor:
    """Hidden states [S, L, H] with new noise of a thousandth of their deviation; padding stays zero."""
    scale, dtype = 1e-3 * float(case.hidden_SLH.float().std()), case.hidden_SLH.dtype
    noise_SLH = torch.randn(case.hidden_SLH.shape, generator=generator, dtype=torch.float32) * scale
    return torch.where((case.hidden_SLH != 0).any(-1, keepdim=True), case.hidden_SLH + noise_SLH, 0.0).to(dtype)


def gemm_rate(repeats: int) -> Row:
    """Rate of a bare square product in fp32, GFLOP/s: the machine at that minute."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    left, right, product = (torch.randn(GEMM_SIZE, GEMM_SIZE, dtype=torch.float32, device=device) for _ in range(3))
    seconds = _seconds(lambda: torch.mm(left, right, out=product), device, repeats)
    return {"gflops": round(2 * GEMM_SIZE**3 / seconds / 1e9, 1)}


def ceilings(repeats: int) -> Row:
    """Rates of a product and of a copy on the CPU: GFLOP/s, and GB/s read and written together."""
    source = torch.ones(COPY_BYTES // 4, dtype=torch.float32)
    target = torch.empty(COPY_BYTES // 4, dtype=torch.float32)
    seconds = _seconds(lambda: target.copy_(source), "cpu", repeats)
    return gemm_rate(repeats) | {"copy_gb_per_s": round(2 * COPY_BYTES / seconds / 1e9, 1)}


def _seconds(run: Callable[[], object], device: str, repeats: int) -> float:
    """Median of some calls after one."""
    taken = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return median(taken[1:])


def probe(name: str) -> str | None:
    """Say why an implementation cannot run here, or None."""
    implementation = IMPLEMENTATIONS[name]
    missing = implementation.unavailable(torch.device("cpu"))
    if missing is None and implementation.is_ours:
        case = build("dry").tiny()
        try:
            call(implementation, case, case.hidden_SLH, case.weight_VH)
        except (NotImplementedError, MissingDependencyError) as error:
            return f"not part of this build: {error}"
    return missing


def in_child(function: Callable[..., Row], *arguments: Any) -> Row:
    """Call a worker of `python -m bench` in a new Python process.

    Raises:
        RuntimeError: the process failed; with the last line it wrote.
    """
    command = [sys.executable, "-m", "bench", "worker", function.__name__, json.dumps(arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"killed by signal {-done.returncode}"])[-1]
        raise RuntimeError(last)
    return json.loads(done.stdout.splitlines()[-1])


def surroundings(packages: Sequence[str] = PACKAGES) -> Row:
    """Machine, versions and commit: what a reader needs to judge a number."""
    cpu = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    installed = {}
    for package in packages:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "machine": {
            "cpu": cpu[0] if cpu else platform.machine(),
            "cores": os.cpu_count(),
            "memory_gib": round(memory_gib, 1),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        },
        "versions": {"python": platform.python_version(), **installed},
        "commit": _git("rev-parse", "--short=10", "HEAD") + ("+" if _git("status", "--porcelain", "fastpref") else ""),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
    }


def _git(*arguments: str) -> str:
    if shutil.which("git") is None:
        return ""
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def extra_peak_mib(run: Callable[[], Any]) -> tuple[Any, float]:
    """Call a function; its result, and the highest resident memory above what was there before."""
    return_memory()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before_mib = status_mib("VmRSS")
    result = run()
    return result, status_mib("VmHWM") - before_mib


def return_memory() -> None:
    """Free what earlier passes left, so that every pass pays for its own pages."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def status_mib(field: str) -> float:
    """Return a size of this process, as VmRSS or VmHWM, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}; this benchmark needs Linux")
