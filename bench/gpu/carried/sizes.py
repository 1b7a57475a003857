"""What travels to the machine, in MiB: the tree, the wheels and the cache."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path

from bench.workloads import ROOT

MOST_MIB = 60.0
WHEELS, CACHE = "wheels", "cache"


def weigh(carried: Path, root: Path = ROOT) -> dict[str, float]:
    """Return MiB by part: the tracked files of the tree, and the two folders of what is carried, each file of `wheels`.

    Args:
        carried: the folder that holds `wheels` and `cache`; either may not be there.
        root: a checkout.
    """
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, check=True).stdout.split(b"\0")
    parts = {"tree": _mib(root / name.decode() for name in listed if name)}
    wheels = sorted((carried / WHEELS).iterdir()) if (carried / WHEELS).is_dir() else []
    parts |= {wheel.name: _mib([wheel]) for wheel in wheels}
    return parts | {CACHE: _mib((carried / CACHE).rglob("*")) if (carried / CACHE).is_dir() else 0.0}


def table(parts: dict[str, float]) -> str:
    """Return the parts, their sum and what may travel as a text table."""
    lines = [*parts.items(), ("together", sum(parts.values())), ("may travel", MOST_MIB)]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {mib:7.1f} MiB" for name, mib in lines)


def fault(parts: dict[str, float]) -> str | None:
    """Say that it is too much, or None."""
    total = sum(parts.values())
    if total <= MOST_MIB:
        return None
    largest = max((name for name in parts if name != "tree"), key=lambda name: parts[name])
    return (
        f"{total:.1f} MiB would travel, at most {MOST_MIB:.0f} may; the largest part beside the tree is {largest} "
        f"({parts[largest]:.1f} MiB)"
    )


def unprepared(carried: Path) -> list[str]:
    """Say which part of what travels is not there yet, and what is without it."""
    needs = {
        WHEELS: "peers that the machine has not got become rows that say so",
        CACHE: "kernels are compiled there, 10 to 30 seconds of a core each",
    }
    has = {name: (carried / name).is_dir() and any((carried / name).iterdir()) for name in needs}
    return [f"{carried / name} is empty: {lack}" for name, lack in needs.items() if not has[name]]


def _mib(files: Iterable[Path]) -> float:
    return round(sum(file.stat().st_size for file in files if file.is_file()) / 2**20, 2)
