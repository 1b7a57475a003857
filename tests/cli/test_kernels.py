"""`fastpref kernels`: engines of this machine, resources of the GPU kernels, tuning."""

import importlib.util
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from fastpref.cli.commands import cli

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli, ["kernels", *arguments])
    return result.exit_code, result.output


def test_info_names_every_engine_with_its_status() -> None:
    code, output = run("info")
    assert code == 0
    for name in ("PyTorch tiles", "native", "Triton"):
        (line,) = (line for line in output.splitlines() if line.strip().startswith(name))
        assert "ready" in line or "built" in line or "CUDA" in line or "install" in line


@needs_triton
def test_inspect_prints_what_the_machine_code_uses() -> None:
    code, output = run("inspect", "--match", "merge sm_90 bf16")
    assert code == 0
    (*_, row) = output.strip().splitlines()
    kernel, architecture, dtype, *_ = row.split()
    assert (kernel, architecture, dtype) == ("merge", "sm_90", "bf16")
    spills, narrow_products = row.split()[-5], row.split()[-1]
    assert (spills, narrow_products) == ("0", "0")


@needs_triton
def test_inspect_of_nothing() -> None:
    code, output = run("inspect", "--match", "forwrad")
    assert code == 2
    assert "no variant's name contains 'forwrad'" in output


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tune_without_a_gpu(tmp_path: Path) -> None:
    code, output = run("tune", str(tmp_path / "tiles.json"))
    assert code == 2
    assert "tuning measures on a GPU, and PyTorch sees none" in output
    assert not (tmp_path / "tiles.json").exists()
