"""The SLURM script between stand-ins of `srun` and `scontrol`: what ranks are told, and when it queues itself again."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "clusters" / "slurm.sbatch"
# Starts SLURM_NTASKS tasks, sends them SIGUSR1 once $SIGNAL_AT is there, and returns their largest exit code.
SRUN = """#!{python}
import os, signal, subprocess, sys, time
options = [a for a in sys.argv[1:] if a.startswith("--")]
count = int(os.environ["SLURM_NTASKS"])
tasks = [
    subprocess.Popen(sys.argv[1 + len(options):], env=os.environ | {{"SLURM_PROCID": n, "SLURM_LOCALID": n}})
    for n in map(str, range(count))
]
wanted = os.environ.get("SIGNAL_AT")
while wanted and tasks[0].poll() is None and not (os.path.exists(wanted) and os.path.getsize(wanted)):
    time.sleep(0.02)
for task in tasks if wanted else ():
    task.send_signal(signal.SIGUSR1)
codes = [task.wait() for task in tasks]
sys.exit(max(128 - code if code < 0 else code for code in codes))
"""
SCONTROL = """#!/bin/sh
if [ "$1" = show ]; then
  printf '%s\\nnode-b\\n' "${FIRST_NODE:-node-a}"
  [ -z "$MANY_NODES" ] || { sleep 0.3 && printf 'node-c\\n'; }
else
  echo "$@" >> scontrol.log
  exit "${REQUEUE_CODE:-0}"
fi
"""
FAKE_PYTHON = """#!/bin/sh
if [ "$1" = -c ]; then echo "$CHECKPOINTS"; exit "${COUNT_CODE:-0}"; fi
echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT $SRUN_CPUS_PER_TASK $*" >> ranks.log
case "$RANK" in 1) exit "${LAST_CODE:-0}";; *) exit "${FIRST_CODE:-0}";; esac
"""
REAL_PYTHON = """#!/bin/sh
exec {python} "$@"
"""


def submit(folder: Path, python: str, *arguments: str, **environment: str) -> int:
    """Runs the script as SLURM would on its first node; returns its exit code."""
    commands = folder / "bin"
    commands.mkdir(exist_ok=True)
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "python": python}.items():
        (commands / name).write_text(text.format(python=sys.executable) if "{python}" in text else text)
        (commands / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "31", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_CPUS_PER_TASK": "8", "SLURM_NTASKS": "2"}
    path = {"PATH": f"{commands}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    command = ["bash", str(SCRIPT), *arguments]
    environment = {**os.environ, **path, **job, **environment}
    process = subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True)
    try:
        return process.wait(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def was_requeued(folder: Path) -> bool:
    log = folder / "scontrol.log"
    return log.exists() and re.fullmatch(r"requeue \d+\n", log.read_text()) is not None


def test_every_task_is_a_rank(tmp_path: Path) -> None:
    assert submit(tmp_path, FAKE_PYTHON, "run.yaml", "training.learning_rate=1e-6", CHECKPOINTS="0") == 0
    command = "-m fastpref train run.yaml training.learning_rate=1e-6"
    lines = sorted((tmp_path / "ranks.log").read_text().splitlines())
    assert lines == [f"{rank} {rank} 2 node-a 20031 8 {command}" for rank in (0, 1)]
    assert not was_requeued(tmp_path)


@pytest.mark.parametrize(
    ("restarts", "checkpoints", "resumes"), [("0", "3", False), ("1", "0", False), ("2", "1", True)]
)
def test_restarted_job_resumes_where_there_is_a_checkpoint(
    tmp_path: Path, restarts: str, checkpoints: str, resumes: bool
) -> None:
    submit(tmp_path, FAKE_PYTHON, "run.yaml", SLURM_RESTART_COUNT=restarts, CHECKPOINTS=checkpoints)
    text = (tmp_path / "ranks.log").read_text()
    assert text.count("training.resume_from_checkpoint=latest-valid") == (2 if resumes else 0)


@pytest.mark.parametrize(
    ("code", "requeues"), [(75, True), (138, True), (143, True), (0, False), (2, False), (5, False), (6, False)]
)
def test_only_a_job_that_was_asked_to_stop_queues_itself_again(tmp_path: Path, code: int, requeues: bool) -> None:
    assert submit(tmp_path, FAKE_PYTHON, "run.yaml", LAST_CODE=str(code), FIRST_CODE=str(code)) == code
    assert was_requeued(tmp_path) == requeues


def test_a_job_that_cannot_count_its_checkpoints_does_not_begin_again(tmp_path: Path) -> None:
    assert submit(tmp_path, FAKE_PYTHON, "run.yaml", SLURM_RESTART_COUNT="1", CHECKPOINTS="", COUNT_CODE="4") == 4
    assert not (tmp_path / "ranks.log").exists()


def test_a_task_of_an_array_queues_itself_alone(tmp_path: Path) -> None:
    """The last task of an array has the array's own number, which means all of its tasks."""
    array = {"SLURM_JOB_ID": "31", "SLURM_ARRAY_JOB_ID": "31", "SLURM_ARRAY_TASK_ID": "7"}
    assert submit(tmp_path, FAKE_PYTHON, "run.yaml", LAST_CODE="75", FIRST_CODE="75", **array) == 75
    assert (tmp_path / "scontrol.log").read_text() == "requeue 31_7\n"


def test_a_job_that_slurm_does_not_queue_again_says_how_to_go_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert submit(tmp_path, FAKE_PYTHON, "run.yaml", LAST_CODE="75", FIRST_CODE="75", REQUEUE_CODE="1") == 75
    assert "submit it with training.resume_from_checkpoint=latest-valid" in capfd.readouterr().err


def test_names_of_many_nodes_that_come_in_pieces(tmp_path: Path) -> None:
    assert submit(tmp_path, FAKE_PYTHON, "run.yaml", MANY_NODES="1") == 0
    assert " node-a 20031 " in (tmp_path / "ranks.log").read_text()


def test_a_job_without_a_config_says_so_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert submit(tmp_path, FAKE_PYTHON) == 2
    assert capfd.readouterr().err.count("usage: sbatch slurm.sbatch CONFIG") == 1


def test_blanks_in_names_reach_every_rank(tmp_path: Path) -> None:
    arguments = ("my runs/a *.yaml", "training.output_dir=out put/$HOME")
    submit(tmp_path, FAKE_PYTHON, *arguments, SLURM_RESTART_COUNT="1", CHECKPOINTS="2")
    resumed = f"fastpref train {' '.join(arguments)} training.resume_from_checkpoint=latest-valid\n"
    assert (tmp_path / "ranks.log").read_text().count(resumed) == 2


def test_failure_of_one_rank_is_the_job_s(tmp_path: Path) -> None:
    assert submit(tmp_path, FAKE_PYTHON, "run.yaml", LAST_CODE="6", FIRST_CODE="0") == 6
    assert not was_requeued(tmp_path)


def test_signal_before_the_time_limit_saves_and_the_next_job_goes_on(project: Path) -> None:
    """A real run of one rank: SIGUSR1 after its first log, exit code 75, a checkpoint, and the rest of its steps."""
    settings = ("run.yaml", "training.max_steps=30", "training.save_total_limit=2")
    one_task = {"SLURM_NTASKS": "1", "FIRST_NODE": "127.0.0.1", "SLURM_JOB_ID": str(os.getpid())}
    code = submit(project, REAL_PYTHON, *settings, SIGNAL_AT=str(project / "out" / "metrics.jsonl"), **one_task)
    assert code == 75 and was_requeued(project)
    (saved,) = (project / "out" / "checkpoints").glob("step-*")
    step = int(saved.name.removeprefix("step-"))
    assert 0 < step < 30
    assert submit(project, REAL_PYTHON, *settings, SLURM_RESTART_COUNT="1", **one_task) == 0
    assert (project / "out" / "checkpoints" / "step-30").is_dir()
