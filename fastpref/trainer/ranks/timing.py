"""Time that a device spends in one part of a step, without stopping it."""

from __future__ import annotations

import time

import torch

_Instant = float | torch.cuda.Event


class DeviceTimer:
    """Adds up spans between `start` and `stop`; on a GPU by events, so that neither call waits for the device."""

    def __init__(self) -> None:
        self._on_gpu = torch.cuda.is_available()
        self._start: _Instant | None = None
        self._spans: list[tuple[_Instant, _Instant]] = []

    def __deepcopy__(self, memo: dict[int, object]) -> DeviceTimer:
        """The timer of a copied model: it has measured nothing. A GPU's events cannot be copied."""
        return DeviceTimer()

    def __enter__(self) -> None:
        """Begins a span that ends with the block; one that an error cut is not counted."""
        self.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.stop()

    def start(self) -> None:
        """Begins a span; one that was begun and never stopped is forgotten."""
        self._start = self._now()

    def stop(self) -> None:
        """Ends the span; without one it does nothing."""
        if self._start is not None:
            self._spans.append((self._start, self._now()))
        self._start = None

    def read(self) -> float:
        """Seconds since the last `read`; on a GPU it waits for the last span."""
        spans, self._spans = self._spans, []
        return sum(_seconds_between(start, stop) for start, stop in spans)

    def _now(self) -> _Instant:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds_between(start: _Instant, stop: _Instant) -> float:
    if isinstance(start, float) and isinstance(stop, float):
        return stop - start
    assert isinstance(start, torch.cuda.Event) and isinstance(stop, torch.cuda.Event)
    stop.synchronize()
    return start.elapsed_time(stop) / 1000.0
