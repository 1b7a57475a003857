"""What an installed package tells a user's type checker: its annotations are seen, and hide nothing by accident."""

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CASES = Path(__file__).parent / "typing_cases"
PUBLIC = ("fastpref", "fastpref.kernels", "fastpref.losses", "fastpref.data", "fastpref.trainer")
# Public names whose types have an `Any` in them, and why.
HAS_ANY = {
    *("fastpref.data.load_tokenizer", "fastpref.data.resolve_pad_token_id"),  # any object with the methods that we call
    *("fastpref.data.load_dataset", "fastpref.data.tokenize_pairs"),  # they take such a tokenizer
    *("fastpref.data.Message", "fastpref.data.PreferencePair", "fastpref.data.DataConfig"),  # values for a template
    *("fastpref.trainer.build_models", "fastpref.trainer.load_models", "fastpref.trainer.save_hf"),  # Megatron's model,
    *("fastpref.trainer.add_lora", "fastpref.trainer.ModelConfig"),  # which has no types, or contents of a config.json
    "fastpref.trainer.score_reference",  # an identity is JSON
    "fastpref.trainer.DPOTrainer",  # any data set and tokenizer
}
needs_setuptools = pytest.mark.skipif(
    importlib.util.find_spec("setuptools") is None or int(importlib.metadata.version("setuptools").split(".")[0]) < 77,
    reason="the build needs setuptools >= 77",
)
needs_mypy = pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with the package as a wheel installs it, save the CPU engine, and all that is installed here."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False, symlinks=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = folder / "lib" / version / "site-packages"
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    steps = ["egg_info", "--egg-base", str(folder), "build_py", "--build-lib", str(packages)]
    subprocess.run([sys.executable, "setup.py", "-q", *steps], cwd=ROOT, capture_output=True, check=True)
    return packages


@pytest.fixture(scope="module")
def messages(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What `mypy --strict` says about a user's scripts, and about the type of every public name."""
    folder = tmp_path_factory.mktemp("mypy")
    names = [f"{module}.{name}" for module in PUBLIC for name in importlib.import_module(module).__all__]
    reveal = [*(f"import {module}" for module in PUBLIC), *(f"reveal_type({name})  # {name}" for name in names)]
    (folder / "reveal.py").write_text("\n".join(reveal), encoding="utf-8")
    python = str(installed.parents[2] / "bin" / "python")
    options = ["--strict", "--config-file=", "--cache-dir", str(folder / "cache"), "--python-executable", python]
    files = [str(file) for file in (CASES / "right.py", CASES / "wrong.py", folder / "reveal.py")]
    command = [sys.executable, "-m", "mypy", *options, *files]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 1 and not result.stderr, result.stdout + result.stderr
    return result.stdout.splitlines()


@needs_setuptools
@needs_mypy
def test_right_script_has_no_error(messages: list[str]) -> None:
    assert [message for message in messages if "right.py" in message] == []


@needs_setuptools
@needs_mypy
def test_mistakes_are_found_where_they_are(messages: list[str]) -> None:
    lines = (CASES / "wrong.py").read_text(encoding="utf-8").splitlines()
    expected = [
        (number, match[1]) for number, line in enumerate(lines, 1) if (match := re.search(r"# ([\w-]+)$", line))
    ]
    found = [re.search(r"wrong\.py:(\d+): error: .*\[([\w-]+)\]$", message) for message in messages]
    assert [(int(match[1]), match[2]) for match in found if match] == expected


@needs_setuptools
@needs_mypy
def test_types_of_public_names_hide_nothing(installed: Path, messages: list[str]) -> None:
    names = [f"{module}.{name}" for module in PUBLIC for name in importlib.import_module(module).__all__]
    revealed = dict(zip(names, (message for message in messages if "Revealed type" in message), strict=True))
    assert {name for name, message in revealed.items() if re.search(r"\bAny\b", message)} == HAS_ANY
