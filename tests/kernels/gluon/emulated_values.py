"""Values of the GPU's language in PyTorch's: tiles, pointers with masks, and what the copy engine reads."""

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch


class Block(torch.Tensor):
    """A tensor with the few methods that are spelled differently in a kernel."""

    type = property(lambda self: SimpleNamespace(layout=None))

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> torch.Tensor:
        return self.view(dtype) if bitcast else super().to(dtype)

    def split(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self[..., 0], self[..., 1]


def block(values: Any) -> Block:
    return torch.as_tensor(values).as_subclass(Block)


@dataclass
class Pointer:
    """Places in memory; one outside of a tensor that no mask hides is an error."""

    memory: torch.Tensor
    """1-D: all that lies between a tensor's first and last element."""
    places: Any = 0

    @classmethod
    def to(cls, tensor: torch.Tensor) -> "Pointer":
        extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return cls(tensor.as_strided((extent if tensor.numel() else 0,), (1,)))

    @property
    def dtype(self) -> Any:
        return SimpleNamespace(element_ty=self.memory.dtype)

    def __add__(self, offsets: Any) -> "Pointer":
        return Pointer(self.memory, self.places + offsets)

    def chosen(self, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        places, mask = torch.broadcast_tensors(plain(self.places), plain(mask))
        outside = mask & ((places < 0) | (places >= len(self.memory)))
        assert not outside.any(), f"place {places[outside].flatten()[0]} of a tensor of {len(self.memory)}"
        return places, mask


def plain(values: Any) -> torch.Tensor:
    return torch.as_tensor(values).as_subclass(torch.Tensor)


def load(pointer: Pointer, mask: torch.Tensor, other: float) -> Block:
    places, mask = pointer.chosen(mask)
    loaded = pointer.memory[torch.where(mask, places, 0).long()]
    return block(torch.where(mask, loaded, torch.tensor(other, dtype=loaded.dtype)))


def store(pointer: Pointer, values: Any, mask: torch.Tensor) -> None:
    places, mask = pointer.chosen(mask)
    values = plain(values).to(pointer.memory.dtype).expand(places.shape)
    pointer.memory[places[mask].long()] = values[mask]


def largest(values: torch.Tensor, axis: int) -> Block:
    """`tl.max` passes over NaN."""
    if values.is_floating_point():
        values = torch.where(values.isnan(), -math.inf, values)
    return values.amax(dim=axis)


@dataclass
class Descriptor:
    """What the copy engine reads."""

    tensor: torch.Tensor
    block_shape: list[int]
    layout: Any = None

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def block_type(self) -> Any:
        return SimpleNamespace(nbytes=math.prod(self.block_shape) * self.tensor.itemsize)

    def load(self, corner: list[Any]) -> Block:
        """A block; what lies outside counts as 0."""
        row, column = (int(place) for place in corner)
        found = torch.zeros(self.block_shape, dtype=self.dtype)
        inside = self.tensor[row : row + self.block_shape[0], column : column + self.block_shape[1]]
        found[: inside.shape[0], : inside.shape[1]] = inside
        return found.as_subclass(Block)


def fmax(left: torch.Tensor, right: Any) -> torch.Tensor:
    """`tl.maximum`, which passes over NaN."""
    return torch.fmax(left, torch.as_tensor(right, dtype=left.dtype))


def exclusive_or(values: torch.Tensor, axis: int, keep_dims: bool) -> torch.Tensor:
    first, second = values.unbind(dim=axis)
    return (first ^ second).unsqueeze(axis)
