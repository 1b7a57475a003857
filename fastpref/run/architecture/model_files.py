"""Whether the files of a model directory hold the tensors that its `config.json` promises: headers tell."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastpref.checkpoint.headers import listed
from fastpref.checkpoint.hf import CONFIG_FILE, ModelDirectory
from fastpref.errors import CheckpointError
from fastpref.run.architecture.architecture import Architecture
from fastpref.run.architecture.names import EMBEDDING, HEAD, file_shapes, unwrapped

# Rows of the embedding that are compared with the head's before all of both are read.
_SAMPLE_ROWS = 128
# What the names of all tensors but the head's begin with.
_BODY = "model."


class ModelFiles:
    """A model directory as a source of tensors.

    Of a tied model some writers keep the head and leave the embedding out: it is read under the embedding's name.

    Args:
        directory: the files.
        arch: the model that they are read for.
    """

    def __init__(self, directory: ModelDirectory, arch: Architecture) -> None:
        self._directory = directory
        self._file_names = {name: name for name in directory.tensors}
        if arch.tie_embeddings and EMBEDDING not in self._file_names and HEAD in self._file_names:
            self._file_names[EMBEDDING] = self._file_names.pop(HEAD)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """List all tensors by name."""
        return {name: self._directory.tensors[file_name].shape for name, file_name in self._file_names.items()}

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """Read `[start:stop]` along `dim`."""
        return self._directory.read(self._file_names[name], dim, start, stop)


def check_model_files(path: str | Path, arch: Architecture) -> None:
    """Check a model directory as far as that is possible without its weights.

    Of a tied model that brings a head of its own, some rows of both are compared.

    Raises:
        CheckpointError: files are missing, damaged or unsafe, or tensors do not fit; the message lists everything.
    """
    files = ModelFiles(ModelDirectory(path), arch)
    shapes = files.shapes()
    problems = tensor_problems(shapes, arch)
    if not problems and arch.tie_embeddings and HEAD in shapes:
        problems += _tie_problems(files, shapes[EMBEDDING][0])
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


def empty_hint(shapes: Iterable[tuple[int, ...]]) -> str:
    """Say where tensors without values come from, if there are any."""
    if (0,) not in shapes:
        return ""
    return (
        "; DeepSpeed's ZeRO-3 leaves empty tensors where it saves without gathering: set "
        "stage3_gather_16bit_weights_on_model_save, or put its checkpoint together with zero_to_fp32.py"
    )


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape hold the same numbers, in whatever formats."""
    dtype = torch.promote_types(one.dtype, other.dtype)
    return torch.equal(one.to(dtype), other.to(dtype))


def _name_problems(found: Mapping[str, tuple[int, ...]], arch: Architecture) -> Iterator[str]:
    expected = file_shapes(arch)
    allowed = {HEAD} if arch.tie_embeddings else set()
    unexpected = [name for name in found if name not in expected and name not in allowed]
    missing = [name for name in expected if name not in found]
    if missing:
        yield f"missing tensors: {listed(missing)}{_missing_remedy(missing, unexpected)}"
    if unexpected:
        # with tensors missing, transformers would make up others in their place
        drop = "; if the model does not need them, load it with transformers and save it again, which drops them"
        yield f"unexpected tensors: {listed(sorted(unexpected))}{'' if missing else drop}"


def _missing_remedy(missing: list[str], unexpected: list[str]) -> str:
    """Say how a head, or tensors that are there under other names, got lost."""
    if missing == [HEAD] and not unexpected:
        return f"; set tie_word_embeddings to true in {CONFIG_FILE} if the head is the embedding"
    others = set(unexpected)
    if EMBEDDING in missing and all(name.removeprefix(_BODY) in others for name in missing):
        return "; the names lack model. at their beginning: load it with transformers' AutoModelForCausalLM and save it"
    if {*missing} <= {unwrapped(name) for name in unexpected}:
        return "; the names hold those of a wrapper, as DDP, FSDP and torch.compile use: save the model inside of it"
    return ""


def _shape_problems(found: Mapping[str, tuple[int, ...]], arch: Architecture) -> Iterator[str]:
    shapes = file_shapes(arch)
    shapes[HEAD] = shapes[EMBEDDING]
    wrong = [name for name, shape in shapes.items() if name in found and tuple(found[name]) != shape]
    if not wrong:
        return
    sizes = {tuple(found[name]) for name in wrong}
    remedy = empty_hint(sizes)
    if {*wrong} == {EMBEDDING, HEAD} & {*found} and len(sizes) == 1:
        ((rows, *width),) = sizes
        if width == [arch.hidden_size]:
            remedy = f"; set vocab_size to {rows} in {CONFIG_FILE}"
    lines = [f"{name} is {list(found[name])}, {CONFIG_FILE} says {list(shapes[name])}" for name in wrong]
    yield f"wrong shapes: {listed(lines)}{remedy}"


def _tie_problems(files: ModelFiles, num_rows: int) -> Iterator[str]:
    for row in range(0, num_rows, -(-num_rows // _SAMPLE_ROWS)):
        embedding, head = (files.read(name, 0, row, row + 1) for name in (EMBEDDING, HEAD))
        if not same_values(embedding, head):
            yield tie_problem()
            return
