"""Tokenizers from local directories, without running code that a directory brings along."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastpref.data import strict_json
from fastpref.data.dataset import PreferenceDataset
from fastpref.errors import ConfigError, DataError, MissingDependencyError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_CONFIG_FILES = ("tokenizer_config.json", "config.json")


def load_tokenizer(path: str | Path) -> Any:
    """Load a transformers tokenizer from a local directory; nothing is downloaded and none of its code is run.

    Returns:
        The tokenizer, with its padding token set to the end-of-sequence token when it has none.

    Raises:
        ConfigError: no such directory, no tokenizer in it, a class or code of its own, or files that do not load.
        MissingDependencyError: transformers is not installed.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise ConfigError(f"tokenizer {str(path)!r} is no local directory; download it first and give its path")
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise ConfigError(f"tokenizer {str(path)!r} has none of {', '.join(TOKENIZER_FILES)}; copy the tokenizer there")
    declared_class = _check_configs(directory)
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError("tokenizers are loaded with transformers; install fastpref[hf]") from error
    if declared_class is not None and not hasattr(transformers, declared_class):
        raise ConfigError(
            f"tokenizer {str(path)!r} wants the class {declared_class!r}, which transformers "
            f"{transformers.__version__} does not have; convert it to a tokenizer.json of a standard class"
        )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
    # The rust library raises plain Exception for a malformed tokenizer.json.
    except Exception as error:
        raise ConfigError(f"tokenizer {str(path)!r} does not load: {error}; save it again") from error
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _check_configs(directory: Path) -> str | None:
    """Return the tokenizer class that the directory declares; refuse one that brings code."""
    declared_class = None
    for name in _CONFIG_FILES:
        file = directory / name
        if not file.is_file():
            continue
        try:
            settings = strict_json.loads(file.read_bytes(), str(file), 1, unfinished=False)
        except DataError as error:
            raise ConfigError(str(error)) from error
        if not isinstance(settings, dict):
            raise ConfigError(f"{file} must hold a JSON object")
        if settings.get("auto_map"):
            raise ConfigError(
                f"{file} asks to run code of its own (`auto_map`), which is never done; "
                "convert the tokenizer to a tokenizer.json of a standard class and remove `auto_map`"
            )
        declared_class = declared_class or settings.get("tokenizer_class")
    return declared_class


def resolve_pad_token_id(tokenizer: Any) -> int:
    """Return the id to pad with: the tokenizer's padding token, else its end-of-sequence token.

    Raises:
        ConfigError: it has neither.
    """
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    raise ConfigError("the tokenizer has neither a padding nor an end-of-sequence token; set its `pad_token`")


def check_token_ids(dataset: PreferenceDataset, vocab_size: int, pad_token_id: int | None = None) -> None:
    """Check before training that every id has a row in the model's vocabulary.

    Raises:
        ConfigError: an id >= `vocab_size`, with the pair that has it.
    """
    largest, position = dataset.largest_token_id()
    if largest >= vocab_size:
        raise ConfigError(
            f"{dataset[position].source}: token id {largest} but the model's vocabulary has {vocab_size} entries "
            f"(0..{vocab_size - 1}); use the model's own tokenizer, or enlarge the model's vocabulary"
        )
    if pad_token_id is not None and pad_token_id >= vocab_size:
        raise ConfigError(
            f"the padding token has id {pad_token_id} but the model's vocabulary has {vocab_size} entries; "
            "set the tokenizer's `pad_token` to a token of the model"
        )
