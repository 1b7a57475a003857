"""Tokenizers from local directories, without running code that a directory brings along."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastpref.data.dataset import PreferenceDataset
from fastpref.data.tokenizer_files import TOKENIZER_FILES, check_files, check_loaded, read_settings
from fastpref.errors import ConfigError, MissingDependencyError

__all__ = ["TOKENIZER_FILES", "check_token_ids", "load_tokenizer", "resolve_pad_token_id"]


def load_tokenizer(path: str | Path) -> Any:
    """Load a transformers tokenizer from a local directory; nothing is downloaded and none of its code is run.

    Returns:
        The tokenizer, with its padding token set to the end-of-sequence token when it has none.

    Raises:
        ConfigError: no such directory, no tokenizer in it or part of one, a class or code of its own, files that do
            not load, or of which transformers makes another tokenizer than they describe.
        MissingDependencyError: transformers, or a package that its files are read with, is not installed.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise ConfigError(f"tokenizer {str(path)!r} is no local directory; download it first and give its path")
    settings = read_settings(directory)
    check_files(directory)
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError("tokenizers are loaded with transformers; install fastpref[hf]") from error
    declared = settings["tokenizer_class"]
    if declared is not None and not hasattr(transformers, declared):
        raise ConfigError(
            f"tokenizer {str(path)!r} wants the class {declared!r}, which transformers "
            f"{transformers.__version__} does not have; convert it to a tokenizer.json of a standard class"
        )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
        check_loaded(tokenizer, directory, settings)
    except ConfigError:
        raise
    # The rust library raises plain Exception for a malformed tokenizer.json.
    except Exception as error:
        remedy = "save it again"
        if not (directory / "tokenizer.json").is_file():
            remedy = "copy its tokenizer.json there, or set `tokenizer_class` in tokenizer_config.json to its class"
        raise ConfigError(f"tokenizer {str(path)!r} does not load: {error}; {remedy}") from error
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


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
