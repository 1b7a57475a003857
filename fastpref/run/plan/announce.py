"""What a run says of its phases while it works: plain lines on stderr, from rank 0 alone, each written at once."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastpref.run.config.arguments import LoopArguments

_INTERVAL_S = 10.0


def announce(args: LoopArguments, text: str) -> None:
    """Print a line about what happens now; `disable_progress` silences it, as it does the progress bar."""
    if not args.disable_progress and _is_rank_0():
        with contextlib.suppress(OSError, ValueError):  # a run outlives the terminal that it was started from
            print(text, file=sys.stderr, flush=True)


class Meter:
    """Says every ten seconds how far a pass is, and how long the rest will take.

    Args:
        args: whether anything is said.
        what: opens the line, as in "Scored".
        total: pairs of the pass.
    """

    def __init__(self, args: LoopArguments, what: str, total: int) -> None:
        self._args, self._what, self._total = args, what, total
        self._done = 0
        self._start = self._said = time.monotonic()

    def advance(self, pairs: int) -> None:
        """So many more pairs are done, over all ranks; fillers among the last ones may be counted."""
        self._done, now = min(self._total, self._done + pairs), time.monotonic()
        if now - self._said < _INTERVAL_S:
            return
        self._said = now
        rate = self._done / (now - self._start)
        announce(
            self._args,
            f"{self._what} {self._done:,} of {self._total:,} pairs, {rate:,.1f} pairs/s, "
            f"ETA {clock((self._total - self._done) / rate)}",
        )


def clock(seconds: float) -> str:
    """Format seconds as 1:02:03."""
    return str(timedelta(seconds=round(seconds)))


def _is_rank_0() -> bool:
    # What reads the records of a run imports this module, and needs no PyTorch.
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_initialized():
        return bool(distributed.get_rank() == 0)
    return os.environ.get("RANK", "0") == "0"
