"""Who did not answer: every rank leaves a sign of life in the group's store, and a rank that waited in vain reads them.

A collective that fails says neither which rank was missing nor what the job was doing. The signs cost one small write
to the store per phase of a step and no waiting. Under NCCL no collective raises: PyTorch's watchdog ends the process.
So a rank that stays in one phase for most of the timeout writes down where it is, and `fastpref diagnose` puts that
beside the dumps of PyTorch's flight recorder.
"""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from fastpref.deadline import answer_within
from fastpref.errors import FastprefError, PeerError
from fastpref.run.record.hang import named
from fastpref.trainer.ranks import traces

_KEY = "fastpref/sign-of-life/"
# The host of the store may be the rank that hangs.
_STORE_WAIT = timedelta(seconds=3)
_STORE_PATIENCE_S = 15.0
_NONE = "none"
_MAX_SIGNS = 8
_JOIN_S = 5.0
# What of the timeout a rank may spend in one phase before it writes down where it is.
_PATIENCE = 0.9
# Gloo's errors are plain RuntimeErrors; all of them begin with the place in its sources.
_GLOO_MARKS = ("gloo/transport", "gloo/rendezvous", "Connection closed by peer", "Connection reset by peer")


class PeerWatch:
    """Turns a failed collective into a `PeerError` while it is entered, and names rank and step in errors of a step.

    Args:
        report_dir: where a rank that got no answer writes its stack.
        timeout_s: of collectives; a rank that is in one phase for nine tenths of it writes down where.

    Attributes:
        step: the optimizer step at hand or last done, counted from 1; 0 before the first.
    """

    def __init__(self, report_dir: Path, timeout_s: float = 600.0) -> None:
        self._report_dir, self._patience_s = report_dir, _PATIENCE * timeout_s
        self._rank, self._size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.step, self._phase, self._since = 0, "starting", time.monotonic()
        self._left = threading.Event()
        self._main = threading.get_ident()
        self._observer = threading.Thread(target=self._observe, name="fastpref-observer", daemon=True)

    @contextmanager
    def phase(self, step: int, phase: str) -> Iterator[None]:
        """Inside, this rank is in `phase` of optimizer step `step`, counted from 1, as far as the others know."""
        self._sign(step, phase)
        yield

    def _sign(self, step: int, phase: str) -> None:
        self.step, self._phase, self._since = step, phase, time.monotonic()
        if self._size > 1:
            _store().set(f"{_KEY}{self._rank}", f"{time.time():.1f} step {step}, {phase}")

    def __enter__(self) -> PeerWatch:
        self._sign(0, "starting")
        if self._size > 1:
            self._observer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        if self._size > 1:
            self._observer.join(_JOIN_S)
        if isinstance(error, FastprefError) and not isinstance(error, PeerError):
            if self.step:
                error.add_note(f"on rank {self._rank} at step {self.step}, {self._phase}")
        elif isinstance(error, RuntimeError) and is_peer_failure(error):
            stack = "".join(traceback.format_exception(error))
            self._report_dir.mkdir(parents=True, exist_ok=True)
            report = self._report_dir / f"peer-failure-rank-{self._rank}.txt"
            report.write_text(stack, encoding="utf-8")
            traces.write_dump(self._report_dir)
            traces.write_state(self._report_dir, self._state(stack.splitlines()[:-1]))
            raise PeerError(
                f"rank {self._rank} got no answer at step {self.step}, {self._phase}, in {_collective(error)}: "
                f"{str(error).splitlines()[0]}. Last signs of life: {'; '.join(self._heard())}. Look at the log of "
                f"the rank that is behind or silent; where all only work slowly, raise distributed_timeout_seconds; "
                f"fastpref diagnose {self._report_dir} says more (stack: {report})"
            ) from error

    def _heard(self) -> list[str]:
        try:
            return answer_within(_STORE_PATIENCE_S, self._signs)
        except TimeoutError:
            return [f"unknown, as the job's store on {os.environ.get('MASTER_ADDR', 'rank 0')} does not answer"]

    def _signs(self) -> list[str]:
        """What the other ranks were doing last; those that did the same are named together."""
        store, now = _store(), time.time()
        ages: dict[str, dict[int, float]] = defaultdict(dict)
        for rank in (rank for rank in range(self._size) if rank != self._rank):
            try:
                # One that never came is waited for; the others that never came are not.
                if ages[_NONE]:
                    if not store.check([f"{_KEY}{rank}"]):
                        ages[_NONE][rank] = 0.0
                        continue
                else:
                    store.wait([f"{_KEY}{rank}"], _STORE_WAIT)
                when, what = store.get(f"{_KEY}{rank}").decode().split(" ", 1)
                ages[what][rank] = now - float(when)
            except torch.distributed.DistNetworkError:  # the store went with its host
                ages[_NONE][rank] = 0.0
                break
            except RuntimeError:
                ages[_NONE][rank] = 0.0
        kinds = sorted(
            (kind for kind in ages.items() if kind[1]), key=lambda kind: (kind[0] == _NONE, -max(kind[1].values()))
        )
        return [_sign_of(what, ranks) for what, ranks in kinds[:_MAX_SIGNS]]

    def _observe(self) -> None:
        """Writes down where this rank is while it stays in one phase, before a watchdog ends the process."""
        written: float | None = None
        while not self._left.wait(min(1.0, self._patience_s / 4)):
            since = self._since
            if written is not None and written != since:
                traces.remove_state(self._report_dir)
                written = None
            if written is None and time.monotonic() - since > self._patience_s:
                traces.write_state(self._report_dir, self._state(traces.stack_of(self._main)))
                written = since
        if written is not None:
            traces.remove_state(self._report_dir)

    def _state(self, stack: list[str]) -> dict[str, Any]:
        seconds = time.monotonic() - self._since
        return {"step": self.step, "phase": self._phase, "seconds": seconds, "stack": stack}


def _sign_of(what: str, ages: dict[int, float]) -> str:
    if what == _NONE:
        return f"{named(list(ages))}: none"
    youngest, oldest = f"{min(ages.values()):.0f}", f"{max(ages.values()):.0f}"
    return f"{named(list(ages))}: {what}, {youngest if youngest == oldest else f'{youngest} to {oldest}'} s ago"


def is_peer_failure(error: RuntimeError) -> bool:
    """Whether an error came out of a collective that another rank did not join."""
    return isinstance(error, torch.distributed.DistError) or any(mark in str(error) for mark in _GLOO_MARKS)


def _store() -> torch.distributed.Store:
    return torch.distributed.distributed_c10d._get_default_store()


def _collective(error: RuntimeError) -> str:
    """The function of torch.distributed that failed, and where it was called."""
    frames = traceback.extract_tb(error.__traceback__)
    callers = [frame for frame in frames if "/torch/" not in frame.filename]
    inner = [frame for frame in frames if "/torch/distributed/" in frame.filename and frame.name != "wrapper"]
    name = inner[0].name if inner else frames[-1].name
    return f"{name} (called at {Path(callers[-1].filename).name}:{callers[-1].lineno})" if callers else name
