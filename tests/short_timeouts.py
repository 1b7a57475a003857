"""Collectives that fail soon, for ranks that work longer than that."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from torch.distributed import distributed_c10d

from fastpref.trainer.ranks import platform


@contextmanager
def short_timeout(seconds: float) -> Iterator[None]:
    """Inside, the ranks have a process group whose collectives fail after `seconds`."""
    platform.initialize_distributed(seconds)
    distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), None)
    try:
        yield
    finally:
        distributed_c10d._set_pg_timeout(timedelta(seconds=120), None)
        platform.destroy()
