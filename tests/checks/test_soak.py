"""The soak's plan and bookkeeping, its handling of torchrun, and a short soak on ranks that need no imports."""

import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from checks import soak
from checks.soak import MOMENTS, RANKS, Hit, Job, Kill, Outcome, Soak, last_step, plan_kills
from fastpref.testing.workers import RankPool, WorkerError
from fastpref.trainer.ranks import platform

ROOT = Path(__file__).resolve().parents[2]


def train_on_rank(arguments: list[str]) -> tuple[int, str]:
    from fastpref.cli.commands import cli

    os.chdir(ROOT)
    try:
        result = CliRunner().invoke(cli, arguments)
    finally:
        platform.destroy()
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


class PoolJob(Job):
    """The command on the ranks of a pool, which start in a fraction of torchrun's time and die the same deaths."""

    pool: RankPool

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        self._ranks, self._code, self._log = {}, 0, log
        self.pool.run(int)  # start the ranks
        for number, rank in enumerate(self.pool._ranks):
            self._ranks[number] = psutil.Process(rank.process.pid)
        self._thread = threading.Thread(target=self._run, args=(list(arguments),))
        self._thread.start()

    def _run(self, arguments: list[str]) -> None:
        try:
            results = self.pool.run(train_on_rank, arguments)
            self._code, output = max(code for code, _ in results), "".join(output for _, output in results)
        except WorkerError as error:
            self._code, output = 1, str(error)
        self._log.write_text(output)

    def is_running(self) -> bool:
        return self._thread.is_alive()

    def send(self, number: signal.Signals, victim: int | None) -> None:
        for rank in self._ranks if victim is None else [victim]:
            self._ranks[rank].send_signal(number)

    def wait(self, timeout_s: float) -> int:
        self._thread.join(timeout_s)
        assert not self._thread.is_alive()
        return self._code

    def __exit__(self, *_: object) -> None:
        self._thread.join()


def test_plan_depends_on_the_seed_and_reaches_every_kind() -> None:
    plan = plan_kills(1000, 300, seed=0)
    assert plan == plan_kills(1000, 300, seed=0) != plan_kills(1000, 300, seed=1)
    assert [kill.step for kill in plan] == sorted(kill.step for kill in plan)
    assert all(0 <= kill.step < 300 and 0 <= kill.delay_s <= MOMENTS[kill.moment][1] for kill in plan)
    kinds = Counter((kill.moment, kill.victim, kill.number) for kill in plan)
    assert len(kinds) == len(MOMENTS) * (RANKS + 1) * 2


@pytest.mark.parametrize(("end", "expected"), [("", 2), ('{"step": 3, "lo', 2), ('{"step": 3}\n', 3)])
def test_last_step_ignores_a_line_that_is_cut_off(tmp_path: Path, end: str, expected: int) -> None:
    assert last_step(tmp_path) == 0
    lines = "".join(json.dumps({"step": step, "loss": 0.5}) + "\n" for step in (1, 2))
    (tmp_path / "metrics.jsonl").write_text(lines + end)
    assert last_step(tmp_path) == expected


def test_main_shows_stored_results(tmp_path: Path, monkeypatch, capsys) -> None:
    hits = [Hit("SIGKILL", "rank 1", "in a step", 30, False, 20, 10), Hit("SIGKILL", "all ranks", "x", 9, True, 0, 9)]
    outcome = Outcome(0, 300, 2, [], 2, hits, 60.0, 100.0, "loss differs", 5, 7, 300)
    (tmp_path / "soak.json").write_text(json.dumps(soak.asdict(outcome)))
    monkeypatch.setattr("sys.argv", ["soak", "--table", "--output", str(tmp_path / "soak.json")])
    assert soak.main() == 1
    shown = capsys.readouterr().out
    assert "| rank 1" in shown and "19" in shown and "loss differs in 5 tensors" in shown


def test_job_under_torchrun_leaves_nothing_behind(tmp_path: Path) -> None:
    with Job(["train", "no-such-file.yaml"], tmp_path / "log") as job:
        while len(job.ranks()) < RANKS and job.is_running():
            time.sleep(0.01)
        assert {int(process.environ()["RANK"]) for process in job.ranks().values()} == set(range(RANKS))
        job.send(signal.SIGKILL, 1)
        assert job.wait(60.0) != 0
    assert not any(process.is_running() for process in (job.launcher, *job.ranks().values()))


def test_killed_ranks_end_in_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank dies in a step after the first save, and all of them inside a save."""
    kills = [Kill(5, "in a step", 1, signal.SIGKILL, 0.0), Kill(8, "inside a save", None, signal.SIGKILL, 0.01)]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(soak, "plan_kills", lambda *_: list(kills))
    # one pair of the demo's data for each rank and step
    small = ["training.per_device_train_batch_size=1", "model.config.num_hidden_layers=1", "data.eval=[]"]
    small += ["training.eval_steps=null", "training.eval_on_start=false"]
    outcome = Outcome(seed=0, steps=12, ranks=RANKS, overrides=small, kills_planned=len(kills))
    with RankPool(RANKS, timeout_s=120.0) as pool:
        monkeypatch.setattr(PoolJob, "pool", pool, raising=False)
        Soak(outcome, tmp_path, time.monotonic() + 240, PoolJob).run()
    assert outcome.result == "bitwise equal" and outcome.records == 12
    first, second = outcome.hits
    assert first.resumed_from == 3 and first.steps_lost >= 2
    assert second.resumed_from >= 6
