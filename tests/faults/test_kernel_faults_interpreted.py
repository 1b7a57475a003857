"""Runs the faults of the op again on the Triton kernels, in a child whose interpreter is chosen before its import."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fault_table import REPORT_FOLDER

FOLDER = Path(__file__).parent
FILES = [str(path) for number in range(1, 18) for path in FOLDER.glob(f"test_f{number:02}_*.py")]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.timeout(600)
def test_kernel_faults_in_the_interpreter() -> None:
    report = [f"--junitxml={folder}/interpreted.xml"] if (folder := os.environ.get(REPORT_FOLDER)) else []
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton", *report, *FILES],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout or "100%" in result.stdout
