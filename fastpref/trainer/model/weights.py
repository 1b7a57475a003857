"""Weights between a model's files and its Megatron chunks, in any parallel layout, one parameter at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from fastpref.checkpoint.headers import TensorSpec
from fastpref.checkpoint.hf import ModelWriter
from fastpref.errors import CheckpointError
from fastpref.run.architecture.architecture import Architecture
from fastpref.run.architecture.layouts import Layout, VocabRows
from fastpref.run.architecture.model_files import same_values, tensor_problems, tie_problem
from fastpref.run.architecture.names import (
    EMBEDDING,
    HEAD,
    file_shapes,
    is_expert,
    parameter_table,
    table_name,
)
from fastpref.trainer.ranks.agreement import agree, together


class TensorSource(Protocol):
    """Where the tensors of a model come from."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """List all tensors by name."""
        ...

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """Read `[start:stop]` along `dim`."""
        ...


class RandomTensors:
    """Initial weights that depend on a seed and the tensor's name, not on the parallel layout.

    Matrices are normal with the config's `initializer_range`, norms one (zero where they multiply by 1 + weight),
    biases zero, as in transformers.

    Args:
        arch: the model.
        seed: any integer.
    """

    def __init__(self, arch: Architecture, seed: int) -> None:
        self._shapes, self._std, self._seed = file_shapes(arch), arch.init_std, seed
        self._norm = 0.0 if arch.zero_centered_norms else 1.0

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """List all tensors by name."""
        return self._shapes

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """Make the whole tensor and cut `[start:stop]` along `dim` out of it."""
        shape = self._shapes[name]
        if len(shape) == 1:
            value = 0.0 if name.endswith(".bias") else self._norm
            full = torch.full(shape, value, dtype=torch.float32, device="cpu")
        else:
            digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
            full = torch.empty(shape, dtype=torch.float32, device="cpu")
            full.normal_(std=self._std, generator=generator)
        return full[start:stop] if dim == 0 else full[:, start:stop]


def load_parameters(models: Sequence[GPTModel], arch: Architecture, source: TensorSource) -> None:
    """Fill every parameter of this rank's chunks; each rank reads only its own slices.

    Every rank of the job calls it, and every rank fails if one does.

    Raises:
        CheckpointError: tensors are missing, unexpected or of the wrong shape, a value is not finite, or a
            tied model brings an `lm_head.weight` that differs from its embedding.
    """
    problems = tensor_problems(source.shapes(), arch)
    if not problems:
        try:
            problems = _fill_all(models, arch, source)
        except (OSError, CheckpointError) as error:  # a disk that only this rank cannot read
            problems = [str(error)]
    agree(problems)


def save_parameters(
    parameters: Mapping[str, Tensor],
    arch: Architecture,
    path: Path,
    config: dict[str, Any],
    companions: Path | None,
    dtype: torch.dtype,
    max_shard_bytes: int,
    replaced: Mapping[str, bytes | None] | None = None,
) -> None:
    """Write `parameters_of` a model as a directory; global rank 0 writes, and holds one parameter at a time.

    Every rank of the job calls it, and every rank fails if rank 0 cannot write.

    Raises:
        CheckpointError: `path` exists and is not empty, or rank 0 could not write it.
        OSError: rank 0's disk is full.
    """
    specs = [TensorSpec(name, dtype, shape) for name, shape in file_shapes(arch).items()]
    tensors = merged_tensors(parameters, parameter_table(arch), dtype)
    write_tensors(tensors, lambda: ModelWriter(path, specs, config, companions, max_shard_bytes, replaced))


def write_tensors(tensors: Iterator[tuple[str, Tensor]], make_writer: Callable[[], ModelWriter]) -> None:
    """Write what `merged_tensors` yields; only global rank 0 makes the writer.

    Every rank of the job calls it, and every rank fails if rank 0 cannot write.

    Raises:
        CheckpointError: the directory exists and is not empty, or rank 0 could not write it.
        OSError: rank 0's disk is full.
    """
    is_writer = torch.distributed.get_rank() == 0
    writer = together(lambda: make_writer() if is_writer else None, "beginning a directory of weights")

    def send_the_rest() -> None:
        for _ in tensors:
            pass

    def write() -> None:
        try:
            if writer is not None:
                with writer:
                    for name, tensor in tensors:
                        writer.write(name, tensor)
        except Exception:
            send_the_rest()  # as the other ranks do, whether or not the disk took what came before
            raise
        send_the_rest()

    together(write, "writing weights")


def parameters_of(models: Sequence[GPTModel]) -> dict[str, Tensor]:
    """List the parameters of this rank by their name in `parameter_table`."""
    parameters: dict[str, Tensor] = {}
    for model in models:
        layers = model.decoder.layers
        offset = layers[0].layer_number - 1 if len(layers) else 0
        num_experts, ep = model.config.num_moe_experts or 0, parallel_state.get_expert_model_parallel_world_size()
        first_expert = parallel_state.get_expert_model_parallel_rank() * num_experts // ep
        for name, parameter in model.named_parameters():
            parameters[table_name(name, offset, first_expert)] = parameter
    return parameters


def _fill_all(models: Sequence[GPTModel], arch: Architecture, source: TensorSource) -> list[str]:
    table, problems = parameter_table(arch), []
    with torch.no_grad():
        for name, parameter in parameters_of(models).items():
            is_tied_copy = arch.tie_embeddings and name == "output_layer.weight"
            layout = table["embedding.word_embeddings.weight" if is_tied_copy else name]
            problems += fill(parameter, layout, source, _split_group(name))
    if arch.tie_embeddings and HEAD in source.shapes():
        problems += _tied_head_problems(models, arch, source)
    return problems


def fill(
    parameter: Tensor, layout: Layout, source: TensorSource, group: torch.distributed.ProcessGroup | None = None
) -> list[str]:
    """Copy this rank's slice of a parameter out of its file tensors; return what is wrong with the values.

    `group` holds the ranks that share the parameter; None stands for the tensor-parallel ones.
    """
    group = group or parallel_state.get_tensor_model_parallel_group()
    value = layout.shard(source.read, group.rank(), group.size())
    assert value.shape == parameter.shape, f"{layout}: {tuple(value.shape)} for {tuple(parameter.shape)}"
    parameter.copy_(value)
    if bool(torch.isfinite(parameter).all()):
        return []
    return [f"values that are not finite (in {parameter.dtype}) in: {', '.join(layout.shapes)}"]


def _tied_head_problems(models: Sequence[GPTModel], arch: Architecture, source: TensorSource) -> list[str]:
    if not any(model.pre_process for model in models):
        return []
    shape, size = (arch.vocab_size, arch.hidden_size), parallel_state.get_tensor_model_parallel_world_size()
    embedding, head = (VocabRows(name, shape).shard(source.read, _tp_rank(), size) for name in (EMBEDDING, HEAD))
    if same_values(embedding, head):
        return []
    return [tie_problem()]


def merged_tensors(
    parameters: Mapping[str, Tensor], table: Mapping[str, Layout], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """On global rank 0 the file tensors of `table` in its order; elsewhere nothing, but all must iterate."""
    rank = torch.distributed.get_rank()
    # Of several ranks with the same weights, one gives them.
    given = {name: parameter for name, parameter in parameters.items() if _copy_rank(name) == 0}
    by_rank: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(by_rank, [name for name in given if _split_group(name).rank() == 0])
    owner = {name: owner for owner, names in enumerate(by_rank) for name in names}
    for name, layout in table.items():
        merged = _merge(given[name], layout, dtype, _split_group(name)) if name in given else {}
        for file_name, shape in layout.shapes.items():
            if owner[name] == rank == 0:
                yield file_name, merged[file_name]
            elif owner[name] == rank:
                torch.distributed.send(merged[file_name], dst=0)
            elif rank == 0:
                received = torch.empty(shape, dtype=dtype, device=next(iter(parameters.values())).device)
                torch.distributed.recv(received, src=owner[name])
                yield file_name, received


def _merge(
    parameter: Tensor, layout: Layout, dtype: torch.dtype, group: torch.distributed.ProcessGroup
) -> dict[str, Tensor]:
    """Gather the file tensors of one parameter on the first rank of `group`; {} on the others."""
    shard = parameter.detach().to(dtype).contiguous()
    if group.size() == 1:  # a gather would copy
        return {name: t.contiguous() for name, t in layout.merge([shard]).items()}
    shards = [torch.empty_like(shard) for _ in range(group.size())] if group.rank() == 0 else None
    torch.distributed.gather(shard, shards, dst=torch.distributed.get_global_rank(group, 0), group=group)
    return {} if shards is None else {name: t.contiguous() for name, t in layout.merge(shards).items()}


def _split_group(name: str) -> torch.distributed.ProcessGroup:
    """The ranks that share one parameter of `parameter_table`; experts have tensor-parallel groups of their own."""
    if is_expert(name):
        return parallel_state.get_expert_tensor_parallel_group()
    return parallel_state.get_tensor_model_parallel_group()


def _copy_rank(name: str) -> int:
    """This rank's place among those that hold the same shard of a parameter."""
    if is_expert(name):
        return parallel_state.get_expert_data_parallel_rank()
    return parallel_state.get_data_parallel_rank(with_context_parallel=True)


def _tp_rank() -> int:
    return parallel_state.get_tensor_model_parallel_rank()
