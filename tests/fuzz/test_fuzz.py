"""Any bytes in place of a file give a valid value or the reader's own error; a seeded sample of what `make fuzz` tries.

What fuzzing found is kept as a test beside the others of that file format.
"""

from __future__ import annotations

import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from random import Random

import pytest
from fuzz_damage import damage
from fuzz_targets import TARGETS, Target, tracing_memory
from hypothesis import given, settings
from hypothesis import strategies as st

SAMPLE = {"data": 300, "config": 80, "manifest": 300, "model": 300}
FIXED = settings(derandomize=True, database=None, deadline=None)


@pytest.fixture(params=TARGETS.values(), ids=TARGETS)
def target(request: pytest.FixtureRequest) -> Target:
    return request.param


@pytest.fixture
def folder(target: Target, tmp_path: Path) -> Path:
    """Holds the target's documents, each of which was read once: what readers import, they have imported."""
    target.write(tmp_path)
    for document in target.documents:
        target.read(tmp_path, document.name)
    return tmp_path


def test_target_accepts_its_documents(target: Target, folder: Path) -> None:
    for document in target.documents:
        assert target.survives(folder, document, document.content), document.name


def test_target_survives_damaged_documents(target: Target, folder: Path) -> None:
    outcomes = {True: 0, False: 0}

    @settings(FIXED, max_examples=SAMPLE[target.name])
    @given(st.sampled_from(target.documents), st.integers(0, 2**32))
    def survive(document, seed) -> None:
        content = damage(document.kind, document.content, Random(seed))
        outcomes[target.survives(folder, document, content)] += 1

    # parsing YAML takes seconds while its memory is traced; tests/faults/test_f49_config_security.py measures that
    with nullcontext() if target.name == "config" else tracing_memory():
        survive()
    assert min(outcomes.values()) >= SAMPLE[target.name] // 20, outcomes  # neither all whole nor all broken


def test_target_survives_arbitrary_bytes(target: Target, folder: Path) -> None:
    @settings(FIXED, max_examples=SAMPLE[target.name] // 4)
    @given(st.sampled_from(target.documents), st.binary(max_size=300))
    def survive(document, content) -> None:
        target.survives(folder, document, content)

    survive()


def test_fuzzer_runs_guided_by_coverage(tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="the coverage-guided fuzzer is not installed: pip install fastpref[fuzz]")
    command = [sys.executable, str(Path(__file__).parent), "--target", "manifest", "--seconds", "2"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-2000:]
    runs = re.search(r"number_of_executed_units: *(\d+)", result.stderr)
    assert runs is not None and int(runs[1]) > 100
    assert len(list((tmp_path / "runs/fuzz/manifest").iterdir())) > len(TARGETS["manifest"].documents)
