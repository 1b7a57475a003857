"""Fault 29: a rank that stops answering: the others end with exit code 6 at the timeout, and name it."""

import re
from pathlib import Path

from click.testing import CliRunner
from failing_peer import COLLECTIVE, TIMEOUT_S, run

from fastpref.cli.commands import cli


def test_a_rank_that_hangs(project: Path) -> None:
    (code, said), _ = run(project, "hangs")
    assert code == 6, said
    assert re.search(f"rank 0 got no answer at step 2, training, in {COLLECTIVE}: ", said), said
    silent_for = float(said.split("rank 1: step 2, reading data, ")[1].split(" s ago")[0])
    assert TIMEOUT_S - 2 <= silent_for <= TIMEOUT_S + 5
    stack = (project / "out" / "peer-failure-rank-0.txt").read_text()
    assert "run_step" in stack
    # the dumps of PyTorch's recorder say the same without the job's store
    result = CliRunner().invoke(cli, ["diagnose", str(project / "out")])
    assert result.exit_code == 0, result.output
    assert re.match(r"rank 1 left no record of \w+ \d+ of group \d+ .*, in which rank 0 waits:", result.stdout), (
        result.stdout
    )
    assert "it left no dump" in result.stdout and "in run_step" in result.stdout
