"""`fastpref train`, `eval`, `export` and `plot`, from run file to Hugging Face model."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastpref.run.config.run_file import load_run_config


def squeezed(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def records(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_train_eval_export_plot_agree(project: Path, run_cli) -> None:
    settings = ["training.eval_on_start=true", "training.num_train_epochs=2"]
    trained = run_cli("train", "run.yaml", *settings, "--export", "model")
    assert trained.exit_code == 0, trained.output
    evaluations = [record for record in records(project / "out" / "metrics.jsonl") if "eval_loss" in record]
    assert [record["step"] for record in evaluations] == [0, 6]

    shown = squeezed(trained.output)
    first, last = (record["eval_loss"] for record in evaluations)
    assert "step 0 step 6 change" in shown
    assert f"loss {first:.4f} {last:.4f} {last - first:+.4f}" in shown
    assert "optimizer steps 6" in shown and "tokens per second (median)" in shown
    for place in ("out/config.yaml", "out/metrics.jsonl", "out/checkpoints/step-6", "model"):
        assert place in shown and (project / place).exists()
    assert load_run_config("out/config.yaml") == load_run_config("run.yaml", settings)

    evaluated = run_cli("eval", "run.yaml", "training.resume_from_checkpoint=latest")
    assert evaluated.exit_code == 0, evaluated.output
    saved = json.loads((project / "out" / "eval.json").read_text())
    assert saved["checkpoint"] == "latest" and saved["data"] == ["held_out.jsonl"]
    expected = {name: value for name, value in evaluations[-1].items() if name != "step"}
    assert saved["metrics"] == expected
    assert f"loss {last:.6g}" in squeezed(evaluated.output)

    exported = run_cli("export", "run.yaml", "--checkpoint", "latest", "--output", "exported")
    assert exported.exit_code == 0, exported.output
    ours, theirs = (load_file(project / name / "model.safetensors") for name in ("exported", "model"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (project / "exported" / "tokenizer.json").exists()

    plotted = run_cli("plot", "out")
    assert plotted.exit_code == 0, plotted.output
    assert (project / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_eval_of_the_model_itself_needs_no_training_data(project: Path, run_cli) -> None:
    result = run_cli("eval", "run.yaml", "data.train=[]", "training.output_dir=elsewhere")
    assert result.exit_code == 0, result.output
    metrics = json.loads((project / "elsewhere" / "eval.json").read_text())["metrics"]
    # the reference is the model itself
    assert metrics["eval_loss"] == pytest.approx(0.6931471805599453, rel=1e-6)
    assert metrics["eval_rewards/margins"] == 0.0


def test_export_takes_a_checkpoint_of_any_layout(project: Path, run_cli) -> None:
    assert run_cli("train", "run.yaml", "training.max_steps=1").exit_code == 0
    layout = ["training.tensor_model_parallel_size=4", "training.pipeline_model_parallel_size=2"]
    result = run_cli("export", "run.yaml", *layout, "training.sequence_parallel=true", "--output", "model")
    assert result.exit_code == 0, result.output
    assert (project / "model" / "model.safetensors").exists()


def test_train_refuses_a_filled_export_directory_before_it_starts(project: Path, run_cli) -> None:
    (project / "model").mkdir()
    (project / "model" / "precious.txt").write_text("x")
    result = run_cli("train", "run.yaml", "--export", "model")
    assert result.exit_code == 2
    assert "the export directory 'model' exists and is not empty" in result.stderr
    assert not (project / "out").exists()


def test_train_refuses_the_directory_of_another_run(project: Path, run_cli) -> None:
    assert run_cli("train", "run.yaml", "training.max_steps=1").exit_code == 0
    result = run_cli("train", "run.yaml", "training.max_steps=1")
    assert result.exit_code == 2
    assert "'out' holds the checkpoints of another run (up to step 1)" in result.stderr
    assert "training.resume_from_checkpoint=latest" in result.stderr


def test_train_resumes_and_equals_an_uncut_run(project: Path, run_cli) -> None:
    whole = ["training.max_steps=4", "training.output_dir=whole", "training.save_steps=2"]
    assert run_cli("train", "run.yaml", *whole, "--export", "model-whole").exit_code == 0
    cut = ["training.max_steps=4", "training.output_dir=cut"]
    (project / "cut" / "checkpoints").mkdir(parents=True)
    (project / "whole" / "checkpoints" / "step-2").rename(project / "cut" / "checkpoints" / "step-2")
    result = run_cli("train", "run.yaml", *cut, "training.resume_from_checkpoint=latest", "--export", "model-cut")
    assert result.exit_code == 0, result.output
    ours, theirs = ((project / name / "model.safetensors").read_bytes() for name in ("model-cut", "model-whole"))
    assert ours == theirs


def test_train_with_a_separate_reference(project: Path, run_cli) -> None:
    assert run_cli("train", "run.yaml", "training.max_steps=1", "--export", "reference").exit_code == 0
    result = run_cli("eval", "run.yaml", "reference={path: reference}", "training.output_dir=other", "training.seed=42")
    assert result.exit_code == 0, result.output
    metrics = json.loads((project / "other" / "eval.json").read_text())["metrics"]
    # the reference has learnt for one step, the policy has not
    assert metrics["eval_loss"] != pytest.approx(0.6931471805599453, rel=1e-6)
