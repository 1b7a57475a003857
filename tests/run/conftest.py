"""The fixtures of `tiny_project`, for tests that start from a run file."""

from tiny_project import project, run_cli, tokenizer_dir

__all__ = ["project", "run_cli", "tokenizer_dir"]
