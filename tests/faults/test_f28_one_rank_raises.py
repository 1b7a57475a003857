"""Fault 28: a rank that raises or dies ends the job on every rank, and the messages say which rank, when and why."""

import re
import signal
from pathlib import Path

import pytest
from failing_peer import COLLECTIVE, run

beside_a_save = pytest.mark.parametrize("saves", [False, True], ids=["", "beside-a-save"])


@beside_a_save
def test_a_rank_that_raises(project: Path, saves: bool) -> None:
    (code, said), (other_code, other_said) = run(project, "raises", saves=saves)
    assert other_code == 3
    assert "[rank 1] fastpref: data error: pairs.jsonl:7: the record is broken" in other_said
    assert "(on rank 1 at step 2, reading data)" in other_said
    assert code == 6
    assert re.search(f"fastpref: peer error: rank 0 got no answer at step 2, training, in {COLLECTIVE}: ", said), said
    assert "rank 1: step 2, reading data, " in said


@beside_a_save
def test_a_rank_that_dies(project: Path, saves: bool) -> None:
    (code, said), (other_code, _) = run(project, "dies", saves=saves)
    assert other_code == -signal.SIGKILL and code == 6
    assert "rank 1: step 2, reading data, " in said
    assert "Error" in (project / "out" / "peer-failure-rank-0.txt").read_text()
    assert not (project / "out" / "run.lock").exists()
