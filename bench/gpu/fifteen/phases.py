"""Where the time of a pass goes on the device: kernels by phase, launches, and waits of the host."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from bench.gpu import clock
from bench.gpu.folder import is_broken
from bench.measure import Row

PHASES = (
    ("forward kernel", r"linear_logps_fwd|gluon"),
    ("screening kernel", r"_screen_kernel"),
    ("turning rows into int8", r"_quantise_kernel"),
    ("merge and sum of parts", r"_merge_|_sum_parts"),
    ("gradient of the logits", r"logit_gradient|cached_gradient"),
    ("products", r"gemm|gemv|nvjet|cutlass|cublas|xmma|splitK"),
    ("sort and scan", r"sort|radix|scan|cumsum|topk|DeviceSelect|unique"),
    ("gather and scatter", r"index|gather|scatter|take"),
    ("reductions", r"reduce"),
    ("copies and fills", r"memcpy|memset|copy|fill"),
)
"""(phase, pattern of its kernels' names); the first that fits is taken."""
OTHER = "the rest"
LAUNCH = re.compile(r"^cu(da)?Launch(Cooperative)?Kernel")
WAIT = re.compile(r"^cu(da)?(Stream|Device|Event|Ctx)Synchronize$|^cudaMemcpy$")


class Event(NamedTuple):
    """What a profiler has counted under one name.

    Attributes:
        name: of a kernel, or of a call of the CUDA runtime.
        is_kernel: it ran on the device.
        microseconds: on the device, together.
        count: how often.
    """

    name: str
    is_kernel: bool
    microseconds: float
    count: int


def profile(run: Callable[[], object], device: torch.device) -> Row:
    """Return where the time of one call goes; `reason` in its place where nothing can be profiled here."""
    if device.type != "cuda":
        return {"reason": "no profile: a CPU has no kernels to tell apart"}
    try:
        taken_ms = clock.time_ms(run, device)
        events = profiled(run, [ProfilerActivity.CPU, ProfilerActivity.CUDA])
    except (RuntimeError, AttributeError, ImportError) as error:
        if is_broken(error):
            raise
        return {"reason": f"no profile: {type(error).__name__}: {error}".splitlines()[0]}
    if not any(event.is_kernel for event in events):
        return {"reason": "no profile: the profiler has seen no kernel; CUPTI may be missing or not permitted"}
    return by_phase(events) | {"taken_ms": round(taken_ms, 3)}


def profiled(run: Callable[[], object], activities: Sequence[ProfilerActivity]) -> list[Event]:
    """Return what PyTorch's profiler counts in one call."""
    with torch.profiler.profile(activities=activities) as profiler:
        run()
        if ProfilerActivity.CUDA in activities:
            torch.cuda.synchronize()
    return [
        Event(each.key, each.device_type != DeviceType.CPU, float(each.self_device_time_total), int(each.count))
        for each in profiler.key_averages()
    ]


def by_phase(events: Iterable[Event]) -> Row:
    """Add up kernels by phase, in ms and launches; and the host's launches and waits."""
    events = list(events)
    found: dict[str, Row] = {}
    for event in events:
        if not event.is_kernel:
            continue
        phase = next((name for name, pattern in PHASES if re.search(pattern, event.name, re.IGNORECASE)), OTHER)
        row = found.setdefault(phase, {"ms": 0.0, "kernels": 0})
        row["ms"] = round(row["ms"] + event.microseconds / 1e3, 4)
        row["kernels"] += event.count
    calls = [event for event in events if not event.is_kernel]
    return {
        "phases": dict(sorted(found.items(), key=lambda item: -item[1]["ms"])),
        "kernels_ms": round(sum(row["ms"] for row in found.values()), 4),
        "launches": sum(event.count for event in calls if LAUNCH.match(event.name)),
        "waits": sum(event.count for event in calls if WAIT.match(event.name)),
    }
