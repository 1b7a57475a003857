"""Open files of a rank: as few connections as the ranks need, and a limit that admits them.

A gloo group of n ranks connects each of them with every other: n sockets, one of which listens. Connected when they
first talk, a rank has one that listens, and one to each rank that its reductions and broadcasts go through; rank 0,
which gathers, has n. NCCL's own connections depend on the network, and files of models and data come on top.
"""

from __future__ import annotations

import os
import resource

from fastpref.errors import ConfigError

_LAZY = "TORCH_GLOO_LAZY_INIT"
# Rank 0 talks to all in up to two groups; files and NCCL need some hundreds.
_LEAST_PER_RANK, _LEAST_FILES = 2, 256
_WANTED_PER_RANK, _WANTED_FILES = 4, 1024


def connect_lazily() -> None:
    """Let gloo groups connect two ranks when they first talk; where the user has not decided."""
    os.environ.setdefault(_LAZY, "1")


def allow_connections(world_size: int) -> None:
    """Raise this process's limit of open files as far as a job needs it.

    Raises:
        ConfigError: the hard limit, which only an administrator raises, is too low.
    """
    if world_size == 1:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    least = _LEAST_PER_RANK * world_size + _LEAST_FILES
    if hard != resource.RLIM_INFINITY and hard < least:
        raise ConfigError(
            f"a process may open {hard} files here (ulimit -Hn), and a rank of {world_size} ranks needs at least "
            f"{least} for its connections; raise the hard limit of the job (LimitNOFILE of a service, "
            "--ulimit nofile of a container, limits.conf)"
        )
    wanted = _WANTED_PER_RANK * world_size + _WANTED_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))
