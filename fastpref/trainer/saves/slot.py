"""The saves of a training loop: begun when they are due, finished beside the steps that follow, one at a time."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from fastpref.errors import NonFiniteError
from fastpref.trainer.saves.save import Save
from fastpref.trainer.step.schedule import Signals


class Checkpoints:
    """Holds the save that is under way, if one is; leaving the block finishes it.

    After an error that every rank raises (`NonFiniteError`) it is finished too: what it holds is good. After any other
    the ranks may not all be there to agree, so it is abandoned, and the checkpoint before it is the newest.

    Args:
        begin: starts a save after some step; `copies` says that training goes on before it is finished.
    """

    def __init__(self, begin: Callable[..., Save]) -> None:
        self._begin = begin
        self._save: Save | None = None

    def signals(self, stop: bool) -> Signals:
        """What this rank has to tell at the end of a step, beside whether it was asked to `stop`."""
        if self._save is None:
            return Signals(stop=stop)
        return Signals(stop=stop, is_saving=self._save.is_running)

    def after_step(self, heard: Signals) -> None:
        """Ends the save if no rank is at it any more; `heard` is the same on every rank.

        Raises:
            OSError, CheckpointError: as `Save.finish`.
        """
        if not heard.is_saving:
            self.finish()

    def save(self, step: int, *, wait: bool) -> None:
        """Saves after `step`; a save that is under way is finished before.

        Args:
            step: optimizer steps done.
            wait: return when the checkpoint is there, not when it is begun.
        """
        self.finish()
        self._save = self._begin(step, copies=not wait)
        if wait:
            self.finish()

    def finish(self) -> None:
        """Waits for the save that is under way; every rank calls it, and it raises what `Save.finish` raises."""
        save, self._save = self._save, None
        if save is not None:
            save.finish()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, NonFiniteError):
            self.finish()
        elif self._save is not None:
            self._save.abandon()
