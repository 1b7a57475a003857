"""Where output goes to nobody, the work is still done and the exit code tells of the work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def fastpref(arguments: str, redirected: str) -> tuple[int, str]:
    """Exit code and stderr of a command that a shell starts."""
    command = f'set -o pipefail; "{sys.executable}" -m fastpref {arguments} {redirected}'
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, env=environment)
    return result.returncode, result.stderr


@pytest.mark.parametrize(
    ("redirected", "said"),
    [
        ("| true", ""),
        (">&-", ""),
        ("> /dev/full", "fastpref: the output of this command is lost: [Errno 28] No space left on device\n"),
    ],
)
def test_a_result_that_nobody_takes(project: Path, redirected: str, said: str) -> None:
    (project / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    assert fastpref("plot .", redirected) == (0, said)
    assert (project / "curves.png").exists()


@pytest.mark.parametrize("redirected", ["2>&1 | true", "2>&-", "2> /dev/full"])
def test_an_error_that_nobody_takes(project: Path, redirected: str) -> None:
    assert fastpref("plot nowhere", redirected) == (3, "")
