"""Time and peak memory of a call on a GPU, or, in a dry run, on the CPU."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor

from bench.measure import extra_peak_mib as cpu_extra_peak_mib

FLUSH_BYTES = 2**28
"""More than any level-2 cache holds."""


def time_ms(run: Callable[[], object], device: torch.device) -> float:
    """Time one call, with nothing of its inputs left in the cache: between two events on a GPU."""
    if device.type == "cpu":
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    # Arithmetic on it, not a fill: memory that holds one value is faster to read.
    _flush_buffer(device).add_(1)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def extra_peak_mib(run: Callable[[], object], device: torch.device) -> float:
    """Return the highest memory during a call above what was there before, its results included."""
    if device.type == "cpu":
        return cpu_extra_peak_mib(run)[1]
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


@functools.cache
def _flush_buffer(device: torch.device) -> Tensor:
    return torch.randint(2**31 - 1, (FLUSH_BYTES // 4,), dtype=torch.int32, device=device)
