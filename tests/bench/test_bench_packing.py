"""The benchmark of packed rows compares steps before it times them, and says what it computed."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny_project import MODEL, project, tokenizer_dir  # noqa: F401

# Imported before Megatron is made to run on a CPU, after which it cannot be.
from transformers import LlamaForCausalLM  # noqa: F401

from bench import __main__ as cli
from bench import packing
from fastpref.trainer import TrainingArguments, build_models, initialize_megatron, save_hf
from fastpref.trainer.ranks.platform import destroy


@pytest.fixture
def model(project: Path, tokenizer_dir: Path) -> Path:  # noqa: F811
    initialize_megatron(TrainingArguments())
    try:
        save_hf(build_models(MODEL, seed=0), project / "model", MODEL, tokenizer_dir)
    finally:
        destroy()
    return project / "model"


def run(model: Path) -> tuple[dict, str]:
    sizes = ["--pairs", 4, "--pack-length", 64, "--passes", 1, "--threads", 1]
    arguments = [
        "packing",
        "--dry",
        "--model",
        model,
        "--data",
        "pairs.jsonl",
        "--name",
        "tiny",
        "--out",
        "out",
        *sizes,
    ]
    try:
        result = CliRunner().invoke(cli.main, [str(argument) for argument in arguments], catch_exceptions=False)
    finally:
        destroy()
    assert result.exit_code == 0, result.output
    return json.loads(Path("out/packing-tiny.json").read_text()), result.output


def test_packing_bench_times_equal_steps(model: Path) -> None:
    row, output = run(model)
    # prompts of 6 tokens, answers of 3 and 4: rows of 16; two pairs of 17 in 40; four of 12 in 48
    assert [row["shapes"][kind]["positions_per_pair"] for kind in packing.KINDS] == [32.0, 20.0, 12.0]
    assert [row["shapes"][kind]["padding_fraction"] for kind in packing.KINDS] == pytest.approx(
        [1 - 17 / 32, 1 - 17 / 20, 0.0]
    )
    assert all(len(row["times"][kind]["cpu_s"]) == 1 for kind in packing.KINDS)
    assert "1.67 times fewer positions" in output


def test_packing_bench_refuses_to_time_other_steps(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "TOLERANCE", -1.0)
    with pytest.raises(RuntimeError, match="loss of the step on padded rows"):
        run(model)
    assert not Path("out").exists()
