"""Weights between a model's files and its Megatron chunks, in any parallel layout, one parameter at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from fastpref.checkpoint.headers import TensorSpec
from fastpref.checkpoint.hf import ModelWriter
from fastpref.run.architecture.architecture import Architecture
from fastpref.run.architecture.layouts import VocabRows
from fastpref.run.architecture.model_files import same_values, tensor_problems, tie_problem
from fastpref.run.architecture.names import (
    EMBEDDING,
    HEAD,
    file_shapes,
    parameter_table,
    table_name,
)
from fastpref.trainer.model.reading import TensorSource, fill, is_reader
from fastpref.trainer.model.writing import write_tensors
from fastpref.trainer.ranks.agreement import agree, together


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
    """Fill every parameter of this rank's chunks; of the ranks that hold the same shard, one reads it.

    Every rank of the job calls it, and every rank fails if one does.

    Raises:
        CheckpointError: tensors are missing, unexpected or of the wrong shape, a value is not finite, or a
            tied model brings an `lm_head.weight` that differs from its embedding.
    """
    agree(tensor_problems(source.shapes(), arch))
    agree(together(lambda: _fill_all(models, arch, source), "reading weights"))


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
    """Write `parameters_of` a model as a directory; global rank 0 writes, and holds one bucket of them at a time.

    Every rank of the job calls it, and every rank fails if rank 0 cannot write.

    Raises:
        CheckpointError: `path` exists and is not empty, or rank 0 could not write it.
        OSError: rank 0's disk is full.
    """
    specs = [TensorSpec(name, dtype, shape) for name, shape in file_shapes(arch).items()]
    write_tensors(
        parameters,
        parameter_table(arch),
        dtype,
        lambda: ModelWriter(path, specs, config, companions, max_shard_bytes, replaced),
    )


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
    table, parameters = parameter_table(arch), parameters_of(models)
    if arch.tie_embeddings:  # the last pipeline stage has a copy of the embedding
        table["output_layer.weight"] = table["embedding.word_embeddings.weight"]
    problems = fill(parameters, table, source)
    if arch.tie_embeddings and HEAD in source.shapes() and is_reader():
        problems += _tied_head_problems(models, arch, source)
    return problems


def _tied_head_problems(models: Sequence[GPTModel], arch: Architecture, source: TensorSource) -> list[str]:
    if not any(model.pre_process for model in models):
        return []
    rank, size = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    shape = (arch.vocab_size, arch.hidden_size)
    embedding, head = (VocabRows(name, shape).shard(source.read, rank, size) for name in (EMBEDDING, HEAD))
    return [] if same_values(embedding, head) else [tie_problem()]
