"""The README is short and its Python runs as it stands there; what it and the other documents point to exists."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE_MAP = (ROOT / "docs" / "code.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKS = sorted(
    {
        (str(file.relative_to(ROOT)), target)
        for file in DOCUMENTS
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", file.read_text(encoding="utf-8"))
    }
)
NAMED_TESTS = sorted(
    {(file.name, name) for file in DOCUMENTS for name in re.findall(r"`(tests/[\w/.]+)`", file.read_text())}
)
NAMED_FUNCTIONS = sorted(
    {
        found
        for file in DOCUMENTS
        for found in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", file.read_text(encoding="utf-8"))
    }
)
MAP_PATHS = sorted(set(re.findall(r"`((?:fastpref|csrc|checks|bench|tests|examples|docs)/[\w/.-]*)`", CODE_MAP)))


def test_readme_is_a_front_door() -> None:
    assert len(README.split()) <= 1200
    assert README.count("![") == 1


def test_readme_python_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert sum(bool(line) for line in code.splitlines()) == 10
    torch.manual_seed(0)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["scores"].logps.shape == (4,) and names["scores"].counts.tolist() == [88] * 4
    assert all(0 < names[name].grad.abs().sum() < float("inf") for name in ("hidden", "weight"))


def test_readme_run_file_is_read(tmp_path: Path) -> None:
    from fastpref.trainer import load_run_config

    (text,) = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    for file in ("pairs.jsonl", "heldout.jsonl"):
        (tmp_path / file).touch()
        text = text.replace(file, str(tmp_path / file))
    (tmp_path / "my_run.yaml").write_text(text.replace("/models/Llama-3.2-1B", str(tmp_path)), encoding="utf-8")
    config = load_run_config(tmp_path / "my_run.yaml")
    assert config.training.prefix_sharing and config.precomputes_reference and config.loss.loss_names == ("sigmoid",)


def test_readme_names_every_loss() -> None:
    from fastpref.losses import LOSSES

    (row,) = (line for line in README.splitlines() if line.startswith("| losses |"))
    assert set(LOSSES) <= set(re.findall(r"\w+", row))


def test_readme_names_every_family() -> None:
    from fastpref.run.architecture.families import FAMILIES

    (row,) = (line for line in README.splitlines() if line.startswith("| models |"))
    assert set(FAMILIES) <= set(re.findall(r"\w+", row))


@pytest.mark.parametrize(("file", "target"), LINKS)
def test_links_exist(file: str, target: str) -> None:
    assert ((ROOT / file).parent / target).exists()


@pytest.mark.parametrize(("document", "path"), NAMED_TESTS)
def test_named_tests_exist(document: str, path: str) -> None:
    assert (ROOT / path).exists()


def map_tree() -> list[str]:
    """The paths of the tree in docs/code.md: a line of it is below the line above it that is indented less."""
    (tree,) = re.findall(r"## Rooms\n\n```\n(.*?)```", CODE_MAP, flags=re.DOTALL)
    paths: list[str] = []
    for line in tree.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        parents = paths[-1].rstrip("/").split("/")[:depth] if paths else []
        # A name of several folders counts as one level.
        paths.append("/".join([*parents, name]) if depth else name)
    return paths


@pytest.mark.parametrize("path", [*map_tree(), *MAP_PATHS])
def test_map_names_what_exists(path: str) -> None:
    assert (ROOT / path).exists()
    assert path.endswith("/") <= (ROOT / path).is_dir()


def test_map_names_every_room() -> None:
    packages = {f"{file.parent.relative_to(ROOT)}/" for file in (ROOT / "fastpref").rglob("__init__.py")}
    folders = {f"{name}/" for name in ("checks", "tests", "bench", "csrc/cpu", "examples", "docs")}
    assert packages | folders <= set(map_tree())


@pytest.mark.parametrize(("file", "name"), NAMED_FUNCTIONS)
def test_named_test_exists(file: str, name: str) -> None:
    assert re.search(rf"^def {name}\(", (ROOT / file).read_text(encoding="utf-8"), flags=re.MULTILINE)
