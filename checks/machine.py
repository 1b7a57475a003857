"""The machine that a check ran on, for its record."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any


def machine(**settings: int) -> dict[str, Any]:
    """Processor and system, with what a check says of its own use of them between."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        **settings,
        "system": platform.platform(),
        "python": platform.python_version(),
    }
