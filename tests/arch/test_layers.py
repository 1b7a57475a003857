"""The layer rules of the package, read from its import statements."""

import subprocess
import sys
from pathlib import Path

import pytest
from import_graph import MODULES, PACKAGE, imported_names

BASE = {"errors", "validation", "files", "deadline"}
MIDDLE = {"kernels", "losses", "data", "checkpoint"}
# room -> rooms of this package that it may import (itself is always allowed)
ALLOWED = {
    "__init__": {"errors", "kernels", "losses"},
    "errors": set(),
    "deadline": set(),
    "validation": {"errors"},
    "files": {"errors"},
    **{room: BASE for room in MIDDLE},
    "run": {*BASE, *MIDDLE},
    "trainer": {"__init__", *BASE, *MIDDLE, "run"},
    "integrations": {"errors", "kernels", "losses"},
    "testing": {"errors", "kernels"},
    "cli": {"__init__", *BASE, *MIDDLE, "run", "trainer"},
    "__main__": {"cli"},
}
# third-party package -> rooms that may import it
OWNERS = {
    "megatron": {"trainer"},
    "transformer_engine": {"trainer"},
    "triton": {"kernels"},
    "click": {"cli"},
    "trl": {"integrations"},
}


# room -> its sub-rooms from the bottom up: each may import those before it; a file beside them may import all
FLOORS = {
    "run": ("architecture", "config", "plan", "served", "record"),
    "trainer": ("ranks", "model", "step", "reference", "saves"),
}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    room = room_of(path)
    assert room in ALLOWED, f"{path}: a new room; give it a place in ALLOWED"
    for name in imported_names(path):
        parts = name.split(".")
        if parts[0] == "fastpref" and len(parts) > 1:
            target = parts[1] if parts[1] in ALLOWED else "__init__"
            assert target == room or target in ALLOWED[room], f"{path}: room {room!r} must not import {name}"
        if parts[0] in OWNERS:
            assert room in OWNERS[parts[0]], f"{path}: only {sorted(OWNERS[parts[0]])} may import {parts[0]}"


@pytest.mark.parametrize(
    "path", [path for path in MODULES if room_of(path) in FLOORS], ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_floors_are_built_on_those_below(path: Path) -> None:
    room, *inner = path.relative_to(PACKAGE).with_suffix("").parts
    floors = FLOORS[room]
    own = floors.index(inner[0]) if inner[0] in floors else len(floors)
    for name in imported_names(path):
        parts = name.split(".")
        if parts[:2] == ["fastpref", room] and len(parts) > 2 and own < len(floors):
            assert parts[2] in floors[: own + 1], f"{path}: floor {inner[0]!r} must not import {name}"


def test_every_room_is_covered() -> None:
    assert len(MODULES) > 10
    assert {room_of(path) for path in MODULES} >= MIDDLE | {"run", "trainer", "cli", "testing", "integrations"}


def test_import_needs_torch_only() -> None:
    probe = (
        "import sys, fastpref, fastpref.integrations.trl; fastpref.linear_logps; "
        "heavy = {'megatron', 'triton', 'transformers', 'pydantic', 'click', 'rich', 'trl', 'pyarrow', 'tokenizers'}; "
        "loaded = sorted(heavy & set(sys.modules)); print(loaded)"
    )
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
