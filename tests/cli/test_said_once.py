"""What every rank has to say is printed exactly once, whichever rank ends first, and nothing is lost."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from fastpref.cli import failures

MESSAGE = "fastpref: config error: a key is unknown"


@pytest.fixture
def agent_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[TCPStore]:
    """A launcher's store, and the variables by which its ranks find it."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    monkeypatch.setattr(failures, "_STORE_WAIT", timedelta(seconds=0.3))
    yield store


class Ranks:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def say(self, *ranks: int, message: str = MESSAGE) -> list[str]:
        """The lines that ranks print that speak one after the other, each before the next has begun."""
        for rank in ranks:
            self._monkeypatch.setenv("RANK", str(rank))
            failures.say_once(message)
        return self._capsys.readouterr().err.splitlines()


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ranks:
    return Ranks(monkeypatch, capsys)


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (2, 1, 0), (1, 2, 0)], ids=str)
def test_once_in_any_order(agent_store: TCPStore, ranks: Ranks, order: tuple[int, ...]) -> None:
    first = f"[rank {order[0]}] {MESSAGE}" if order[0] else MESSAGE
    assert ranks.say(*order) == [first]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_ends_alone_has_spoken(agent_store: TCPStore, ranks: Ranks, rank: int) -> None:
    """Before the launcher ends the others, which never speak."""
    assert len(ranks.say(rank)) == 1


def test_other_messages_and_the_same_one_again_are_not_lost(
    agent_store: TCPStore, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ranks.say(1, 0) == [f"[rank 1] {MESSAGE}"]
    # a node that lacks a file
    assert ranks.say(8, message="other") == ["[rank 8] other"]
    # a second command of the same workers
    assert ranks.say(0, 1) == [MESSAGE]
    # the workers were started again, by the same launcher; one of them had not spoken before it was ended
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert ranks.say(0) == [MESSAGE]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert ranks.say(1, 0) == [f"[rank 1] {MESSAGE}"]


def test_who_died_between_claim_and_word_is_spoken_for(
    agent_store: TCPStore, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: object, **__: object) -> None:
        raise SystemExit

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(failures.click, "echo", dies)
        ranks.say(0)
    assert len(ranks.say(1)) == 1


def test_ranks_that_speak_at_once(
    agent_store: TCPStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(failures, "_STORE_WAIT", timedelta(seconds=5))
    monkeypatch.setattr(failures, "_rank", lambda: int(threading.current_thread().name))
    threads = [threading.Thread(target=failures.say_once, args=(MESSAGE,), name=str(rank)) for rank in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert capsys.readouterr().err == MESSAGE + "\n"


@pytest.mark.parametrize("port", ["1", "", "none"])
def test_without_a_store_in_reach_every_rank_speaks(
    agent_store: TCPStore, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, port: str
) -> None:
    monkeypatch.setenv("MASTER_PORT", port)
    assert ranks.say(0, 1) == [MESSAGE, f"[rank 1] {MESSAGE}"]
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    assert ranks.say(1, 0) == [f"[rank 1] {MESSAGE}", MESSAGE]


def test_a_store_whose_host_is_stopped_keeps_nobody_silent(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client would wait without end, and hold whoever asks it."""
    is_over = threading.Event()
    monkeypatch.setattr(failures, "_ANSWER_S", 0.2)
    monkeypatch.setattr(failures, "_shared_store", lambda: is_over.wait(60) and None)
    assert ranks.say(1) == [f"[rank 1] {MESSAGE}"]
    assert not is_over.is_set()
    is_over.set()


def test_alone_nobody_is_asked(
    agent_store: TCPStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("RANK", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("torch.distributed.TCPStore", lambda *_, **__: pytest.fail("a store was asked"))
    failures.say_once(MESSAGE)
    assert capsys.readouterr().err.splitlines() == [MESSAGE]


def test_under_torchrun_the_first_rank_to_end_has_spoken(project: Path) -> None:
    """Rank 0 is slow: the launcher ends it before it has read the file."""
    (project / "sitecustomize.py").write_text(
        "import os, time\nif os.environ.get('RANK') == '0':\n    time.sleep(60)\n"
    )
    paths = [str(project), str(Path(failures.__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "fastpref"]
    result = subprocess.run(
        [*launcher, "train", "run.yaml", "training.sed=1"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )
    assert result.returncode == 1
    assert len(re.findall("did you mean seed", result.stdout + result.stderr)) == 1, result.stderr


def test_wrong_usage_is_said_once(agent_store: TCPStore, run_cli, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        results.append(run_cli("train"))
    assert [result.exit_code for result in results] == [2, 2]
    assert "Missing argument 'CONFIG'" in results[0].stderr and "Usage: " in results[0].stderr
    assert results[1].stderr == ""
