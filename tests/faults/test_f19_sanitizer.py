"""Fault 19: no invalid access, race, bad synchronisation or uninitialised read in the device tests."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

GPU_TESTS = Path(__file__).resolve().parents[1] / "gpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA device")
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not on PATH")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_device_tests_under_the_sanitizer(tool: str) -> None:
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q"]
    result = subprocess.run(
        [*command, str(GPU_TESTS), "-k", "odd_sizes or labels_outside"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
