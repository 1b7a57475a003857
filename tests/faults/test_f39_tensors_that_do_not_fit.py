"""Fault 39: missing, extra and renamed tensors, wrong shapes and dtypes, and NaN: refused, with every list at once."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checks.tiny import TINY_LLAMA
from fastpref.errors import CheckpointError
from fastpref.trainer import ModelOptions, build_models, load_models, save_hf

NORM, HEAD = "model.norm.weight", "lm_head.weight"
UP = "model.layers.1.mlp.up_proj.weight"
ONES = torch.ones(TINY_LLAMA["hidden_size"])


def with_one(value: float) -> torch.Tensor:
    return ONES.index_fill(0, torch.tensor([5]), value)


@pytest.fixture
def model(tmp_path: Path, one_rank) -> Path:
    save_hf(build_models(TINY_LLAMA, seed=0), tmp_path / "model", TINY_LLAMA)
    return tmp_path / "model"


def edit(model: Path, changes: dict[str, torch.Tensor | str | None]) -> None:
    """Change, add, remove (None) or rename (a new name) tensors."""
    tensors = load_file(model / "model.safetensors")
    for name, change in changes.items():
        old = tensors.pop(name, None)
        if isinstance(change, str):
            tensors[change] = old
        elif change is not None:
            tensors[name] = change
    save_file(tensors, model / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({NORM: None}, f"missing tensors: {NORM}"),
        ({HEAD: None}, f"missing tensors: {HEAD}; set tie_word_embeddings to true in config.json if"),
        ({"score.weight": torch.ones(2)}, "unexpected tensors: score.weight"),
        ({"model.layers.2.mlp.up_proj.weight": ONES}, "unexpected tensors: model.layers.2.mlp.up_proj.weight"),
        ({NORM: "norm.weight"}, f"missing tensors: {NORM}; unexpected tensors: norm.weight"),
        ({NORM: ONES[:31]}, rf"wrong shapes: {NORM} is \[31\], config.json says \[32\]"),
        ({UP: torch.ones(32, 64)}, rf"wrong shapes: {UP} is \[32, 64\], config.json says \[64, 32\]"),
        ({NORM: ONES.to(torch.int8)}, f"'{NORM}' has dtype I8; only F64, F32, F16, BF16 weights can be trained on"),
        ({NORM: ONES.to(torch.float8_e4m3fn)}, f"'{NORM}' has dtype F8_E4M3; only"),
        ({NORM: with_one(float("nan"))}, rf"values that are not finite \(in torch.float32\) in: {NORM}"),
        ({NORM: with_one(float("-inf"))}, rf"values that are not finite \(in torch.float32\) in: {NORM}"),
    ],
)
def test_load_models_refuses(model: Path, changes: dict, message: str) -> None:
    edit(model, changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_models(model)
    assert str(model) in str(caught.value)


def test_load_models_lists_everything_at_once(model: Path) -> None:
    edit(model, {NORM: "norm.weight", HEAD: None, "score.weight": torch.ones(2), UP: torch.ones(2)})
    with pytest.raises(CheckpointError) as caught:
        load_models(model)
    for problem in (
        f"missing tensors: {NORM}, {HEAD}",
        "unexpected tensors: norm.weight, score.weight",
        f"wrong shapes: {UP} is [2]",
    ):
        assert problem in str(caught.value)


def test_load_models_refuses_weights_that_overflow(model: Path) -> None:
    edit(model, {NORM: with_one(1e6)})
    with pytest.raises(CheckpointError, match=r"not finite \(in torch.float16\)"):
        load_models(model, ModelOptions(params_dtype=torch.float16))


@pytest.mark.parametrize("command", ["train", "eval"])
def test_command_refuses_a_model_with_a_nan(project: Path, run_cli, command: str) -> None:
    assert run_cli("train", "run.yaml", "training.max_steps=1", "--export", "model").exit_code == 0
    edit(project / "model", {NORM: torch.full((16,), float("nan"))})
    result = run_cli(command, "run.yaml", "model.path=model", "model.config=null", "training.output_dir=second")
    assert result.exit_code == 4, result.output
    assert f"not finite (in torch.float32) in: {NORM}" in " ".join(result.stderr.split())
