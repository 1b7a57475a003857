"""Fault 46: tokens without a row in the model, and tokenizers that cannot pad, are found before any weight is read."""

import json
from pathlib import Path

import pytest
from tiny_project import MODEL
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.mark.parametrize("command", ["check", "train"])
def test_token_ids_beyond_the_vocabulary(project: Path, run_cli, command: str) -> None:
    LlamaForCausalLM(LlamaConfig(**{**MODEL, "vocab_size": 12})).save_pretrained(project / "model")
    result = run_cli(command, "run.yaml", "model.config=null", "model.path=model")
    assert result.exit_code == 2
    assert "pairs.jsonl:" in result.stderr and "the model's vocabulary has 12 entries" in result.stderr
    assert "use the model's own tokenizer" in result.stderr
    assert not (project / "out").exists()


def test_evaluation_ids_beyond_the_vocabulary(project: Path, run_cli) -> None:
    lines = (project / "pairs.jsonl").read_text().replace("w1 w2", "w1 w1").splitlines()[:1]
    (project / "pairs.jsonl").write_text(lines[0] + "\n")
    result = run_cli("check", "run.yaml", "model.config.vocab_size=16")
    assert result.exit_code == 2
    assert "held_out.jsonl:" in result.stderr


def test_padding_token_beyond_the_vocabulary(project: Path, run_cli, tokenizer_dir: Path) -> None:
    edit_tokenizer(project, tokenizer_dir, pad_token="w23")
    result = run_cli("check", "run.yaml", "model.tokenizer=words", "model.config.vocab_size=28")
    assert result.exit_code == 2
    assert "the padding token has id 28 but the model's vocabulary has 28 entries" in result.stderr


def test_tokenizer_without_padding_and_end(project: Path, run_cli, tokenizer_dir: Path) -> None:
    edit_tokenizer(project, tokenizer_dir, pad_token=None, eos_token=None)
    result = run_cli("check", "run.yaml", "model.tokenizer=words")
    assert result.exit_code == 2
    assert "neither a padding nor an end-of-sequence token" in result.stderr


def edit_tokenizer(project: Path, source: Path, **changes: str | None) -> None:
    (project / "words").mkdir()
    for file in source.iterdir():
        (project / "words" / file.name).write_bytes(file.read_bytes())
    path = project / "words" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
