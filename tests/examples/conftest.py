"""The command line and a small project, for the examples' files."""

from tiny_project import project, run_cli, tokenizer_dir

__all__ = ["project", "run_cli", "tokenizer_dir"]
