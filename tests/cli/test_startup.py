"""What no command waits for: help, version and completions import no PyTorch, and curves are drawn without it."""

import os
import pickle
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastpref
from fastpref.cli.commands import cli
from fastpref.cli.kernel_commands import kernels

HEAVY = ["torch", "megatron", "numpy", "transformers", "pydantic", "matplotlib", "triton"]
COMMANDS = [[name] for name in cli.commands] + [["kernels", name] for name in kernels.commands]
MAIN = f"""
import sys
from fastpref.cli import main
try:
    main()
finally:
    print("loaded:", *(name for name in {HEAVY} if name in sys.modules), file=sys.stderr)
"""
BLOCK = """
import sys
class Block:
    def find_spec(self, name, *_):
        if name.split(".")[0] in {names}:
            raise AssertionError(f"{{name}} was imported")
sys.meta_path.insert(0, Block())
"""


def run_main(*arguments: str, first: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", first + MAIN, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | environment)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], *([*command, "--help"] for command in COMMANDS)], ids=" ".join
)
def test_help_and_version_import_no_torch(arguments: list[str]) -> None:
    result = run_main(*arguments)
    assert result.stderr == "loaded:\n"
    assert ("Usage: fastpref" if arguments[-1] == "--help" else fastpref.__version__) in result.stdout


@pytest.mark.parametrize(
    ("words", "completions"),
    [
        ("fastpref tr", ["plain,train"]),
        ("fastpref kernels in", ["plain,info", "plain,inspect"]),
        ("fastpref export run.yaml --mer", ["plain,--merge"]),
        ("fastpref train run", ["file,run"]),
    ],
)
def test_completion_imports_no_torch(words: str, completions: list[str]) -> None:
    index = str(len(words.split()) - 1)
    result = run_main(_FASTPREF_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD=index)
    assert result.stdout.split() == completions
    assert result.stderr == "loaded:\n"


def test_help_answers_at_once() -> None:
    """In 0.13 s; seconds of CPU, the best of five, for the other processes of the machine are not its own."""
    command = [sys.executable, "-m", "fastpref", "--help"]
    taken_s = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken_s.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert 0 < min(taken_s) < 0.5


def test_plot_needs_neither_megatron_nor_torch(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5}\n')
    result = run_main("plot", str(tmp_path), first=BLOCK.format(names=["torch", "megatron", "pydantic"]))
    assert result.stderr == "loaded: numpy matplotlib\n"
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_plot_fails_as_ever_without_torch(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        run_main("plot", str(tmp_path), first=BLOCK.format(names=["torch", "megatron"]))
    assert caught.value.returncode == 3
    assert "fastpref: data error:" in caught.value.stderr and "Traceback" not in caught.value.stderr


def test_public_names_are_found_when_asked_for() -> None:
    program = (
        "import sys, fastpref; assert 'torch' not in sys.modules; "
        "assert {'linear_logps', 'SequenceLogps', '__version__'} <= set(dir(fastpref)); "
        "from fastpref import *; assert linear_logps is fastpref.linear_logps is fastpref.kernels.linear_logps; "
        "assert 'linear_logps' in vars(fastpref) and 'torch' in sys.modules; "
        "import fastpref.losses; assert fastpref.errors.ConfigError"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert all(getattr(fastpref, name) is not None for name in fastpref.__all__)
    with pytest.raises(AttributeError, match=r"no attribute .linear_logp.; it has ScreenedHead, SequenceLogps, "):
        fastpref.linear_logp  # noqa: B018
    with pytest.raises(ImportError, match="linear_logp"):
        from fastpref import linear_logp  # noqa: F401


def test_public_names_can_be_pickled() -> None:
    assert pickle.loads(pickle.dumps(fastpref.linear_logps)) is fastpref.linear_logps
    assert pickle.loads(pickle.dumps(fastpref.SequenceLogps)) is fastpref.SequenceLogps


def test_compiled_code_finds_the_op_through_the_package() -> None:
    hidden, weight, labels = torch.randn(2, 8, 16), torch.randn(50, 16), torch.randint(50, (2, 8))
    vars(fastpref).pop("linear_logps", None)

    @torch.compile(fullgraph=True)
    def score(hidden: torch.Tensor) -> torch.Tensor:
        return fastpref.linear_logps(hidden, weight, labels).logps

    torch.testing.assert_close(score(hidden), fastpref.linear_logps(hidden, weight, labels).logps)
