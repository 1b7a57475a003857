"""What one rank finds wrong, every rank raises: nobody waits for a rank that has given up."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

from fastpref.errors import CheckpointError, PeerError
from fastpref.trainer.ranks.meeting import meet
from fastpref.trainer.ranks.watch import is_peer_failure

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# The ranks exchange errors as text.
_ERRNO = re.compile(r"\[Errno (\d+)\]")

Answer = TypeVar("Answer")


def together(action: Callable[[], Answer], what: str, group: torch.distributed.ProcessGroup | None = None) -> Answer:
    """Run `action` on every rank and return its answer, if it worked on all of them.

    It may take any time on any rank: no collective waits for it, and a rank is given up only where it shows no life or
    stands still.

    Args:
        action: waits for other ranks only where all of them fail together.
        what: names the action in the message, as in "saving step 3".
        group: all ranks; the default group if None.

    Raises:
        OSError: a disk is full, on any rank; ENOSPC on all of them.
        CheckpointError: the action failed on some rank in another way; names the ranks.
        PeerError: a rank shows no life any more, or stands still.
        Exception: what else this rank's action raised; the other ranks raise a CheckpointError.
    """
    answer, failure, unexpected = None, "", None
    try:
        answer = action()
    except (OSError, CheckpointError) as error:
        failure = str(error)
    except Exception as error:
        if isinstance(error, PeerError) or (isinstance(error, RuntimeError) and is_peer_failure(error)):
            raise  # there is nobody to tell
        failure, unexpected = f"{type(error).__name__}: {error}", error
    failures = meet(failure, group, what)
    if unexpected is not None:
        raise unexpected
    if failures:
        _raise(failures, what)
    return answer  # type: ignore[return-value]


def from_rank_0(action: Callable[[], Answer], what: str, group: torch.distributed.ProcessGroup | None = None) -> Answer:
    """Return on every rank what `action` returns on rank 0; see `together` for the arguments and what it raises."""
    is_first = torch.distributed.get_rank() == 0
    answer = [together(lambda: action() if is_first else None, what, group)]
    torch.distributed.broadcast_object_list(answer, src=0, group=group)
    return answer[0]  # type: ignore[return-value]


def agree(problems: Sequence[str]) -> None:
    """Raise on every rank of the job what any rank found wrong with a file that all of them read.

    Raises:
        CheckpointError: some rank has problems; each is named once.
    """
    told = meet(json.dumps(list(problems)) if problems else "", what="reading the same files")
    found = dict.fromkeys(problem for text in told.values() for problem in json.loads(text))
    if found:
        raise CheckpointError("; ".join(found))


def _raise(failures: Mapping[int, str], what: str) -> None:
    by_text: dict[str, list[str]] = {}
    for rank, failure in failures.items():
        by_text.setdefault(failure, []).append(str(rank))
    told = "; ".join(f"rank {', '.join(ranks)}: {text}" for text, ranks in by_text.items())
    numbers = {int(number) for failure in failures.values() for number in _ERRNO.findall(failure)}
    if numbers & set(DISK_FULL):
        raise OSError(errno.ENOSPC, f"{what} failed ({told}): {os.strerror(errno.ENOSPC)}")
    raise CheckpointError(f"{what} failed: {told}")
