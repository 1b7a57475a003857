"""The command line, for the examples' run files."""

from tiny_project import run_cli

__all__ = ["run_cli"]
