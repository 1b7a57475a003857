"""The fixtures of `tiny_project`, for faults that only a whole run can show."""

from tiny_project import project, run_cli, tokenizer_dir

__all__ = ["project", "run_cli", "tokenizer_dir"]
