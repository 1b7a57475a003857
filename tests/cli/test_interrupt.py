"""Ctrl-C outside of training's steps: one line, exit code 130, and nothing half-written under its final name."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from fastpref import cli as command_line
from fastpref.checkpoint import hf
from fastpref.run.plan import prepare as preparation
from fastpref.run.record import curves
from fastpref.trainer import build, loop, session
from fastpref.trainer.saves import stored


def interrupted(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    raise AssertionError("the command went on")  # pragma: no cover


@pytest.mark.parametrize(
    ("arguments", "place", "name"),
    [
        (["train"], preparation, "load_dataset"),
        (["train"], build, "build_models"),
        (["train"], session, "RunLock"),
        (["train", "training.eval_on_start=true"], loop, "evaluate"),
        (["check"], preparation, "load_dataset"),
        (["eval"], loop, "evaluate"),
        (["score-ref"], build, "score_reference"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_command_ends_at_once(
    project: Path,
    run_cli: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    place: Any,
    name: str,
) -> None:
    monkeypatch.setattr(place, name, interrupted)
    result = run_cli(arguments[0], "run.yaml", *arguments[1:])
    assert result.exit_code == 130, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("fastpref: interrupted")
    assert ("goes on where it stopped" in line) == (arguments == ["score-ref"])
    assert result.stdout == ""
    assert not (project / "out" / "checkpoints").exists() and not (project / "out" / "run.lock").exists()


def test_an_interrupted_export_leaves_nothing_and_says_how_to_make_it(
    project: Path, run_cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = hf.ModelWriter.write
    written = []

    def cut(self: hf.ModelWriter, name: str, tensor: Any) -> None:
        write(self, name, tensor)
        written.append(name)
        if len(written) == 3:
            interrupted()

    with monkeypatch.context() as patched:
        patched.setattr(hf.ModelWriter, "write", cut)
        stopped = run_cli("train", "run.yaml", "--export", "model")
    assert stopped.exit_code == 130
    assert "training is done; fastpref export --checkpoint out/checkpoints/step-3 writes the model" in stopped.stderr
    assert len(written) == 3 and not list(project.glob("model*"))
    written.clear()
    with monkeypatch.context() as patched:
        patched.setattr(hf.ModelWriter, "write", cut)
        assert run_cli("export", "run.yaml", "--output", "model").exit_code == 130
    assert not list(project.glob("model*"))
    remedy = run_cli("export", "run.yaml", "--checkpoint", "out/checkpoints/step-3", "--output", "model")
    assert remedy.exit_code == 0 and (project / "model" / "model.safetensors").exists()


def test_an_interrupted_resume_loses_nothing(
    project: Path, run_cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["train", "run.yaml", "training.save_steps=1", "training.save_total_limit=2"]
    assert run_cli(*settings).exit_code == 0
    before = sorted(project.glob("out/**/*"))
    with monkeypatch.context() as patched:
        patched.setattr(stored, "read_files", interrupted)
        stopped = run_cli(*settings, "training.resume_from_checkpoint=latest")
    assert stopped.exit_code == 130 and "before the first step of this run: nothing is lost" in stopped.stderr
    assert sorted(project.glob("out/**/*")) == before


def test_an_interrupted_picture_is_not_there(
    project: Path, run_cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    (project / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    savefig = Figure.savefig

    def cut(self: Figure, target: Any, **options: Any) -> None:
        savefig(self, target, **options)
        interrupted()

    monkeypatch.setattr(Figure, "savefig", cut)
    assert run_cli("plot", ".").exit_code == 130
    assert not (project / "curves.png").exists()
    monkeypatch.undo()
    curves.draw_curves(curves.read_metrics(project), project / "curves.png")
    assert (project / "curves.png").exists()


def test_debug_shows_where(project: Path, run_cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "load_dataset", interrupted)
    result = run_cli("check", "run.yaml", "--debug")
    assert result.exit_code == 130
    assert "Traceback" in result.stderr and result.stderr.endswith("fastpref: interrupted\n")


def test_an_interrupt_before_there_is_a_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """While modules are imported."""
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(command_line, "_run", interrupted)
    try:
        with pytest.raises(SystemExit) as ended:
            command_line.main()
    finally:
        signal.signal(signal.SIGINT, handler)
    assert ended.value.code == 130
    assert capsys.readouterr().err == "fastpref: interrupted\n"


def test_the_exit_code_of_an_interrupt_inside_an_exec(tmp_path: Path) -> None:
    """Libraries make classes of texts while they are imported, and `python -m` would then end by the signal itself."""
    cut = "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)"
    program = f"import fastpref.cli as command\ncommand._run = lambda: exec({cut!r})\ncommand.main()\n"
    (tmp_path / "cut.py").write_text(program)
    path = os.pathsep.join([str(tmp_path), str(Path(command_line.__file__).parents[2])])
    result = subprocess.run(
        [sys.executable, "-m", "cut"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert (result.returncode, result.stderr) == (130, "fastpref: interrupted\n")
