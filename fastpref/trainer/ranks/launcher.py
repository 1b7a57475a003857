"""What a launcher tells each rank in its environment, read before anybody waits for ranks that never come."""

from __future__ import annotations

import os

from fastpref.errors import ConfigError, Problem, raise_if_any

_PORTS = 65535


def launched_ranks() -> int | None:
    """Return the number of ranks that a launcher started; None where there is no launcher.

    Raises:
        ConfigError: its variables are incomplete, or hold what they cannot mean; lists every problem.
    """
    if "WORLD_SIZE" not in os.environ:
        return None
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(f"WORLD_SIZE is set but {', '.join(missing)} is not; start the ranks with torchrun")
    problems: list[Problem] = []
    size = _number("WORLD_SIZE", 1, None, "a number of ranks >= 1", problems)
    _number("RANK", 0, size - 1 if size else None, "a number from 0 to WORLD_SIZE - 1", problems)
    if "LOCAL_RANK" in os.environ:
        _number("LOCAL_RANK", 0, None, "the number of the rank's GPU, from 0 on", problems)
    _number("MASTER_PORT", 0 if size == 1 else 1, _PORTS, f"a port, from 1 to {_PORTS}", problems)
    if not os.environ["MASTER_ADDR"].strip():
        problems.append(Problem("the environment variable MASTER_ADDR", "must name the host of rank 0, and is empty"))
    raise_if_any(problems)
    return size


def _number(name: str, least: int, most: int | None, what: str, problems: list[Problem]) -> int:
    text = os.environ[name]
    if text.isdecimal() and len(text) < 10 and int(text) >= least and (most is None or int(text) <= most):
        return int(text)
    problems.append(Problem(f"the environment variable {name}", f"must be {what}, got {text[:40]!r}"))
    return 0
