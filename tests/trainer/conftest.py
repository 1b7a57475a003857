"""The fixtures of `tiny_runs`, for trainers made without a run file."""

from tiny_runs import one_rank, quiet_args

__all__ = ["one_rank", "quiet_args"]
