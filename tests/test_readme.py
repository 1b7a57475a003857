"""The README's Python runs as it stands there, and every file it points to exists."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_python_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    torch.manual_seed(0)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["scores"].logps.shape == (4,) and names["scores"].counts.tolist() == [88] * 4
    assert torch.isfinite(names["loss"]) and names["weight"].grad.abs().sum() > 0


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_readme_links_exist(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize("folder", sorted(set(re.findall(r"`(tests/[\w/.]+)`", README))))
def test_readme_names_tests_that_exist(folder: str) -> None:
    assert (ROOT / folder).exists()
