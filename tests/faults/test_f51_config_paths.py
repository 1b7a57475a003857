"""Fault 51: a run writes under its output directory and nowhere else, and paths mean what they say."""

import os
from pathlib import Path

import pytest


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_train_writes_under_its_output_directory_only(
    project: Path, run_cli, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    home = tmp_path_factory.mktemp("home")
    for name in ("HOME", "XDG_CACHE_HOME", "HF_HOME", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, str(home))
    before = tree(project)
    result = run_cli("train", "run.yaml", "training.max_steps=1", "training.report_to=[tensorboard]")
    assert result.exit_code == 0, result.output
    written = tree(project) - before
    assert "out/metrics.jsonl" in written
    assert [path for path in written if path != "out" and not path.startswith("out" + os.sep)] == []
    assert tree(home) == set()


def test_check_writes_nothing(project: Path, run_cli) -> None:
    before = tree(project)
    assert run_cli("check", "run.yaml").exit_code == 0
    assert tree(project) == before


@pytest.mark.parametrize("path", ["~", "~/runs", "~root/runs", "a\\0b"])
@pytest.mark.parametrize("key", ["training.output_dir", "model.tokenizer", "data.train", "data.eval"])
def test_shell_paths_are_refused(project: Path, run_cli, key: str, path: str) -> None:
    before = tree(project)
    result = run_cli("train", "run.yaml", f'{key}="{path}"')
    assert result.exit_code == 2
    assert f"{key}: " in result.stderr and "write the path out" in result.stderr
    assert tree(project) == before


@pytest.mark.parametrize("path", ["%00", "${HOME}/runs", "$(touch x)", "a b"])
def test_other_signs_are_only_characters(project: Path, run_cli, path: str) -> None:
    result = run_cli("train", "run.yaml", "training.max_steps=1", f"training.output_dir={path!r}")
    assert result.exit_code == 0, result.output
    assert (project / path / "metrics.jsonl").exists()
