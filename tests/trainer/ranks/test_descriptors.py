"""Open files per rank: few connections, whatever the number of ranks, and a limit that is raised or refused by name."""

import os
import resource
from pathlib import Path

import pytest
import torch

from fastpref.errors import ConfigError
from fastpref.testing.workers import RankPool
from fastpref.trainer.ranks import descriptors, meeting, platform


def sockets() -> int:
    folder = Path("/proc/self/fd")
    names = [os.readlink(link) for link in folder.iterdir() if link.is_symlink()]
    return sum(name.startswith("socket:") for name in names)


def sockets_of_a_group() -> tuple[int, int]:
    """Sockets that the group of saves takes on this rank, before it is used and after what a save does with it."""
    platform.initialize_distributed()
    before = sockets()
    group = platform.background_group(60.0)
    made = sockets() - before
    meeting.meet()  # nobody connects before all have counted
    torch.distributed.all_reduce(torch.zeros(3), group=group)
    parts = [None] * torch.distributed.get_world_size() if torch.distributed.get_rank() == 0 else None
    torch.distributed.gather_object("part", parts, group=group)
    torch.distributed.broadcast_object_list([""], src=0, group=group)
    used = sockets() - before
    torch.distributed.barrier(group=group)
    platform.destroy()
    return made, used


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts the links of /proc")


@needs_proc
def test_the_group_of_saves_is_no_mesh(rank_pool_4: RankPool) -> None:
    with RankPool(8, timeout_s=60.0) as pool:
        counts = {pool.world_size: pool.run(sockets_of_a_group) for pool in (rank_pool_4, pool)}
    # a connection with each other rank would make 4 and 8 with the one that listens
    assert all(made <= 1 for ranks in counts.values() for made, _ in ranks), counts
    used = [used for _, used in counts[8]]
    assert max(used) <= 8 and sum(used) <= 0.75 * 8 * 8, counts


def limits_for(world_size: int, soft: int, hard: int) -> int | str:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    try:
        descriptors.allow_connections(world_size)
    except ConfigError as error:
        return str(error)
    finally:
        found = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if before[1] <= hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
    return found


@pytest.mark.parametrize(
    ("world_size", "soft", "hard", "expected"),
    [
        (1, 256, 512, 256),
        (2, 256, 4096, 1032),
        (512, 1024, 4096, 3072),
        (512, 4000, 4096, 4000),
        (512, 300, 1500, 1500),
    ],
)
def test_the_limit_is_raised_as_far_as_it_is_needed(world_size: int, soft: int, hard: int, expected: int) -> None:
    with RankPool(1, timeout_s=60.0) as pool:  # a hard limit cannot be raised again
        assert pool.run(limits_for, world_size, soft, hard) == [expected]


def test_a_limit_that_is_too_low_is_refused() -> None:
    with RankPool(1, timeout_s=60.0) as pool:
        (said,) = pool.run(limits_for, 512, 256, 1024)
    assert "1024" in said and "512 ranks" in said and "1280" in said and "ulimit -Hn" in said


def test_ranks_look_at_the_limit_before_they_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "512", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1024))
    with pytest.raises(ConfigError, match=r"may open 1024 files here \(ulimit -Hn\), and a rank of 512 ranks"):
        platform.initialize_distributed(timeout_s=1.0)
    assert not torch.distributed.is_initialized()
