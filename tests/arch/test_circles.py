"""No module of the package reaches itself through others, whichever way it imports them."""

from pathlib import Path

import import_graph
import pytest


def test_no_import_circle() -> None:
    assert import_graph.circles(import_graph.import_graph()) == []


@pytest.mark.parametrize(
    ("third", "expected"),
    [
        ("from p import one", [["p.one", "p.three", "p.two"]]),
        ("def f():\n    from p.one import x", [["p.one", "p.three", "p.two"]]),
        (
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .one import x",
            [["p.one", "p.three", "p.two"]],
        ),
        ("from .four import x", []),
        ("import os", []),
    ],
)
def test_circles_are_found(tmp_path: Path, third: str, expected: list[list[str]]) -> None:
    sources = {"__init__": "", "one": "from . import two", "two": "import p.three", "three": third, "four": ""}
    (tmp_path / "p").mkdir()
    for name, source in sources.items():
        (tmp_path / "p" / f"{name}.py").write_text(source)
    assert import_graph.circles(import_graph.import_graph(tmp_path / "p")) == expected
