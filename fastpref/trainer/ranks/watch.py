"""Who did not answer: every rank leaves a sign of life in the group's store, and a rank that waited in vain reads them.

A collective that fails says neither which rank was missing nor what the job was doing. The signs cost one small write
to the store per phase of a step and no waiting.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import TracebackType

import torch

from fastpref.errors import FastprefError, PeerError

_KEY = "fastpref/sign-of-life/"
# The host of the store may be the rank that hangs.
_STORE_WAIT = timedelta(seconds=3)
# Gloo's errors are plain RuntimeErrors; all of them begin with the place in its sources.
_GLOO_MARKS = ("gloo/transport", "gloo/rendezvous", "Connection closed by peer", "Connection reset by peer")


class PeerWatch:
    """Turns a failed collective into a `PeerError` while it is entered, and names rank and step in errors of a step.

    Args:
        report_dir: where a rank that got no answer writes its stack.

    Attributes:
        step: the optimizer step at hand or last done, counted from 1; 0 before the first.
    """

    def __init__(self, report_dir: Path) -> None:
        self._report_dir = report_dir
        self._rank, self._size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.step, self._phase = 0, "starting"

    @contextmanager
    def phase(self, step: int, phase: str) -> Iterator[None]:
        """Inside, this rank is in `phase` of optimizer step `step`, counted from 1, as far as the others know."""
        self._sign(step, phase)
        yield

    def _sign(self, step: int, phase: str) -> None:
        self.step, self._phase = step, phase
        if self._size > 1:
            _store().set(f"{_KEY}{self._rank}", f"{time.time():.1f} step {step}, {phase}")

    def __enter__(self) -> PeerWatch:
        self._sign(0, "starting")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, FastprefError) and not isinstance(error, PeerError):
            if self.step:
                error.add_note(f"on rank {self._rank} at step {self.step}, {self._phase}")
        elif isinstance(error, RuntimeError) and is_peer_failure(error):
            stack = "".join(traceback.format_exception(error))
            self._report_dir.mkdir(parents=True, exist_ok=True)
            report = self._report_dir / f"peer-failure-rank-{self._rank}.txt"
            report.write_text(stack, encoding="utf-8")
            raise PeerError(
                f"rank {self._rank} got no answer at step {self.step}, {self._phase}, in {_collective(error)}: "
                f"{str(error).splitlines()[0]}. Last signs of life: {'; '.join(self._signs())}. Look at the log of "
                f"the rank that is behind or silent; where all only work slowly, raise distributed_timeout_seconds "
                f"(stack: {report})"
            ) from error

    def _signs(self) -> list[str]:
        store, now, signs = _store(), time.time(), []
        for rank in (rank for rank in range(self._size) if rank != self._rank):
            try:
                store.wait([f"{_KEY}{rank}"], _STORE_WAIT)
                when, what = store.get(f"{_KEY}{rank}").decode().split(" ", 1)
                signs.append(f"rank {rank}: {what}, {now - float(when):.0f} s ago")
            except RuntimeError:  # the store went with its host
                signs.append(f"rank {rank}: none")
                break
        return signs


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
