"""What a tokenizer's directory holds, and whether what transformers made of it is the tokenizer of those files."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastpref.data import strict_json
from fastpref.data.encoding import Encoder
from fastpref.errors import ConfigError, DataError, MissingDependencyError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_CONFIG_FILES = ("tokenizer_config.json", "config.json")
_JSON = "tokenizer.json"
# Begins with a letter: a class and a file may treat a leading space differently and still agree on everything else.
_PROBE = "Hello world, it's 2024: x = 12345.6;\n\n\tdef f(a):  return a\nÜber naïve 漢字 🙂 don't"


def read_settings(directory: Path) -> dict[str, Any]:
    """Return the contents of `tokenizer_config.json`, with the tokenizer's class from `config.json` where it is there.

    Raises:
        ConfigError: a file is no JSON object, names no class where it should, or brings code of its own.
    """
    found: dict[str, dict[str, Any]] = {name: {} for name in _CONFIG_FILES}
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
        declared = settings.get("tokenizer_class")
        if declared is not None and not isinstance(declared, str):
            raise ConfigError(f"{file}: `tokenizer_class` must be a name, got {declared!r}; mend or remove it")
        found[name] = settings
    of_tokenizer, of_model = (found[name] for name in _CONFIG_FILES)
    return {**of_tokenizer, "tokenizer_class": of_tokenizer.get("tokenizer_class") or of_model.get("tokenizer_class")}


def check_files(directory: Path) -> None:
    """Refuse a directory whose files transformers cannot read, or not as they are meant.

    Raises:
        ConfigError: no tokenizer, or part of one.
        MissingDependencyError: its files are read with a package that is not installed.
    """
    names = [name for name in TOKENIZER_FILES if (directory / name).is_file()]
    if not names:
        raise ConfigError(f"tokenizer {str(directory)!r} has none of {', '.join(TOKENIZER_FILES)}; copy it there")
    if _JSON in names:
        return
    if "vocab.json" in names and not (directory / "merges.txt").is_file():
        raise ConfigError(
            f"tokenizer {str(directory)!r} has vocab.json without merges.txt, so that no word would become one token; "
            f"copy merges.txt, or {_JSON}, there"
        )
    packages: dict[str, tuple[str, ...]] = {}
    for name in names:
        if name.endswith(".model"):
            is_ranks = _holds_ranks(directory / name)
            packages[name] = ("tiktoken",) if is_ranks else ("sentencepiece", "google.protobuf")
        elif name == "tekken.json":
            packages[name] = ("mistral_common",)
    missing = {name: [package for package in wanted if not _is_installed(package)] for name, wanted in packages.items()}
    # Another of the files may do.
    if len(packages) == len(names) and all(missing.values()):
        name, wanted = next(iter(missing.items()))
        pip_names = [{"google.protobuf": "protobuf", "mistral_common": "mistral-common"}.get(p, p) for p in wanted]
        raise MissingDependencyError(
            f"tokenizer {str(directory)!r} has {name} and no {_JSON}; transformers reads it with another package: "
            f"pip install {' '.join(pip_names)}, or copy the model's {_JSON} there"
        )


def check_loaded(tokenizer: Any, directory: Path, settings: Mapping[str, Any]) -> None:
    """Refuse a tokenizer that transformers built differently from what the directory's files say.

    Raises:
        ConfigError: with the file and what differs.
    """
    where, kind = f"tokenizer {str(directory)!r}", type(tokenizer).__name__
    if not hasattr(tokenizer, "convert_ids_to_tokens") or kind == "MistralCommonBackend":
        raise ConfigError(
            f"{where} loads as {kind}, which has no chat template that could be set; save it as {_JSON}, and leave "
            "tekken.json out of the directory"
        )
    wanted = {*type(tokenizer).vocab_files_names.values(), *([_JSON, "tekken.json"] if tokenizer.is_fast else [])}
    if wanted and not any((directory / name).is_file() for name in wanted):
        raise ConfigError(
            f"{where} loads as {kind}, which reads {', '.join(sorted(wanted))}, none of which is there; copy one of "
            "them, or set `tokenizer_class` in tokenizer_config.json to the class of its files"
        )
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if getattr(model, "dropout", None):
        raise ConfigError(f"{where} drops merges at random (`dropout` of the model in {_JSON}); set it to null")
    _check_tokens(tokenizer, directory, f"{where} loads as {kind}, which")
    _check_added_tokens(tokenizer, directory, settings, where)
    if isinstance(settings.get("add_bos_token"), bool):
        # transformers leaves it out where there is a tokenizer.json, and never saves it; for `Encoder` to compare.
        tokenizer.init_kwargs["add_bos_token"] = settings["add_bos_token"]


def _check_tokens(tokenizer: Any, directory: Path, does: str) -> None:
    """Compare with the library that a file was written by, where transformers builds a tokenizer anew."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    if tokenizer.is_fast and (directory / _JSON).is_file():
        name = _JSON
        if type(tokenizer) is PreTrainedTokenizerFast:  # it takes the file as it is
            return
        source = Tokenizer.from_file(str(directory / name))
        source.no_truncation()
        source.no_padding()
        # by their ids: an unknown piece is shown as it is written
        expected = [source.id_to_token(i) for i in source.encode(_PROBE, add_special_tokens=False).ids]
    else:
        models = [name for name in type(tokenizer).vocab_files_names.values() if name.endswith(".model")]
        name = next((name for name in models if (directory / name).is_file()), "")
        if not name or _holds_ranks(directory / name):
            return
        processor = import_module("sentencepiece").SentencePieceProcessor(model_file=str(directory / name))
        expected = [processor.id_to_piece(i) for i in processor.encode(_PROBE)]
    found = tokenizer.convert_ids_to_tokens(Encoder(tokenizer).ids([_PROBE])[0])
    if found != expected:
        index = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), 0)
        raise ConfigError(
            f"{does} cuts text differently from {name}: {found[index : index + 4]} instead of "
            f"{expected[index : index + 4]} in {_PROBE[:20]!r}...; give the tokenizer a directory of its own "
            f"(`model.tokenizer`) without config.json, with {_JSON}, and `tokenizer_class` PreTrainedTokenizerFast in "
            "tokenizer_config.json"
        )


def _check_added_tokens(tokenizer: Any, directory: Path, settings: Mapping[str, Any], where: str) -> None:
    """Compare the ids of added tokens with those that the files give them."""
    listed = settings.get("added_tokens_decoder")
    for key, token in (listed if isinstance(listed, dict) else {}).items():
        content = token.get("content") if isinstance(token, dict) else token
        token_id = tokenizer.convert_tokens_to_ids(content) if isinstance(content, str) else None
        if not key.isdecimal() or token_id != int(key):
            file = _JSON if (directory / _JSON).is_file() else "the tokenizer's files"
            raise ConfigError(
                f"{where}: tokenizer_config.json gives the token {content!r} the id {key}, {file} {token_id}; "
                "take both files from one tokenizer"
            )


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # its parent is not there
        return False


def _holds_ranks(file: Path) -> bool:
    """Whether a `.model` file is tiktoken's, lines of base64 and a rank, and not SentencePiece's."""
    with open(file, "rb") as opened:
        fields = opened.readline(4096).split()
    try:
        return len(fields) == 2 and fields[1].isdigit() and bool(base64.b64decode(fields[0], validate=True))
    except binascii.Error:
        return False
