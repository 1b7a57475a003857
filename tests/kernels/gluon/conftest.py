"""The emulator, and the problems and oracle of the Triton engine's tests."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent / "triton" / "interpreted")]

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The Triton engine on the CPU: its launches are emulated, with the options that a test sets, and noted."""
    from emulator import GLUON, TILE, TRITON, emulate

    from fastpref.kernels import triton_engine
    from fastpref.kernels.triton_common import KernelCall

    options: dict[str, Any] = {"seed": 0, "edits": {}, "more_programs": 0, "launched": []}

    def launch(call: KernelCall) -> None:
        name = call.kernel.fn.__name__
        options["launched"].append(name)
        if name == GLUON:
            call = call._replace(num_programs=call.num_programs + options["more_programs"])
        emulate(call, options["seed"], options["edits"] if name == GLUON else None)

    monkeypatch.setattr(KernelCall, "launch", launch)
    monkeypatch.setattr(triton_engine, "_is_interpreted", lambda: True)
    monkeypatch.setattr(triton_engine, "select_tile", lambda *_: TILE)
    yield options
    assert GLUON in options["launched"] or TRITON in options["launched"]
