"""Gemma 3 270M itself, where it was prepared: logits, its files there and back, and the run of examples/."""

import json
import math
from pathlib import Path

import hf_oracle
import megatron_runs
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from checks.real_models import CHECKSUMS
from fastpref.cli.commands import cli
from fastpref.trainer.model.build import ModelOptions, load_models, save_hf
from fastpref.trainer.ranks.platform import destroy

ROOT = Path(__file__).resolve().parents[3]
MODEL = ROOT / "runs/models/gemma3"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (MODEL / CHECKSUMS).is_file(),
        reason=f"{MODEL} is not prepared: python -m checks.real_models gemma3 {MODEL}",
    ),
]


def test_logits_are_as_accurate_as_those_of_transformers() -> None:
    # longer than the window of 512; compared where both kinds of layers matter
    ids_SL = torch.randint(3, 200_000, (1, 540), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
        theirs = model(ids_SL, logits_to_keep=24).logits
        exact = hf_oracle.in_fp64(model)(ids_SL, logits_to_keep=24).logits
        del model
        with megatron_runs.parallel(megatron_runs.Layout()):
            (chunk,) = load_models(MODEL)
            ours = chunk(ids_SL, torch.arange(540)[None], None)[:, -24:]
    hf_oracle.assert_as_accurate(hf_oracle.Answer(ours, {}), hf_oracle.Answer(theirs, {}), hf_oracle.Answer(exact, {}))


def test_export_of_import_is_identical(tmp_path: Path) -> None:
    with megatron_runs.parallel(megatron_runs.Layout()):
        save_hf(load_models(MODEL, ModelOptions(params_dtype=torch.bfloat16)), tmp_path / "out", MODEL)
    hf_oracle.assert_same_bits(hf_oracle.read_tensors(tmp_path / "out"), hf_oracle.read_tensors(MODEL))


def test_example_trains_from_log_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    short = {
        "data.max_length": 64,
        "data.on_bad_pair": "drop",
        "training.gradient_accumulation_steps": 1,
        "training.max_steps": 2,
    }
    short |= {"training.warmup_steps": 0, "training.save_on_end": "false", "training.output_dir": tmp_path / "run"}
    overrides = [f"{key}={value}" for key, value in short.items()]
    try:
        result = CliRunner().invoke(cli, ["train", "examples/gemma3_270m.yaml", *overrides])
    finally:
        destroy()
    assert result.exit_code == 0, result.output
    first, second = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines()[:2])
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert second["loss"] != first["loss"]
    assert math.isfinite(second["loss"] + second["grad_norm"])
