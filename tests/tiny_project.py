"""A run file with everything it names, small enough to train in seconds."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

WORDS = [f"w{index}" for index in range(24)]
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MODEL = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<|end|>", "<|user|>", "<|assistant|>", "<unk>"]
    vocabulary = {word: index for index, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|end|>", unk_token="<unk>", chat_template=TEMPLATE
    )
    fast.save_pretrained(folder)


def write_pairs(path: Path, count: int, start: int = 0) -> None:
    def turn(role: str, *indices: int) -> list[dict[str, str]]:
        return [{"role": role, "content": " ".join(WORDS[index % len(WORDS)] for index in indices)}]

    lines = []
    for index in range(start, start + count):
        pair = {
            "prompt": turn("user", index, index + 1, index + 2),
            "chosen": turn("assistant", index + 3, index + 4),
            "rejected": turn("assistant", index + 5, index + 6, index + 7),
        }
        lines.append(json.dumps(pair) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.fixture
def project(tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with run.yaml, pairs.jsonl (10 pairs) and held_out.jsonl (4)."""
    monkeypatch.chdir(tmp_path)
    write_pairs(tmp_path / "pairs.jsonl", 10)
    write_pairs(tmp_path / "held_out.jsonl", 4, start=10)
    (tmp_path / "run.yaml").write_text(
        f"""model:
  tokenizer: {tokenizer_dir}
  config: {json.dumps(MODEL)}
data:
  train: pairs.jsonl
  eval: held_out.jsonl
  max_length: 32
training:
  output_dir: out
  per_device_train_batch_size: 2
  gradient_accumulation_steps: 2
  learning_rate: 1e-3
  logging_steps: 1
  report_to: []
  disable_progress: true
"""
    )
    return tmp_path


@pytest.fixture
def run_cli() -> Callable[..., Result]:
    """Runs the command line in this process; the process group it makes is undone."""
    from fastpref.cli.commands import cli
    from fastpref.trainer.ranks.platform import destroy

    def run(*arguments: str) -> Result:
        try:
            return CliRunner().invoke(cli, list(arguments))
        finally:
            destroy()

    return run
