"""What a run shows and records, from rank 0 only: progress, `metrics.jsonl`, TensorBoard, Weights & Biases."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fastpref.errors import ConfigError, MissingDependencyError
from fastpref.files import write_durably
from fastpref.run.plan.announce import announce, clock

if TYPE_CHECKING:
    from fastpref.run.config.arguments import TrainingArguments

METRICS_FILE = "metrics.jsonl"
_STATUS = {"loss": "loss {:.3f}", "rewards/accuracies": "acc {:.3f}", "rewards/margins": "margin {:z.3f}"}
_LINE = {
    "loss": "loss {:.4f}",
    "rewards/accuracies": "accuracy {:.3f}",
    "rewards/margins": "margin {:z.4f}",
    "lr": "lr {:.2e}",
    "perf/pairs_per_second": "{:,.1f} pairs/s",
    "perf/tokens_per_second": "{:,.0f} tokens/s",
}
_EVALUATION = {
    "eval_loss": "loss {:.4f}",
    "eval_rewards/accuracies": "accuracy {:.3f}",
    "eval_rewards/margins": "margin {:z.4f}",
}


class RunReporter:
    """Writes metrics of a run under `args.output_dir`; does nothing on ranks other than 0.

    Args:
        args: the run's settings.
        rank: this process's rank.
        total_steps: length of the progress bar.
        first_step: optimizer steps done before; records after it are dropped from `metrics.jsonl`, all of them at 0.
    """

    def __init__(self, args: TrainingArguments, rank: int, total_steps: int, first_step: int) -> None:
        self.active = rank == 0
        self._args, self._first_step, self._total_steps = args, first_step, total_steps
        is_terminal = sys.stderr.isatty()
        # Whatever FORCE_COLOR asks for, a file gets no control codes.
        self._console = Console(file=_LastingStderr(), force_terminal=is_terminal)  # type: ignore[arg-type]
        self._has_warned = False
        self._writers: list[_TensorBoardWriter | _WandbWriter] = []
        self._progress: Progress | None = None
        if not self.active:
            return
        self.output_dir = Path(args.output_dir)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        # First, as a package may be missing: the records of an earlier run are then still there.
        if "tensorboard" in args.report_to:
            self._writers.append(_TensorBoardWriter(self.output_dir / "tensorboard", first_step))
        if "wandb" in args.report_to:
            self._writers.append(_WandbWriter(self.output_dir))
        if first_step:
            _drop_records_after(self.output_dir / METRICS_FILE, first_step)
        else:
            (self.output_dir / METRICS_FILE).unlink(missing_ok=True)
        self._file = (self.output_dir / METRICS_FILE).open("a", encoding="utf-8")
        # A bar is drawn over and over, which only a terminal can show; elsewhere there is a line for each log.
        has_bar = (is_terminal and not self._console.is_dumb_terminal) or self._console.is_jupyter
        if has_bar and not args.disable_progress:
            self._progress = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[status]}"),
                console=self._console,
            )
            self._task = self._progress.add_task("train", total=total_steps, completed=first_step, status="")

    def __enter__(self) -> RunReporter:
        self._start = time.monotonic()
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.active:
            return
        if self._progress is not None:
            self._progress.stop()
        self._file.close()
        for writer in self._writers:
            writer.close()

    def advance(self) -> None:
        """Moves the progress bar by one step."""
        if self._progress is not None:
            self._progress.advance(self._task)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records `metrics` at `step` in every writer."""
        if not self.active:
            return
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        for writer in self._writers:
            writer.log(step, metrics)
        if metrics.get("alarm/likelihood_displacement") and not self._has_warned:
            self._has_warned = True
            self._console.print(
                f"[yellow]step {step}: chosen answers are less likely than under the reference and still fall "
                "(likelihood displacement); consider an sft term in pref_loss, or a larger beta",
                soft_wrap=True,
            )
        self._show(step, metrics)

    def _show(self, step: int, metrics: Mapping[str, float]) -> None:
        """The bar's status, or a line; of an evaluation always a line."""
        place = f"step {step:,}/{self._total_steps:,}"
        evaluation = _shown(metrics, _EVALUATION)
        if evaluation:
            announce(self._args, f"{place}  evaluation: {evaluation}")
        if self._progress is None:
            numbers = _shown(metrics, _LINE)
            if numbers:
                announce(self._args, f"{place}  {numbers}  ETA {self._time_left(step)}")
        elif "loss" in metrics:
            self._progress.update(self._task, status=_shown(metrics, _STATUS))

    def _time_left(self, step: int) -> str:
        done = max(1, step - self._first_step)
        return clock((time.monotonic() - self._start) / done * (self._total_steps - step))


def _shown(metrics: Mapping[str, float], formats: Mapping[str, str]) -> str:
    return "  ".join(text.format(metrics[name]) for name, text in formats.items() if name in metrics)


class _LastingStderr:
    """Standard error as it is now; where its terminal is gone, what is shown is dropped and the run goes on."""

    def __init__(self) -> None:
        self._file = sys.stderr

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class _TensorBoardWriter:
    def __init__(self, directory: Path, first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing("tensorboard") from error
        # `purge_step` hides the events of steps that a resumed run repeats.
        self._writer = SummaryWriter(str(directory), purge_step=first_step + 1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandbWriter:
    def __init__(self, directory: Path) -> None:
        try:
            import wandb
        except ImportError as error:
            raise _missing("wandb") from error
        try:
            self._run = wandb.init(dir=str(directory))
        except Exception as error:  # of its own kinds, or of its network's
            raise ConfigError(
                f"report_to: wandb did not start: {type(error).__name__}: {error}; log in with `wandb login`, set "
                "WANDB_MODE=offline, or leave it out"
            ) from error

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


def _missing(writer: str) -> MissingDependencyError:
    # what reads the records of a run imports this module, and needs no settings
    from fastpref.run.config.arguments import MISSING_WRITERS

    return MissingDependencyError(MISSING_WRITERS[writer])


def _drop_records_after(path: Path, step: int) -> None:
    """Removes records of steps that are about to be repeated, and a last line that was cut off."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break
        if record["step"] <= step:
            kept.append(line + "\n")
    write_durably(path, "".join(kept).encode())
