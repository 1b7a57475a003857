"""Whatever default dtype or device the process has, the op's bits are the same and it writes where it may."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SETTINGS = ("torch.bfloat16", "torch.float64", "meta")


@pytest.fixture(scope="module")
def changed() -> dict[str, list[str]]:
    """What each setting changed; a child, for a fault of memory may kill the process that runs it."""
    places = [str(HERE), str(HERE.parent), str(HERE.parents[1])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places), "TRITON_INTERPRET": "1", "MALLOC_CHECK_": "3"}
    command = [sys.executable, str(HERE / "process_defaults_child.py")]
    child = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert child.returncode == 0, f"ended with {child.returncode} after {child.stdout}\n{child.stderr[-2000:]}"
    found: dict[str, list[str]] = {}
    for line in child.stdout.splitlines():
        found |= json.loads(line)
    return found


@pytest.mark.parametrize("setting", SETTINGS)
def test_linear_logps_ignores_the_defaults_of_the_process(setting: str, changed: dict[str, list[str]]) -> None:
    """C++ wrote fp32 masses into a buffer of the default dtype: a dead process in bf16, wrong columns in fp64."""
    assert changed[setting] == []
