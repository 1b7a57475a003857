"""Whether the files of a model directory hold the tensors that its `config.json` promises: headers tell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastpref.checkpoint.headers import listed
from fastpref.checkpoint.hf import CONFIG_FILE, ModelDirectory
from fastpref.errors import CheckpointError
from fastpref.run.architecture.architecture import Architecture
from fastpref.run.architecture.names import DERIVED_TENSOR, EMBEDDING, HEAD, file_shapes

# Rows of the embedding that are compared with the head's before all of both are read.
_SAMPLE_ROWS = 128


def check_model_files(path: str | Path, arch: Architecture) -> None:
    """Check a model directory as far as that is possible without its weights.

    Of a tied model that brings a head of its own, some rows of both are compared.

    Raises:
        CheckpointError: files are missing, damaged or unsafe, or tensors do not fit; the message lists everything.
    """
    directory = ModelDirectory(path)
    problems = tensor_problems({name: info.shape for name, info in directory.tensors.items()}, arch)
    if not problems and arch.tie_embeddings and HEAD in directory.tensors:
        problems += _tie_problems(directory)
    if problems:
        raise CheckpointError(f"{path}: {'; '.join(problems)}")


def tensor_problems(found: Mapping[str, tuple[int, ...]], arch: Architecture) -> list[str]:
    """Compare the tensors of a model's files with those that the model needs.

    Args:
        found: shapes by name.
        arch: the model.
    """
    return [*_name_problems(found, arch), *_shape_problems(found, arch)]


def tie_problem() -> str:
    """Say that a tied model brings a head that is not its embedding."""
    # transformers drops the head of a tied model; one that says something else must not vanish unnoticed.
    return (
        f"tie_word_embeddings is true but {HEAD} differs from {EMBEDDING}; set it to false in {CONFIG_FILE} to keep "
        "the head"
    )


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape hold the same numbers, in whatever formats."""
    dtype = torch.promote_types(one.dtype, other.dtype)
    return torch.equal(one.to(dtype), other.to(dtype))


def _name_problems(found: Mapping[str, tuple[int, ...]], arch: Architecture) -> Iterator[str]:
    expected = file_shapes(arch)
    allowed = {HEAD} if arch.tie_embeddings else set()
    unexpected = [name for name in found if name not in expected and name not in allowed]
    unexpected = [name for name in unexpected if not DERIVED_TENSOR.fullmatch(name)]
    missing = [name for name in expected if name not in found]
    if missing:
        is_tie = missing == [HEAD]
        remedy = f"; set tie_word_embeddings to true in {CONFIG_FILE} if the head is the embedding" if is_tie else ""
        yield f"missing tensors: {listed(missing)}{remedy}"
    if unexpected:
        yield f"unexpected tensors: {listed(sorted(unexpected))}"


def _shape_problems(found: Mapping[str, tuple[int, ...]], arch: Architecture) -> Iterator[str]:
    shapes = file_shapes(arch)
    shapes[HEAD] = shapes[EMBEDDING]
    wrong = [name for name, shape in shapes.items() if name in found and tuple(found[name]) != shape]
    if not wrong:
        return
    remedy, sizes = "", {tuple(found[name]) for name in wrong}
    if {*wrong} == {EMBEDDING, HEAD} & {*found} and len(sizes) == 1:
        ((rows, *width),) = sizes
        if width == [arch.hidden_size]:
            remedy = f"; set vocab_size to {rows} in {CONFIG_FILE}"
    lines = [f"{name} is {list(found[name])}, {CONFIG_FILE} says {list(shapes[name])}" for name in wrong]
    yield f"wrong shapes: {listed(lines)}{remedy}"


def _tie_problems(directory: ModelDirectory) -> Iterator[str]:
    num_rows = directory.tensors[EMBEDDING].shape[0]
    for row in range(0, num_rows, -(-num_rows // _SAMPLE_ROWS)):
        embedding, head = (directory.read(name, 0, row, row + 1) for name in (EMBEDDING, HEAD))
        if not same_values(embedding, head):
            yield tie_problem()
            return
