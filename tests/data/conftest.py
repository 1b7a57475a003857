"""Tokenizers built in memory, and a writer of sample files."""

from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

# A busy machine is not a failed test.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

SPECIAL_TOKENS = ["<pad>", "<bos>", "<eos>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer(
    texts: list[str], vocab_size: int, add_bos: bool, split_words: bool
) -> transformers.PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    # Without the word split, merges may cross spaces and so the end of a prompt.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split_words)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if add_bos:
        bos = ("<bos>", SPECIAL_TOKENS.index("<bos>"))
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[bos])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture(scope="session")
def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token per byte: no merges, so no prompt can merge with its completion. Adds <bos> to plain text."""
    return build_tokenizer([], len(SPECIAL_TOKENS) + 256, add_bos=True, split_words=True)


@pytest.fixture(scope="session")
def merging_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Has the token "ab", so that a prompt ending in "a" merges with a completion beginning with "b"."""
    return build_tokenizer(["ababababab"], len(SPECIAL_TOKENS) + 257, add_bos=False, split_words=False)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Write bytes or text to a file in the temporary directory and return its path."""

    def write_file(content: str | bytes, name: str = "pairs.jsonl") -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write_file
