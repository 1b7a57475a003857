"""Hugging Face model directories: `config.json` and safetensors files, in and out, never a pickle.

Reading trusts nothing: file names from an index stay inside the directory, headers are checked before any
tensor is touched, and code that a directory brings along is refused. Writing needs memory for one tensor:
the directory fills under a temporary name and appears under its own when it is complete.

Format: the published specification of safetensors
"""

from __future__ import annotations

import json
import os
import re
import reprlib
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastpref.checkpoint.diagnosis import ADAPTER_CONFIG_FILE, CONFIG_FILE, other_contents
from fastpref.checkpoint.headers import TensorInfo, TensorSpec, encode_header, listed, read_header, read_json, refuse
from fastpref.errors import CheckpointError
from fastpref.files import sync

# Everything that a tokenizer needs; never Python files.
COMPANION_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tiktoken.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
# Named chat templates, and tokenizers for certain versions of transformers or of Mistral's models.
_COMPANION_PATTERNS = ("additional_chat_templates/*.jinja", "tokenizer.*.json", "tokenizer.model.v*")
# Rotary tables that some files carry along; they follow from config.json.
_DERIVED = re.compile(r"(?:.+\.)?rotary_emb\.\w+")
_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors")


class ModelDirectory:
    """A model directory open for reading.

    Attributes:
        path: the directory.
        config: the contents of `config.json`.
        tensors: every tensor of the model by name, but for rotary tables, which follow from the configuration.

    Args:
        path: a directory with `config.json` and either `model.safetensors` or an index with its shards.

    Raises:
        CheckpointError: it is incomplete, holds only pickled weights, wants to run code of its own, or a
            header does not describe its file.
    """

    stem, config_file = "model", CONFIG_FILE

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = read_config(self.path, self.config_file)
        self.tensors: dict[str, TensorInfo] = {}
        self._open_files: dict[Path, Any] = {}
        files = self._weight_files()
        if self.config_file == CONFIG_FILE and (self.path / ADAPTER_CONFIG_FILE).is_file():
            refuse(
                self.path,
                f"holds a whole model and an adapter ({ADAPTER_CONFIG_FILE}), which transformers would take instead; "
                "move the adapter's files to a directory of their own",
            )
        for file in files:
            for name, info in read_header(file).items():
                if _DERIVED.fullmatch(name):
                    continue
                if name in self.tensors:
                    refuse(file, f"tensor {name!r} is also in {self.tensors[name].path.name}")
                self.tensors[name] = info
        self._check_index()

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """Read a slice of a tensor; only the bytes of the slice are copied.

        Args:
            name: a key of `tensors`.
            dim: 0 or 1, the dimension to slice.
            start: first index in `dim`.
            stop: index after the last in `dim`; None for the end.

        Returns:
            The slice on the CPU in the file's dtype.
        """
        file = self.tensors[name].path
        if file not in self._open_files:
            try:
                self._open_files[file] = safe_open(file, framework="pt")
            except SafetensorError as error:
                raise CheckpointError(f"{file}: not a valid safetensors file: {error}; copy it again") from error
        if not self.tensors[name].shape:
            return self._open_files[file].get_tensor(name)  # a scalar has nothing to slice
        view = self._open_files[file].get_slice(name)
        return view[start:stop] if dim == 0 else view[:, start:stop]

    @property
    def _index_path(self) -> Path:
        return self.path / f"{self.stem}.safetensors.index.json"

    def _weight_files(self) -> list[Path]:
        single, index = self.path / f"{self.stem}.safetensors", self._index_path
        # some writers add an index to a single file
        if single.is_file() and index.is_file() and set(self._weight_map().values()) != {single.name}:
            refuse(self.path, f"holds both {single.name} and {index.name}; remove the one that is out of date")
        if single.is_file():
            return [single]
        if not index.is_file():
            self._refuse_without_weights()
        files = [self.path / name for name in sorted(set(self._weight_map().values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            refuse(index, f"names files that do not exist: {listed(missing)}; download them")
        return files

    def _refuse_without_weights(self) -> NoReturn:
        found = other_contents(self.path, self.config_file)
        if found is None:
            names = sorted(file.name for file in self.path.iterdir())
            found = f"found: {listed(names)}; download the weights, too"
        refuse(self.path, f"has neither {self.stem}.safetensors nor its index: {found}")

    def _weight_map(self) -> dict[str, str]:
        index = self._index_path
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            refuse(index, "`weight_map` must map tensor names to file names")
        for name, file in weight_map.items():
            if not isinstance(file, str) or not _SAFE_NAME.fullmatch(file):
                refuse(
                    index,
                    f"maps {name!r} to {file!r}; only .safetensors files beside the index are read; move them there, "
                    "and take directories out of the names in the index",
                )
        return weight_map

    def _check_index(self) -> None:
        # `metadata.total_size` is not compared: many writers get it wrong.
        if not self._index_path.is_file():
            return
        weight_map = self._weight_map()
        found = {name: info.path.name for name, info in self.tensors.items()}
        names = (name for name in {*weight_map, *found} if not _DERIVED.fullmatch(name))
        wrong = sorted(name for name in names if weight_map.get(name) != found.get(name))
        if wrong:
            lines = [f"{name} (index: {weight_map.get(name)}, found in: {found.get(name)})" for name in wrong]
            refuse(self._index_path, f"does not fit its files: {listed(lines)}; write or download it again")


class ModelWriter:
    """Writes a model directory tensor by tensor; use as a context manager.

    The directory gets its name when the block ends without an error; before that, and after an error, nothing
    is visible there. Files have the mode that the umask asks for.

    Args:
        path: the new directory; it must not exist, or be empty.
        specs: all tensors in the order in which they will be written.
        config: contents of `config.json`.
        companions: directory to copy tokenizer files and `generation_config.json` from, if they exist there.
        replaced: contents of further files by name, in place of copies; None leaves a file out.
        max_shard_bytes: a new file starts before this size is passed; one tensor may be larger.

    Raises:
        CheckpointError: `path` exists and is not empty, or a tensor differs from its spec.
        OSError: the disk is full or the directory cannot be written.
    """

    stem, config_file = "model", CONFIG_FILE

    def __init__(
        self,
        path: str | Path,
        specs: Sequence[TensorSpec],
        config: dict[str, Any],
        companions: str | Path | None = None,
        max_shard_bytes: int = 5_000_000_000,
        replaced: Mapping[str, bytes | None] | None = None,
    ) -> None:
        self.path = Path(os.path.abspath(path))
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise CheckpointError(f"{self.path} exists and is not empty; choose a new directory or remove it first")
        self._shards = _plan_shards(specs, max_shard_bytes)
        self._config, self._companions, self._replaced = config, companions, dict(replaced or {})
        self._queue = [(number, spec) for number, shard in enumerate(self._shards) for spec in shard]
        self._position, self._is_broken = 0, False
        self._file: BinaryIO | None = None
        self._temporary = self.path.with_name(f"{self.path.name}.tmp-{uuid.uuid4().hex[:12]}")

    def __enter__(self) -> ModelWriter:
        """Create the temporary directory."""
        self._temporary.mkdir(parents=True)
        # a second try begins with nothing: what the first one wrote is gone
        self._position, self._is_broken = 0, False
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor of `specs`, from any device."""
        self._refuse_broken()
        number, spec = self._queue[self._position] if self._position < len(self._queue) else (-1, None)
        if spec != TensorSpec(name, tensor.dtype, tuple(tensor.shape)):
            raise CheckpointError(f"tensor {name} {tensor.dtype} {tuple(tensor.shape)} was written, expected {spec}")
        self._is_broken = True  # until all of the tensor is there
        if self._position == 0 or self._queue[self._position - 1][0] != number:
            self._close_shard()
            self._file = open(self._temporary / self._shard_name(number), "xb")  # noqa: SIM115  (open until the shard is full)
            self._file.write(encode_header(self._shards[number]))
        assert self._file is not None
        self._file.write(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data)
        self._position, self._is_broken = self._position + 1, False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Publish the directory, or remove what was written after an error."""
        try:
            if kind is None:
                self._publish()
        finally:
            if self._file is not None:
                self._file.close()
                self._file = None
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _refuse_broken(self) -> None:
        if self._is_broken:
            name = self._queue[self._position][1].name
            raise CheckpointError(
                f"tensor {name} of {self.path} was written in part, by a write that failed; leave the block and write "
                "all tensors again"
            )

    def _publish(self) -> None:
        self._refuse_broken()
        if self._position != len(self._queue):
            raise CheckpointError(f"{len(self._queue) - self._position} tensors of {self.path} were never written")
        self._close_shard()
        if len(self._shards) > 1:
            weight_map = {spec.name: self._shard_name(number) for number, spec in self._queue}
            total = sum(spec.num_bytes for _, spec in self._queue)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            self._write_json(f"{self.stem}.safetensors.index.json", index)
        for name in [] if self._companions is None else companion_names(self._companions):
            if name not in self._replaced:
                self._write_bytes(name, (Path(self._companions or "") / name).read_bytes())
        for name, content in self._replaced.items():
            if content is not None:
                self._write_bytes(name, content)
        self._write_json(self.config_file, self._config)
        sync(self._temporary)
        os.replace(self._temporary, self.path)
        sync(self.path.parent)

    def _shard_name(self, number: int) -> str:
        if len(self._shards) == 1:
            return f"{self.stem}.safetensors"
        return f"{self.stem}-{number + 1:05d}-of-{len(self._shards):05d}.safetensors"

    def _close_shard(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        self._write_bytes(name, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())

    def _write_bytes(self, name: str, content: bytes) -> None:
        path = self._temporary / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.parent != self._temporary:
            sync(path.parent)


def companion_names(directory: str | Path) -> list[str]:
    """List the tokenizer files and `generation_config.json` of a directory, by their path in it."""
    root = Path(directory)
    matching = [path.relative_to(root).as_posix() for pattern in _COMPANION_PATTERNS for path in root.glob(pattern)]
    return sorted(name for name in {*COMPANION_FILES, *matching} if (root / name).is_file())


def read_config(directory: str | Path, name: str = CONFIG_FILE) -> dict[str, Any]:
    """Read the `config.json` of a model directory, or its other file `name`.

    Raises:
        CheckpointError: there is none, it is no JSON object, or it asks for code of its own (`auto_map`).
    """
    path = Path(directory) / name
    if not Path(directory).is_dir():
        raise CheckpointError(f"{directory} is not a directory; pass a local directory with {name}")
    if not path.is_file():
        found = other_contents(Path(directory), name) or "give the directory that was downloaded or saved with it"
        raise CheckpointError(f"{directory} has no {name}: {found}")
    config = read_json(path)
    if config.get("auto_map"):
        refuse(
            path,
            f"`auto_map` asks for Python code of the model's own ({reprlib.repr(config['auto_map'])}), which never "
            "runs here",
        )
    return config


class AdapterDirectory(ModelDirectory):
    """An adapter directory as peft writes it: `adapter_config.json` and `adapter_model.safetensors`."""

    stem, config_file = "adapter_model", ADAPTER_CONFIG_FILE


class AdapterWriter(ModelWriter):
    """Writes an adapter directory as peft reads it, in one file."""

    stem, config_file = "adapter_model", ADAPTER_CONFIG_FILE


def _plan_shards(specs: Sequence[TensorSpec], max_shard_bytes: int) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.num_bytes
    return shards
