"""Faults 25 and 26: SIGKILL at a step or inside a save; what is continued ends bitwise like the undisturbed run.

A sample of the matrix that `python -m checks.kill_matrix` runs in full.
"""

from pathlib import Path

import pytest

from checks.kill_matrix import LAYOUTS, STEPS, Crash, survive, train
from checks.run_end import difference, read_end
from fastpref.testing.workers import RankPool


@pytest.fixture(scope="module")
def pool():
    """Its own: ranks die here."""
    with RankPool(2, timeout_s=120.0) as pool:
        yield pool


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_killed_run_continues_bitwise(pool: RankPool, tmp_path: Path, layout: str) -> None:
    operations = pool.run(train, str(tmp_path / "whole"), layout, None, False)
    expected = read_end(tmp_path / "whole")
    assert expected.step == STEPS == len(expected.log)
    first, second = map(len, operations)
    assert first >= 40 and second >= 2  # two saves: every file is made, made durable and read for its hash
    crashes = {
        # in the first save nothing is there to continue from; in the second there is
        "dp2": [Crash(1, step=STEPS), Crash(0, save_event=first // 4), Crash(0, save_event=first)],
        "tp2": [Crash(1, save_event=second), Crash(0, save_event=first - 3, takes_all=True)],
        "pp2": [Crash(0, save_event=first - 1), Crash(1, save_event=1)],
        "dp2-async": [Crash(0, save_event=first // 4), Crash(0, save_event=first - 3)],
    }[layout]
    for number, crash in enumerate(crashes):
        assert difference(survive(pool, tmp_path / str(number), layout, crash), expected) is None, str(crash)
