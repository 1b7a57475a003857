"""The fixtures of `served_exports`."""

from served_exports import base, exported

__all__ = ["base", "exported"]
