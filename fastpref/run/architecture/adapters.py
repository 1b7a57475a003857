"""Adapters in and out: every adapter parameter of a model, and the peft tensors behind it.

An adapter has two parameters. `lora_A` stacks the A of every target in its linear layer. `lora_B` has the rows of that
layer's weight, in the same order, with the r columns of the B whose output a row is; rows of projections that are no
targets stay zero.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastpref.errors import ConfigError
from fastpref.run.architecture.architecture import Architecture
from fastpref.run.architecture.layouts import Columns, GateUp, Layout, QueryKeyValue, Read, Replicated
from fastpref.run.architecture.lora_config import LoraConfig
from fastpref.run.architecture.names import is_expert, parameter_table

ADAPTER = "adapter"
_A, _B = "lora_A", "lora_B"


@dataclass(frozen=True)
class Stacked:
    """Matrices of one shape on top of each other, the same on every rank."""

    names: tuple[str, ...]
    shape: tuple[int, int]

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The matrices."""
        return dict.fromkeys(self.names, self.shape)

    def shard(self, read: Read, rank: int, size: int) -> Tensor:
        """Read all of them."""
        return torch.cat([read(name, 0, 0, None) for name in self.names])

    def merge(self, shards: Sequence[Tensor]) -> dict[str, Tensor]:
        """Cut the first rank's copy."""
        return dict(zip(self.names, shards[0].split(self.shape[0]), strict=True))


@dataclass(frozen=True)
class Subset:
    """A fused layout of which the files hold only some tensors; the rows of the others are zero."""

    whole: Layout
    names: tuple[str, ...]

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The tensors that are there."""
        return {name: self.whole.shapes[name] for name in self.names}

    def shard(self, read: Read, rank: int, size: int) -> Tensor:
        """Read the tensors that are there."""

        def read_or_zero(name: str, dim: int, start: int, stop: int | None) -> Tensor:
            if name in self.names:
                return read(name, dim, start, stop)
            like = read(self.names[0], 0, 0, 0)
            return like.new_zeros(self.whole.shapes[name])[start:stop]

        return self.whole.shard(read_or_zero, rank, size)

    def merge(self, shards: Sequence[Tensor]) -> dict[str, Tensor]:
        """Keep the tensors that are there."""
        merged = self.whole.merge(shards)
        return {name: merged[name] for name in self.names}


@dataclass(frozen=True)
class AdaptedLinear:
    """A linear layer of the model and the adapter beside it."""

    base: Layout
    """Layout of the layer's weight."""
    targets: tuple[str, ...]
    """Tensors of the model's files, among those of `base`, that are adapted."""
    r: int
    """Rank."""

    @property
    def is_row_parallel(self) -> bool:
        """Whether ranks hold columns of the weight, so that A is split and B is not."""
        return isinstance(self.base, Columns)

    @property
    def layouts(self) -> dict[str, Layout]:
        """Layouts of `lora_A` and `lora_B`."""
        (width,) = {self.base.shapes[name][1] for name in self.targets}
        a_names = tuple(peft_name(name, _A) for name in self.targets)
        if isinstance(self.base, Columns):
            name = peft_name(self.base.name, _B)
            return {
                _A: Columns(a_names[0], (self.r, width)),
                _B: Replicated(name, (self.base.shape[0], self.r)),
            }
        renamed: Layout
        if isinstance(self.base, GateUp):
            gate, up = (peft_name(name, _B) for name in (self.base.gate, self.base.up))
            renamed = GateUp(gate, up, (self.base.shape[0], self.r))
        else:
            assert isinstance(self.base, QueryKeyValue)
            query, key, value = (peft_name(name, _B) for name in (self.base.query, self.base.key, self.base.value))
            renamed = replace(self.base, query=query, key=key, value=value, tail=(self.r,))
        b_names = tuple(peft_name(name, _B) for name in self.targets)
        return {_A: Stacked(a_names, (self.r, width)), _B: Subset(renamed, b_names)}

    def row_targets(self, rank: int, size: int) -> Tensor:
        """Index in `targets` of every row of this rank's weight; -1 for rows of no target. int64 [rows]."""

        def read(name: str, dim: int, start: int, stop: int | None) -> Tensor:
            index = self.targets.index(name) if name in self.targets else -1
            return torch.full((self.base.shapes[name][0],), index, dtype=torch.int64, device="cpu")[start:stop]

        return self.base.shard(read, rank, size)


def peft_name(file_name: str, kind: str) -> str:
    """Name of a target's A or B in peft's files, from the name of its weight in the model's."""
    return f"base_model.model.{file_name.removesuffix('.weight')}.{kind}.weight"


def adapted_linears(arch: Architecture, lora: LoraConfig) -> dict[str, AdaptedLinear]:
    """List the linear layers that get an adapter.

    Returns:
        Megatron's name of the layer (layers counted over the whole model) -> its adapter, in the order of the files.

    Raises:
        ConfigError: a target is not a linear layer of every layer of this model.
    """
    found: dict[str, AdaptedLinear] = {}
    counts = dict.fromkeys(lora.target_modules, 0)
    for name, layout in parameter_table(arch).items():
        is_linear = isinstance(layout, Columns | GateUp | QueryKeyValue) and name.endswith(".weight")
        if not is_linear or is_expert(name):
            continue
        targets = tuple(file for file in layout.shapes if file.split(".")[-2] in counts)
        for file in targets:
            counts[file.split(".")[-2]] += 1
        if targets:
            found[name.removesuffix(".weight")] = AdaptedLinear(layout, targets, lora.r)
    unsupported = [target for target, count in counts.items() if count != arch.num_layers]
    if unsupported:
        raise ConfigError(
            f"lora.target_modules: {', '.join(unsupported)} cannot be adapted in {arch.model_type}, where not every "
            "layer has one such dense linear layer (experts get no adapters); leave them out"
        )
    return found


def adapter_table(arch: Architecture, lora: LoraConfig) -> dict[str, Layout]:
    """List the adapter parameters of the whole model: Megatron name -> layout."""
    return {
        f"{name}.{ADAPTER}.{kind}": layout
        for name, linear in adapted_linears(arch, lora).items()
        for kind, layout in linear.layouts.items()
    }


def adapter_shapes(arch: Architecture, lora: LoraConfig) -> dict[str, tuple[int, ...]]:
    """List the tensors of an adapter directory with their shapes, in the order in which they are written."""
    return {name: shape for layout in adapter_table(arch, lora).values() for name, shape in layout.shapes.items()}


class InitialAdapters:
    """Initial adapters that depend on a seed and the tensor's name, not on the parallel layout.

    A is uniform in +-1 / sqrt(columns), which is peft's Kaiming initialisation; B is zero.

    Args:
        shapes: `adapter_shapes`.
        seed: any integer.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], seed: int) -> None:
        self._shapes, self._seed = shapes, seed

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """List all tensors by name."""
        return self._shapes

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """Make the whole tensor and cut `[start:stop]` along `dim` out of it."""
        full = torch.zeros(self._shapes[name], dtype=torch.float32, device="cpu")
        if name.endswith(f"{_A}.weight"):
            digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
            bound = 1.0 / math.sqrt(full.size(1))
            full.uniform_(-bound, bound, generator=generator)
        return full[start:stop] if dim == 0 else full[:, start:stop]


def peft_config(lora: LoraConfig, base: str | None) -> dict[str, Any]:
    """Make the contents of `adapter_config.json`.

    Args:
        lora: the settings of the adapters.
        base: where the base model lies.
    """
    return {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(lora.lora_alpha) if lora.lora_alpha == int(lora.lora_alpha) else lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": lora.r,
        "target_modules": list(lora.target_modules),
        "task_type": "CAUSAL_LM",
        "use_rslora": lora.use_rslora,
    }
