"""What one rank finds wrong, every rank raises: nobody waits for a rank that has given up."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from fastpref.errors import CheckpointError
from fastpref.trainer.ranks.watch import is_peer_failure

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# The ranks exchange errors as text.
_ERRNO = re.compile(r"\[Errno (\d+)\]")

Answer = TypeVar("Answer")
Told = TypeVar("Told")


def together(action: Callable[[], Answer], what: str, group: torch.distributed.ProcessGroup | None = None) -> Answer:
    """Run `action` on every rank and return its answer, if it worked on all of them.

    Args:
        action: waits for other ranks only where all of them fail together.
        what: names the action in the message, as in "saving step 3".
        group: all ranks; the default group if None.

    Raises:
        OSError: a disk is full, on any rank; ENOSPC on all of them.
        CheckpointError: the action failed on some rank in another way; names the ranks.
        Exception: what else this rank's action raised; the other ranks raise a CheckpointError.
    """
    answer, failure, unexpected = None, "", None
    try:
        answer = action()
    except (OSError, CheckpointError) as error:
        failure = str(error)
    except Exception as error:
        if isinstance(error, RuntimeError) and is_peer_failure(error):
            raise  # there is nobody to tell
        failure, unexpected = f"{type(error).__name__}: {error}", error
    failures = _told_to_all(failure, group)
    if unexpected is not None:
        raise unexpected
    if any(failures):
        _raise(failures, what)
    return answer  # type: ignore[return-value]


def from_rank_0(action: Callable[[], Answer], what: str) -> Answer:
    """Return on every rank what `action` returns on rank 0; see `together` for what it raises."""
    is_first = torch.distributed.get_rank() == 0
    answer = [together(lambda: action() if is_first else None, what)]
    torch.distributed.broadcast_object_list(answer, src=0)
    return answer[0]  # type: ignore[return-value]


def agree(problems: Sequence[str]) -> None:
    """Raise on every rank of the job what any rank found wrong with a file that all of them read.

    Raises:
        CheckpointError: some rank has problems; each is named once.
    """
    found = dict.fromkeys(problem for rank in _told_to_all(list(problems)) for problem in rank)
    if found:
        raise CheckpointError("; ".join(found))


def _told_to_all(mine: Told, group: torch.distributed.ProcessGroup | None = None) -> list[Told]:
    """What every rank has to say, by rank."""
    told: list[Told] = [mine] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(told, mine, group=group)
    return told


def _raise(failures: list[str], what: str) -> None:
    by_text: dict[str, list[str]] = {}
    for rank, failure in enumerate(failures):
        if failure:
            by_text.setdefault(failure, []).append(str(rank))
    told = "; ".join(f"rank {', '.join(ranks)}: {text}" for text, ranks in by_text.items())
    numbers = {int(number) for failure in failures for number in _ERRNO.findall(failure)}
    if numbers & set(DISK_FULL):
        raise OSError(errno.ENOSPC, f"{what} failed ({told}): {os.strerror(errno.ENOSPC)}")
    raise CheckpointError(f"{what} failed: {told}")
