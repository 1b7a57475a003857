"""Train for a while on real ranks that are killed at random, again and again, and end like a run left alone.

    python -m checks.soak                      # 300 steps of examples/quickstart.yaml; `make soak`
    python -m checks.soak --steps 12 --kills 2 --output short.json
    python -m checks.soak --table              # what the last soak wrote, once more

- The ranks are started as a user starts them, by torchrun; the driver is another process and kills from outside: while
  they start, in a step, or inside a save.
- Whom, with which signal and when is drawn from a seed. What a signal hit exactly is up to the machine, and recorded.
- After each death the run is started again with `resume_from_checkpoint: latest-valid`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from checks.run_end import difference, read_end
from fastpref.checkpoint import directory

CONFIG = "examples/quickstart.yaml"
RESULTS = Path("bench/results/soak.json")
RANKS = 2
SAVE_STEPS = 20
# Each with its share of the kills, and how long after its beginning a signal may come, in seconds.
MOMENTS = {"starting": (1, 12.0), "in a step": (2, 0.5), "inside a save": (2, 0.25)}
SIGNALS = {signal.SIGKILL: 3, signal.SIGTERM: 1}
POLL_S = 0.002
# After a signal: SIGTERM lets ranks finish their step and save.
DEATH_S = 90.0


@dataclass(frozen=True)
class Kill:
    """A signal to come."""

    step: int
    """Not before this step is logged."""
    moment: str
    """A key of `MOMENTS`."""
    victim: int | None
    """A rank; None for all ranks and their launcher."""
    number: signal.Signals
    """SIGKILL or SIGTERM."""
    delay_s: float
    """From the beginning of the moment."""


@dataclass
class Hit:
    """What a signal did."""

    signal: str
    victim: str
    moment: str
    step: int
    """Last step that was logged."""
    unfinished_save: bool
    """A save was under way and did not get its name."""
    resumed_from: int
    """Step of the newest finished checkpoint; 0 for none."""
    steps_lost: int
    """Steps that had to be done again."""


@dataclass
class Outcome:
    """A soak, as it is written to disk."""

    seed: int
    steps: int
    ranks: int
    overrides: list[str]
    kills_planned: int
    hits: list[Hit] = field(default_factory=list)
    seconds_undisturbed: float = 0.0
    seconds: float = 0.0
    result: str = "not finished"
    tensors: int = 0
    numbers: int = 0
    records: int = 0


def plan_kills(count: int, steps: int, seed: int) -> list[Kill]:
    """Draw signals for a run, in the order of their steps."""
    rng = random.Random(seed)
    kills = []
    for _ in range(count):
        moment = rng.choices(list(MOMENTS), [share for share, _ in MOMENTS.values()])[0]
        kills.append(
            Kill(
                step=rng.randrange(steps),
                moment=moment,
                victim=rng.choice([*range(RANKS), None]),
                number=rng.choices(list(SIGNALS), list(SIGNALS.values()))[0],
                delay_s=rng.uniform(0.0, MOMENTS[moment][1]),
            )
        )
    return sorted(kills, key=lambda kill: kill.step)


class Job:
    """A command on `RANKS` ranks under torchrun, with its output in a file; nothing of it survives the block."""

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with log.open("ab") as file:
            self.launcher = psutil.Popen(
                [*torchrun, "-m", "fastpref", *arguments], env=environment, stdout=file, stderr=subprocess.STDOUT
            )
        self._ranks: dict[int, psutil.Process] = {}

    def ranks(self) -> dict[int, psutil.Process]:
        """The ranks' processes, as far as they have been started; torchrun leaves them behind when it is killed."""
        if len(self._ranks) < RANKS:
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in self.launcher.children():
                    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                        if (rank := child.environ().get("RANK")) is not None:
                            self._ranks[int(rank)] = child
        return self._ranks

    def send(self, number: signal.Signals, victim: int | None) -> None:
        """Signal one rank, or all: SIGTERM as a scheduler does, to the launcher; SIGKILL as a power cut does."""
        if victim is not None:
            targets = [self.ranks()[victim]]
        elif number == signal.SIGTERM:
            targets = [self.launcher]
        else:
            targets = [self.launcher, *self.ranks().values()]
        for process in targets:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def is_running(self) -> bool:
        """Whether the launcher still runs."""
        return self.launcher.poll() is None

    def wait(self, timeout_s: float) -> int:
        """Wait until launcher and ranks are gone, and return the launcher's exit code.

        Raises:
            TimeoutError: they are not.
        """
        ranks = self.ranks()
        try:
            code = self.launcher.wait(timeout_s)
        except psutil.TimeoutExpired as error:
            raise TimeoutError(f"the run did not end within {timeout_s:.0f} s") from error
        _, alive = psutil.wait_procs(ranks.values(), timeout=DEATH_S)
        if alive:
            raise TimeoutError(f"{len(alive)} ranks outlived their launcher by {DEATH_S:.0f} s")
        return code

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        for process in (self.launcher, *self.ranks().values()):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.launcher.wait()


class Soak:
    """One soak: an undisturbed run and a disturbed one, side by side in a folder.

    Args:
        outcome: what to do, and where the results go.
        folder: an empty directory.
        deadline: when to stop, by `time.monotonic()`.
        launch: starts the arguments of `fastpref` on `RANKS` ranks, with their output in a file.
    """

    def __init__(
        self, outcome: Outcome, folder: Path, deadline: float, launch: Callable[[Sequence[str], Path], Job] = Job
    ) -> None:
        self.outcome, self.deadline, self._launch = outcome, deadline, launch
        self.whole, self.output = folder / "undisturbed", folder / "disturbed"
        self.root, self.log = self.output / "checkpoints", folder / "output.log"

    def run(self) -> None:
        """Do everything, and fill in the outcome."""
        outcome, start = self.outcome, time.monotonic()
        with self._start(self.whole, resume=False) as job:
            self._must_succeed(job.wait(max(0.0, self.deadline - time.monotonic())))
        outcome.seconds_undisturbed = time.monotonic() - start
        start = time.monotonic()
        kills = plan_kills(outcome.kills_planned, outcome.steps, outcome.seed)
        while True:
            with self._start(self.output, resume=bool(directory.finished_steps(self.root))) as job:
                hit = self._strike(job, kills.pop(0)) if kills else None
                if hit is None:
                    self._must_succeed(job.wait(max(0.0, self.deadline - time.monotonic())))
                    break
                outcome.hits.append(hit)
        outcome.seconds = time.monotonic() - start
        ours, theirs = read_end(self.output), read_end(self.whole)
        outcome.tensors, outcome.numbers, outcome.records = len(ours.tensors), ours.num_elements, len(ours.log)
        outcome.result = difference(ours, theirs) or "bitwise equal"
        # a run that is told to stop has to save what it has
        if any(hit.steps_lost for hit in outcome.hits if hit.signal == "SIGTERM" and hit.moment != "starting"):
            outcome.result = f"SIGTERM lost steps; {outcome.result}"

    def _start(self, output: Path, *, resume: bool) -> Job:
        settings = {
            "output_dir": output,
            "resume_from_checkpoint": "latest-valid" if resume else "null",
            "max_steps": self.outcome.steps,
            "warmup_steps": min(20, self.outcome.steps // 2),
            "save_steps": min(SAVE_STEPS, max(1, self.outcome.steps // 4)),
            "save_total_limit": 2,
            # a window of several steps that a death cut in two would not be the same mean
            "logging_steps": 1,
            "report_to": "[]",
            "disable_progress": "true",
        }
        arguments = [f"training.{name}={value}" for name, value in settings.items()]
        return self._launch(["train", CONFIG, *self.outcome.overrides, *arguments], self.log)

    def _must_succeed(self, code: int) -> None:
        if code:
            tail = self.log.read_text(encoding="utf-8", errors="replace")[-4000:]
            raise RuntimeError(f"a run that nobody disturbed ended with exit code {code}:\n{tail}")

    def _strike(self, job: Job, kill: Kill) -> Hit | None:
        """Wait for the moment and send the signal; None where the run is over before."""
        seen = last_step(self.output)
        while not self._is_moment(job, kill, seen):
            if not job.is_running() or time.monotonic() > self.deadline:
                return None
            time.sleep(POLL_S)
        time.sleep(kill.delay_s)
        if not job.is_running():
            return None
        step = last_step(self.output)
        job.send(kill.number, kill.victim)
        job.wait(DEATH_S)
        resumed_from = max(directory.finished_steps(self.root), default=0)
        return Hit(
            signal=kill.number.name,
            victim="all ranks" if kill.victim is None else f"rank {kill.victim}",
            moment=kill.moment,
            step=step,
            unfinished_save=any(self.root.glob("step-*.tmp-*")),
            resumed_from=resumed_from,
            steps_lost=max(0, last_step(self.output) - resumed_from),
        )

    def _is_moment(self, job: Job, kill: Kill, seen: int) -> bool:
        if len(job.ranks()) < RANKS:
            return False
        if kill.moment == "starting":
            return True
        # records of the run before stay until it has started
        if last_step(self.output) <= max(seen, kill.step - 1):
            return False
        return kill.moment == "in a step" or any(self.root.glob("step-*.tmp-*"))


def last_step(output_dir: Path) -> int:
    """Step of the last whole record in the metrics log of a run; 0 where there is none."""
    try:
        with (output_dir / "metrics.jsonl").open("rb") as file:
            file.seek(-min(file.seek(0, os.SEEK_END), 20_000), os.SEEK_END)
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return 0
    return json.loads(lines[-2])["step"] if len(lines) > 1 else 0


def table_of(outcome: Outcome) -> Table:
    """Counts what the signals hit, and what it cost."""
    table = Table("signal", "to", "while", "kills", "save left unfinished", "steps done again", box=MARKDOWN)
    kinds = dict.fromkeys((hit.signal, hit.victim, hit.moment) for hit in outcome.hits)
    for kind in sorted(kinds):
        mine = [hit for hit in outcome.hits if (hit.signal, hit.victim, hit.moment) == kind]
        counts = (len(mine), sum(hit.unfinished_save for hit in mine), sum(hit.steps_lost for hit in mine))
        table.add_row(*kind, *map(str, counts))
    hits = outcome.hits
    totals = (len(hits), sum(hit.unfinished_save for hit in hits), sum(hit.steps_lost for hit in hits))
    table.add_row("all", "", "", *map(str, totals))
    return table


def summary(outcome: Outcome) -> str:
    """Says in one sentence how a soak ended."""
    return (
        f"{outcome.steps} steps on {outcome.ranks} ranks, {len(outcome.hits)} times killed and started again, in "
        f"{outcome.seconds:.0f} s ({outcome.seconds_undisturbed:.0f} s undisturbed): {outcome.result} in "
        f"{outcome.tensors} tensors of {outcome.numbers:,} numbers and {outcome.records} logged records"
    )


def main() -> int:
    """Soaks, or shows the last results; returns 1 unless the run ended in the same bits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of both runs")
    parser.add_argument("--kills", type=int, default=16, help="signals to send")
    parser.add_argument("--seed", type=int, default=0, help="of whom to kill, how and when")
    parser.add_argument("--minutes", type=float, default=15.0, help="when to give up")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the results go, as JSON")
    parser.add_argument("--table", action="store_true", help="run nothing; show the results in --output as Markdown")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, as for fastpref train")
    options = parser.parse_args()
    if options.table:
        content: dict[str, Any] = json.loads(options.output.read_text(encoding="utf-8"))
        outcome = Outcome(**{**content, "hits": [Hit(**hit) for hit in content["hits"]]})
    else:
        outcome = Outcome(options.seed, options.steps, RANKS, options.overrides, options.kills)
        deadline = time.monotonic() + 60 * options.minutes
        with tempfile.TemporaryDirectory(prefix="fastpref-soak-") as folder:
            try:
                Soak(outcome, Path(folder), deadline).run()
            finally:
                options.output.parent.mkdir(parents=True, exist_ok=True)
                options.output.write_text(json.dumps(asdict(outcome), indent=1) + "\n", encoding="utf-8")
    console = Console(width=160)
    console.print(table_of(outcome))
    console.print(summary(outcome))
    return int(outcome.result != "bitwise equal")


if __name__ == "__main__":
    sys.exit(main())
