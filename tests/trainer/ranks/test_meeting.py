"""Ranks that work long are waited for, whatever the timeout of collectives; ranks that show no life are not."""

import re
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from short_timeouts import short_timeout
from torch.distributed import distributed_c10d

from fastpref.errors import CheckpointError, PeerError
from fastpref.testing.workers import RankPool
from fastpref.trainer.ranks import heartbeat, meeting, platform
from fastpref.trainer.ranks.agreement import agree, from_rank_0, together

TIMEOUT_S, WORK_S = 0.8, 1.6


def slowly(rank: int) -> int:
    if torch.distributed.get_rank() == rank:
        time.sleep(WORK_S)
    return torch.distributed.get_rank()


def agree_slowly() -> None:
    slowly(1)
    agree([])


WAITS: dict[str, tuple[Callable[[], object], list[object]]] = {
    "together": (lambda: together(lambda: slowly(1), "working"), [0, 1]),
    "from_rank_0": (lambda: from_rank_0(lambda: slowly(0), "working"), [0, 0]),
    "agree": (agree_slowly, [None, None]),
}


def wait(name: str) -> object:
    with short_timeout(TIMEOUT_S):
        return WAITS[name][0]()


@pytest.mark.parametrize("name", WAITS)
def test_a_rank_that_works_longer_than_a_collective_may_is_waited_for(rank_pool_2: RankPool, name: str) -> None:
    assert rank_pool_2.run(wait, name) == WAITS[name][1]


def fail_slowly() -> str:
    def work() -> None:
        if slowly(0) == 0:
            raise OSError(5, "the disk is slow and broken")

    with short_timeout(TIMEOUT_S):
        with pytest.raises(CheckpointError) as caught:
            together(work, "working")
        # the next time they meet is another
        assert together(torch.distributed.get_rank, "working") == torch.distributed.get_rank()
    return str(caught.value)


def test_what_fails_late_is_heard_by_all(rank_pool_2: RankPool) -> None:
    first, second = rank_pool_2.run(fail_slowly)
    assert first == second == "working failed: rank 0: [Errno 5] the disk is slow and broken"


def many_words() -> list[dict[int, str]]:
    rank = torch.distributed.get_rank()
    heard = [meeting.meet(words="" if rank in quiet else f"said by {rank}") for quiet in ((), (0, 2), (0, 1, 2, 3))]
    store = distributed_c10d._get_default_store()
    return [*heard, {0: str(store.num_keys())}]


def test_words_reach_every_rank_and_leave_nothing_in_the_store(rank_pool_4: RankPool) -> None:
    before = [answer[-1] for answer in rank_pool_4.run(many_words)]
    for answer, count in zip(rank_pool_4.run(many_words), before, strict=True):
        assert answer[0] == {rank: f"said by {rank}" for rank in range(4)}
        assert answer[1] == {1: "said by 1", 3: "said by 3"}
        assert answer[2] == {}
        assert int(answer[-1][0]) <= int(count[0]) + 4


def stop_while_another_waits(silence_s: float) -> str:
    """Rank 1 stands still as a process that is suspended or whose machine hangs; rank 0 waits for it."""
    platform.initialize_distributed(silence_s)
    if torch.distributed.get_rank() == 1:
        # as if the whole process stood still: the thread that shows life does, too
        heartbeat.end()
        time.sleep(silence_s + 4)
        return ""
    try:
        together(lambda: None, "working")
    except PeerError as error:
        return str(error)
    finally:
        platform.destroy()
    return "nothing was noticed"


def test_a_rank_that_shows_no_life_is_not_waited_for() -> None:
    with RankPool(2, timeout_s=60.0) as pool:
        said, _ = pool.run(stop_while_another_waits, heartbeat.LEAST_SILENCE_S)
    assert "rank 1 has shown no life for" in said and "working" in said


def ask_a_store_that_is_silent() -> str:
    """Its host is stopped: the client waits for an answer without end."""
    platform.initialize_distributed(heartbeat.LEAST_SILENCE_S)
    meeting.Vigil.patience_s = 0.2  # type: ignore[misc, assignment]
    try:
        meeting._wait(lambda: time.sleep(60) or True, [1 - torch.distributed.get_rank()], "reading a disk")
    except PeerError as error:
        return str(error)
    finally:
        platform.destroy()
    return "nothing was noticed"


def test_a_store_that_does_not_answer_is_not_waited_for() -> None:
    with RankPool(2, timeout_s=30.0) as pool:
        said = pool.run(ask_a_store_that_is_silent)
    for rank, text in enumerate(said):
        assert re.match(
            r"the job's store, on .*, has not answered for 0 s, while rank \d waited in reading a disk", text
        )
        assert f"rank {rank} waited" in text


# --- ranks that live and stand still

PATIENCE_S = heartbeat.LEAST_SILENCE_S


def stand_still() -> None:
    """As on a file that never comes or a lock that nobody lets go: no processor time at all."""
    time.sleep(PATIENCE_S + 3)


def work_long() -> None:
    """As on a slow disk: little at a time."""
    end = time.monotonic() + PATIENCE_S + 3
    while time.monotonic() < end:
        Path("/proc/self/stat").read_bytes()
        time.sleep(0.4)


def wait_together(do: Callable[[], None]) -> None:
    together(lambda: do() if torch.distributed.get_rank() == 1 else None, "reading a disk")


def wait_for_a_turn(do: Callable[[], None]) -> None:
    turns = meeting.Turns("test", 1, "reading a disk")
    if torch.distributed.get_rank() == 1:
        do()
        turns.call()
    else:
        turns.wait()


def wait_in_a_chain(do: Callable[[], None]) -> None:
    """Rank 1 has to do, rank 2 waits for its turn, and rank 0 for both of them."""

    def act() -> None:
        turns = meeting.Turns("test", 1, "reading a part")
        if torch.distributed.get_rank() == 1:
            do()
            turns.call()
        elif torch.distributed.get_rank() == 2:
            turns.wait()

    together(act, "reading a disk")


def hear(wait: Callable[[Callable[[], None]], None], do: Callable[[], None]) -> tuple[str, list[str]]:
    """The error and the warnings of this rank."""
    platform.initialize_distributed(PATIENCE_S)
    said = ""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                wait(do)
            except PeerError as error:
                said = str(error)
        time.sleep(1.5)  # the others look at this rank until they, too, have ended
        return said, [str(warning.message) for warning in caught]
    finally:
        platform.destroy()


@pytest.mark.skipif(not hasattr(time, "pthread_getcpuclockid"), reason="needs Linux's clocks of threads")
@pytest.mark.parametrize("wait", [wait_together, wait_for_a_turn])
def test_a_rank_that_lives_and_stands_still_is_named(wait: Callable[[Callable[[], None]], None]) -> None:
    with RankPool(2, timeout_s=60.0) as pool:
        (said, _), _ = pool.run(hear, wait, stand_still)
    assert "rank 0 waited in reading a disk for what stands still: rank 1, doing nothing for" in said
    assert re.search(r"in test_meeting\.py:\d+ in stand_still, from test_meeting\.py:\d+ in ", said), said
    assert "distributed_timeout_seconds" in said


def test_work_of_any_length_is_waited_for_and_said_once_by_one_rank() -> None:
    with RankPool(3, timeout_s=60.0) as pool:
        heard = pool.run(hear, wait_in_a_chain, work_long)
    assert [said for said, _ in heard] == [""] * 3
    ((told,), first, second) = [warned for _, warned in heard]
    assert first == second == []
    assert re.match(r"rank 0 waits in reading a disk since \d+ s for rank 1, at work in .*in work_long, from", told), (
        told
    )
