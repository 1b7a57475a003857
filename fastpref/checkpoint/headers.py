"""Headers of safetensors files and the JSON around them, checked before anything is believed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from fastpref.errors import CheckpointError
from fastpref.files import parse_object

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# The largest published headers and indexes are under 12 MB; more is an attempt to exhaust memory, of which JSON takes
# about 12 times its own size once it is read.
MAX_JSON_BYTES = 16 << 20
# What PyTorch can represent; the product of more, or larger, sizes has no bound on its time.
MAX_DIMS, MAX_SIZE = 64, 2**63 - 1
# How a file of git's extension for large files begins where the file itself was not fetched.
_POINTER = b"version https://git-lfs"


class TensorInfo(NamedTuple):
    """Where a tensor lies and what it is."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]


class TensorSpec(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the tensor's data."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of at most `MAX_JSON_BYTES` with unique keys.

    Raises:
        CheckpointError: it is anything else.
    """
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        refuse(path, f"has {size} bytes, more than the {MAX_JSON_BYTES} that are read as JSON")
    return _parse_object(path, path.read_bytes())


def _parse_object(path: Path, raw: bytes) -> dict[str, Any]:
    _refuse_pointer(path, raw)
    try:
        return parse_object(raw)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; copy or download the file again") from error


def refuse_if_pointer(path: Path) -> None:
    """Refuse a file that git's extension for large files has not fetched.

    Raises:
        CheckpointError: it is one.
    """
    with open(path, "rb") as file:
        _refuse_pointer(path, file.read(len(_POINTER)))


def _refuse_pointer(path: Path, beginning: bytes) -> None:
    if beginning.startswith(_POINTER):
        refuse(
            path,
            f"is a git-lfs pointer of {path.stat().st_size} bytes, not the file itself; run `git lfs install` and then "
            "`git lfs pull` in its repository, or download the file again",
        )


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read the tensors of a safetensors file; every byte of the file must belong to exactly one of them.

    Raises:
        CheckpointError: the header is damaged, or describes another file.
    """
    file_size = path.stat().st_size
    refuse_if_pointer(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if file_size < 8 or length > min(MAX_JSON_BYTES, file_size - 8):
            refuse(path, f"a header of {length} bytes does not fit a file of {file_size}; copy or download it again")
        header = _parse_object(path, file.read(length))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        refuse(path, "`__metadata__` must map names to strings; copy or download the file again")
    tensors, spans = {}, []
    for name, entry in header.items():
        info, (start, stop) = _parse_entry(path, name, entry)
        tensors[name] = info
        spans.append((start, stop, name))
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            refuse(path, f"tensor {name!r} starts at byte {start} of the data, expected {end}: an overlap or a gap")
        end = stop
    if 8 + length + end != file_size:
        refuse(path, f"has {file_size} bytes, its header describes {8 + length + end}; copy or download it again")
    return tensors


def _parse_entry(path: Path, name: str, entry: Any) -> tuple[TensorInfo, tuple[int, int]]:
    try:
        dtype_name, sizes, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        refuse(path, f"tensor {name!r} has a malformed header entry")
    if not isinstance(dtype_name, str) or not isinstance(sizes, list) or len(sizes) > MAX_DIMS:
        refuse(path, f"tensor {name!r} has a malformed header entry")
    shape = tuple(sizes)
    if dtype_name not in DTYPES:
        refuse(
            path,
            f"tensor {name!r} has dtype {dtype_name}; only {', '.join(DTYPES)} weights can be trained on; take "
            "the model that was not quantised",
        )
    numbers = (*shape, start, stop)
    if not all(type(number) is int and 0 <= number <= MAX_SIZE for number in numbers):
        refuse(path, f"tensor {name!r} has a shape or offset that is no whole number >= 0 below 2**63")
    needed = TensorSpec(name, DTYPES[dtype_name], shape).num_bytes
    if stop - start != needed:
        refuse(path, f"tensor {name!r} of {dtype_name} {list(shape)} has {stop - start} bytes, needs {needed}")
    return TensorInfo(path, DTYPES[dtype_name], shape), (start, stop)


def encode_header(specs: Sequence[TensorSpec]) -> bytes:
    """Encode the first bytes of a safetensors file that holds `specs` in this order."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        end = offset + spec.num_bytes
        entries[spec.name] = {
            "dtype": _DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # readers map the data; it must start on a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text


def refuse(path: Path, message: str) -> NoReturn:
    """Raise the error that names the file first."""
    raise CheckpointError(f"{path}: {message}")


def listed(items: Iterable[str], limit: int = 20) -> str:
    """Join at most `limit` items and say how many more there are."""
    items = list(items)
    more = f", and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
