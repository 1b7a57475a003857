"""Fixtures of runs, for those over Transformer Engine."""

from tiny_runs import one_rank, quiet_args

__all__ = ["one_rank", "quiet_args"]
