"""A directory's tokenizer is the one that its files describe, or it is refused with what is missing or differs."""

import base64
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from fastpref.data import DataConfig, PreferencePair, load_tokenizer, tokenize_pairs
from fastpref.errors import ConfigError, MissingDependencyError

Files = dict[str, bytes | str | dict[str, Any]]
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("o", "r")]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCAB = {token: i for i, token in enumerate(["<|endoftext|>", *BYTES, *(a + b for a, b in MERGES)])}
MERGES_TXT = "#version: 0.2\n" + "\n".join(map(" ".join, MERGES)) + "\n"
# Protobuf of a SentencePiece model begins with a piece; tiktoken's files are lines of base64 and a rank.
SENTENCEPIECE = b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02"
RANKS = b"".join(base64.b64encode(bytes([i])) + f" {i}\n".encode() for i in range(256))


def byte_level(split: Any = None, **model: Any) -> Tokenizer:
    backend = Tokenizer(models.BPE(VOCAB, MERGES, **model))
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    backend.pre_tokenizer = last if split is None else pre_tokenizers.Sequence([split, last])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    return backend


def llama(normalizer: Any, pre_tokenizer: Any) -> Tokenizer:
    vocab = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *"▁helowrd",
        *(a + b for a, b in MERGES),
    ]
    model = models.BPE(
        {token: i for i, token in enumerate(vocab)}, MERGES, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    backend = Tokenizer(model)
    backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizer
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


@pytest.fixture
def directory(tmp_path: Path) -> Callable[..., Path]:
    def make(files: Files, name: str = "tokenizer") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for file, content in files.items():
            text = json.dumps(content) if isinstance(content, dict) else content
            (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())
        return folder

    return make


@pytest.fixture
def without_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the packages that old formats are read with."""
    found = importlib.util.find_spec
    absent = {"sentencepiece", "tiktoken", "mistral_common"}
    monkeypatch.setattr("fastpref.data.tokenizer_files.find_spec", lambda name: None if name in absent else found(name))


@pytest.mark.parametrize(
    ("files", "package"),
    [
        ({"tokenizer.model": SENTENCEPIECE}, "sentencepiece"),
        (
            {"tokenizer.model": SENTENCEPIECE, "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer"}},
            "sentencepiece",
        ),
        ({"spiece.model": SENTENCEPIECE}, "sentencepiece"),
        ({"tokenizer.model": RANKS}, "tiktoken"),
        ({"tekken.json": {"config": {}, "vocab": []}}, "mistral-common"),
    ],
)
def test_files_of_another_library_name_its_package(directory, without_packages, files: Files, package: str) -> None:
    with pytest.raises(MissingDependencyError, match=rf"pip install {package}, or copy the model's tokenizer\.json"):
        load_tokenizer(directory(files))
    with_json = directory({**files, "tokenizer.json": byte_level().to_str()} | {"tokenizer_config.json": "{}"}, "both")
    assert load_tokenizer(with_json)("hello")["input_ids"] == [VOCAB["hello"]]


def test_vocabulary_without_merges_is_refused(directory) -> None:
    files = {"vocab.json": VOCAB, "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer"}}
    with pytest.raises(ConfigError, match=r"vocab\.json without merges\.txt.*copy merges\.txt, or tokenizer\.json"):
        load_tokenizer(directory(files))
    loaded = load_tokenizer(directory({**files, "merges.txt": MERGES_TXT}, "whole"))
    assert loaded("hello")["input_ids"] == [VOCAB["hello"]]
    loaded = load_tokenizer(directory({**files, "tokenizer.json": byte_level().to_str()}, "json"))
    assert loaded("hello")["input_ids"] == [VOCAB["hello"]]


def test_vocabulary_without_a_class_names_the_setting(directory) -> None:
    files = {"vocab.json": VOCAB, "merges.txt": MERGES_TXT}
    with pytest.raises(ConfigError, match=r"set `tokenizer_class` in tokenizer_config\.json"):
        load_tokenizer(directory(files))


@pytest.mark.parametrize("files", [{"vocab.json": VOCAB, "merges.txt": MERGES_TXT}, {"vocab.txt": "[UNK]\nhello\n"}])
def test_class_that_reads_none_of_the_files_is_refused(directory, files: Files) -> None:
    """transformers makes an empty LlamaTokenizer of them, which gives every text no tokens."""
    with pytest.raises(
        ConfigError, match=r"loads as LlamaTokenizer, which reads .*tokenizer\.json, tokenizer\.model, none"
    ):
        load_tokenizer(directory({**files, "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer"}}))


DIGITS = pre_tokenizers.Split(r"l", "isolated")


@pytest.mark.parametrize(
    "settings",
    [
        {"tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer"}},
        # transformers takes its own class for this model, whatever the file says
        {
            "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
            "config.json": {"model_type": "qwen2"},
        },
    ],
)
def test_class_that_cuts_text_otherwise_than_the_file_is_refused(directory, settings: Files) -> None:
    backend = byte_level(DIGITS)
    with pytest.raises(ConfigError, match=r"cuts text differently from tokenizer\.json") as caught:
        load_tokenizer(directory({"tokenizer.json": backend.to_str(), **settings}))
    assert "directory of its own (`model.tokenizer`) without config.json" in str(caught.value)
    mended = {"tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}}
    loaded = load_tokenizer(directory({"tokenizer.json": backend.to_str(), **mended}, "mended"))
    assert loaded("hello")["input_ids"] == backend.encode("hello").ids != [VOCAB["hello"]]


def test_file_of_unknown_characters_and_settings_of_its_own_loads(directory) -> None:
    """Unigram without byte fallback, padding and truncation: none of them makes it another tokenizer."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((piece, -2.0) for piece in ["▁", *"helowrd"])]
    backend = transformers.T5Tokenizer(vocab=pieces).backend_tokenizer
    backend.enable_padding(length=200, pad_token="<pad>")
    backend.enable_truncation(5)
    settings = {"tokenizer_config.json": {"tokenizer_class": "T5Tokenizer"}}
    loaded = load_tokenizer(directory({"tokenizer.json": backend.to_str(), **settings}))
    assert type(loaded) is transformers.T5Tokenizer
    assert len(loaded("hello world", padding=False, truncation=False)["input_ids"]) == 13


@pytest.mark.parametrize(
    "backend",
    [
        llama(normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None),
        llama(None, pre_tokenizers.Metaspace("▁", "first", split=False)),
        llama(None, pre_tokenizers.Metaspace("▁", "always", split=False)),
    ],
    ids=["prepend", "first", "always"],
)
@pytest.mark.parametrize("model_type", [None, "llama", "mistral"])
def test_llama_tokenizers_load(directory, backend: Tokenizer, model_type: str | None) -> None:
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    files: Files = {"tokenizer.json": backend.to_str(), "tokenizer_config.json": settings}
    if model_type is not None:
        files["config.json"] = {"model_type": model_type}
    ids = backend.encode("hello world", add_special_tokens=False).ids
    assert load_tokenizer(directory(files))("hello world")["input_ids"] == ids


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("added", [True, False])
def test_bos_setting_against_the_file_is_refused_where_it_matters(directory, asked: bool, added: bool) -> None:
    """transformers follows the file. A chat template writes its first token itself, so that messages are fine."""
    backend = llama(None, pre_tokenizers.Metaspace("▁", "first", split=False))
    if added:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    settings = {"add_bos_token": asked, "bos_token": "<s>", "eos_token": "</s>", "chat_template": "{{ messages }}"}
    files: Files = {"tokenizer.json": backend.to_str(), "tokenizer_config.json": settings}
    loaded = load_tokenizer(directory(files))
    strings = PreferencePair(prompt="hello", chosen=" world", rejected=" h", path="pairs.jsonl", line=1)
    turns = {"hello": "user", "world": "assistant", "h": "assistant"}
    chat = [[{"role": role, "content": text}] for text, role in turns.items()]
    messages = PreferencePair(prompt=chat[0], chosen=chat[1], rejected=chat[2], path="pairs.jsonl", line=1)
    assert tokenize_pairs([messages], loaded, DataConfig(boundary="common_prefix"))
    if asked != added:
        does = "puts none in front" if asked else "puts one in front"
        with pytest.raises(ConfigError, match=rf"`add_bos_token: {str(asked).lower()}` .* {does}.*remove"):
            tokenize_pairs([strings], loaded, DataConfig())
        del settings["add_bos_token"]
        loaded = load_tokenizer(directory(files, "mended"))
    (pair,), _ = tokenize_pairs([strings], loaded, DataConfig())
    assert (pair.chosen_input_ids[0] == 1) == added


def test_added_tokens_with_other_ids_are_refused(directory) -> None:
    def settings(token_id: int) -> dict[str, Any]:
        token = {"content": "<|im_end|>", "special": True, "normalized": False, "lstrip": False, "rstrip": False}
        return {"added_tokens_decoder": {str(token_id): token | {"single_word": False}}}

    next_id = len(VOCAB)
    good = {"tokenizer.json": byte_level().to_str(), "tokenizer_config.json": settings(next_id)}
    assert load_tokenizer(directory(good, "good"))("<|im_end|>")["input_ids"] == [next_id]
    with pytest.raises(ConfigError, match=rf"gives the token '<\|im_end\|>' the id 999, tokenizer\.json {next_id}"):
        load_tokenizer(directory({**good, "tokenizer_config.json": settings(999)}))


def test_random_tokens_are_refused(directory) -> None:
    files = {"tokenizer.json": byte_level(dropout=0.5).to_str()}
    with pytest.raises(ConfigError, match="drops merges at random"):
        load_tokenizer(directory(files))


def test_class_that_is_no_name_is_refused(directory) -> None:
    files = {"tokenizer.json": byte_level().to_str(), "tokenizer_config.json": {"tokenizer_class": ["a"]}}
    with pytest.raises(ConfigError, match=r"`tokenizer_class` must be a name, got \['a'\]"):
        load_tokenizer(directory(files))


def test_package_that_is_there_is_used(directory) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    model = directory({"text.txt": "hello world\n" * 50}) / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        input=str(model.parent / "text.txt"), model_prefix=str(model), vocab_size=30, hard_vocab_limit=False
    )
    with pytest.raises(ConfigError, match=r"cuts text differently from tokenizer\.model"):
        load_tokenizer(model.parent)


def test_this_file_knows_the_class_that_takes_a_file_as_it_is() -> None:
    assert transformers.PreTrainedTokenizerFast is transformers.TokenizersBackend
