"""The layer rules of the package, read from its import statements."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "fastpref"
BASE = {"errors", "validation", "files"}
MIDDLE = {"kernels", "losses", "data", "checkpoint"}
# room -> rooms of this package that it may import (itself is always allowed)
ALLOWED = {
    "__init__": {"errors", "kernels", "losses"},
    "errors": set(),
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
MODULES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_names(path: Path) -> list[str]:
    """Absolute dotted names of everything that `path` imports, at any depth of nesting."""
    names = []
    package = ("fastpref", *path.relative_to(PACKAGE).with_suffix("").parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            names += [f"{module}.{alias.name}" for alias in node.names]
    return names


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
