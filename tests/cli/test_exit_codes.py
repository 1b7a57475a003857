"""How commands fail: the code, one message on stderr, no traceback unless asked for."""

import contextlib
import io
import subprocess
import sys
from pathlib import Path

import pytest

import fastpref
from fastpref.cli.failures import describe, say_once
from fastpref.errors import ConfigError
from fastpref.testing.workers import RankPool
from fastpref.trainer.ranks import platform


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train", "missing.yaml"], 2, "fastpref: config error: the run file missing.yaml does not exist"),
        (["train", "run.yaml", "training.sed=1"], 2, "training.sed is not a known key; did you mean seed?"),
        (
            ["train", "run.yaml", "model.path=nowhere", "model.config=null"],
            2,
            "model.path: 'nowhere' is not a directory",
        ),
        (
            ["train", "run.yaml", "model.path=org/model", "model.config=null"],
            2,
            "which is not asked here, run `hf download org/model --local-dir model` and give model",
        ),
        (["check", "run.yaml", "data.train=a.jsonl,b.jsonl"], 2, "several files are a list, [a.jsonl,b.jsonl]"),
        (["check", "run.yaml", "data.train=hf://datasets/a/b.parquet"], 2, "only local files are read"),
        (["train", "run.yaml", "training.resume_from_checkpoint=auto"], 4, "auto is no directory; name one"),
        (
            ["train", "run.yaml", "training.resume_from_checkpoint=hf"],
            4,
            "hf is no checkpoint of fastpref; give a model",
        ),
        (["train", "run.yaml", "data.train=broken.jsonl"], 3, "fastpref: data error: broken.jsonl:1"),
        (["train", "run.yaml", "training.resume_from_checkpoint=latest"], 4, "fastpref: checkpoint error: no finished"),
        (["export", "run.yaml", "--output", "model"], 4, "fastpref: checkpoint error: no finished checkpoint"),
        (["eval", "run.yaml", "data.eval=[]"], 2, "data.eval names no file"),
        (["plot", "nowhere"], 3, "fastpref: data error: nowhere/metrics.jsonl: cannot be read"),
        (["check", "run.yaml", "--world-size", "0"], 2, "0 is not in the range x>=1"),
        (["train"], 2, "Missing argument 'CONFIG'"),
        (["nonsense"], 2, "No such command 'nonsense'"),
    ],
)
def test_command_fails(project: Path, run_cli, arguments: list[str], code: int, message: str) -> None:
    (project / "broken.jsonl").write_text("{not json}\n")
    (project / "hf").mkdir()
    (project / "hf" / "config.json").write_text("{}")
    result = run_cli(*arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr and result.stdout == ""


def test_train_fails_on_a_loss_that_is_not_finite(project: Path, run_cli) -> None:
    result = run_cli("train", "run.yaml", "loss.beta=1e38", "training.max_steps=3")
    assert result.exit_code == 5
    assert "fastpref: non-finite error:" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "arguments", [["train", "run.yaml", "x=1", "--debug"], ["train", "--debug", "run.yaml", "x=1"]]
)
def test_debug_keeps_the_traceback(project: Path, run_cli, arguments: list[str]) -> None:
    result = run_cli(*arguments)
    assert isinstance(result.exception, ConfigError)


def test_describe_knows_a_full_disk_and_a_lost_peer() -> None:
    import errno

    import torch.distributed

    assert describe(OSError(errno.ENOSPC, "No space left on device", "out/step-1"))[1] == 7
    assert describe(torch.distributed.DistBackendError("peer gone"))[1] == 6
    assert describe(ImportError("No module named 'ruamel'", name="ruamel.yaml"))[1] == 2
    assert describe(ImportError("our own bug", name="fastpref.nowhere")) is None
    assert describe(ZeroDivisionError()) is None
    assert describe(PermissionError(errno.EACCES, "Permission denied")) is None


def test_version_and_help(run_cli) -> None:
    assert run_cli("--version").output == f"fastpref, version {fastpref.__version__}\n"
    for command in ("train", "eval", "export", "check", "plot"):
        assert command in run_cli("--help").output
        assert run_cli(command, "--help").exit_code == 0


def run_without(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = f"import sys; sys.modules[{module!r}] = None; sys.argv = ['fastpref', *{list(arguments)!r}]\n"
    program += "from fastpref.cli import main; main()"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("module", "arguments", "code"),
    [
        ("click", ["--version"], 1),
        ("megatron", ["train", "run.yaml"], 2),
        ("ruamel", ["check", "run.yaml"], 2),
        ("matplotlib", ["plot", "."], 2),
    ],
)
def test_missing_package_names_the_extra(project: Path, module: str, arguments: list[str], code: int) -> None:
    (project / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    result = run_without(module, *arguments)
    assert result.returncode == code
    assert module in result.stderr and 'pip install "fastpref[megatron]"' in result.stderr
    assert "Traceback" not in result.stderr


def said_on_this_rank(messages: list[str]) -> str:
    import torch.distributed

    platform.initialize_distributed()
    with contextlib.redirect_stderr(io.StringIO()) as said:
        say_once(messages[torch.distributed.get_rank()])
    return said.getvalue()


def test_error_of_all_ranks_is_said_by_the_first(rank_pool_2: RankPool) -> None:
    assert rank_pool_2.run(said_on_this_rank, ["same", "same"]) == ["same\n", ""]


def test_error_of_one_rank_is_said_by_it(rank_pool_2: RankPool) -> None:
    assert rank_pool_2.run(said_on_this_rank, ["mine", "yours"]) == ["mine\n", "[rank 1] yours\n"]
