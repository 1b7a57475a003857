"""`fastpref check`: what it shows, and that it needs neither weights nor ranks."""

import json
import re
from pathlib import Path

import pytest
import torch
from tiny_project import MODEL, write_pairs


def squeezed(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def test_check_shows_the_plan(project: Path, run_cli) -> None:
    result = run_cli("check", "run.yaml")
    assert result.exit_code == 0, result.output
    output = squeezed(result.output)
    for part in (
        "Pair 0: pairs.jsonl:1",
        "prompt (6 tokens, not scored): <|user|>|w0|w1|w2|<|end|>|<|assistant|>",
        "chosen (3 tokens, scored): ⟦w3|w4|<|end|>⟧",
        "rejected (4 tokens, scored): ⟦w5|w6|w7|<|end|>⟧",
        "Pair 1: pairs.jsonl:2",
        "pairs kept 10 of 10 4 of 4",
        "prompt tokens 6-6, mean 6.0, 95% <= 6",
        "rejected tokens 4-4, mean 4.0",
        "tensor 1 0 data 1 0 pipeline 1 0",
        "global batch 4 pairs = 2 per rank x 2 accumulated x 1 data-parallel",
        "steps per epoch 3",
        "total steps 3",
        "run.yaml is valid.",
    ):
        assert part in output, part
    assert "Pair 2" not in output
    assert not (project / "out").exists()
    assert not torch.distributed.is_initialized()


def test_check_needs_no_weights(project: Path, run_cli, tokenizer_dir: Path) -> None:
    model = project / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(MODEL))
    result = run_cli("check", "run.yaml", f"model={{path: model, tokenizer: {tokenizer_dir}}}")
    assert result.exit_code == 0, result.output


def test_check_plans_for_more_ranks_than_are_present(project: Path, run_cli) -> None:
    layout = ["training.tensor_model_parallel_size=2", "training.pipeline_model_parallel_size=2"]
    result = run_cli("check", "run.yaml", *layout, "--world-size", "8")
    output = squeezed(result.output)
    assert "Layout (world size 8)" in output
    assert "tensor 2 0, 1 data 2 0, 2 pipeline 2 0, 4" in output
    assert "global batch 8 pairs = 2 per rank x 2 accumulated x 2 data-parallel" in output
    assert "steps per epoch 2" in output
    fewest = squeezed(run_cli("check", "run.yaml", *layout).output)
    assert "Layout (world size 4)" in fewest


def test_check_refuses_a_world_that_the_layout_does_not_divide(project: Path, run_cli) -> None:
    result = run_cli("check", "run.yaml", "training.tensor_model_parallel_size=2", "--world-size", "3")
    assert result.exit_code == 2
    assert "must be a multiple of tensor_model_parallel_size = 2, got 3; start 2 or 4" in result.stderr


def test_check_reports_dropped_and_truncated_pairs(project: Path, run_cli) -> None:
    write_pairs(project / "more.jsonl", 2)
    pair = {"prompt": "w1 w2", "chosen": "w3", "rejected": "w3"}
    with (project / "pairs.jsonl").open("a") as file:
        file.write(json.dumps(pair) + "\n")
        file.write(json.dumps(pair | {"rejected": " ".join(["w4"] * 40)}) + "\n")
    settings = ["data.on_bad_pair=drop", "data.train=[pairs.jsonl, more.jsonl]", "data.boundary=separate"]
    output = squeezed(run_cli("check", "run.yaml", *settings).output)
    assert "pairs kept 13 of 14 4 of 4" in output
    assert "dropped: identical 1 0" in output
    assert "truncated: rejected 1 0" in output


def test_check_shortens_long_pairs(project: Path, run_cli) -> None:
    pair = {"prompt": "w1 " * 60 + "w2", "chosen": "w3 " * 120 + "w4", "rejected": "w5"}
    (project / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    longer = {**MODEL, "max_position_embeddings": 512}
    result = run_cli(
        "check", "run.yaml", "data.max_length=null", f"model.config={json.dumps(longer)}", "data.boundary=separate"
    )
    output = squeezed(result.output)
    assert "prompt (61 tokens, not scored): ... 13 more ... w1" in output
    assert "chosen (122 tokens, scored): ⟦w3|" in output
    assert "... 26 more ... w3|" in output
    assert output.count("w1") == 47


def test_check_escapes_control_characters(project: Path, run_cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import PreTrainedTokenizerFast

    monkeypatch.setattr(PreTrainedTokenizerFast, "decode", lambda self, ids, **_: "\x1b[31m\n")
    output = run_cli("check", "run.yaml").output
    assert "\x1b" not in output
    assert "\\x1b[31m\\n" in output
