"""The fixtures of `tiny_project`, for every test of the command line."""

from tiny_project import project, run_cli, tokenizer_dir

__all__ = ["project", "run_cli", "tokenizer_dir"]
