"""Processes: platform, agreement, supervision and their ends."""
