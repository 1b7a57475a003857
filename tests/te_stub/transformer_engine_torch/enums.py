"""Enumerations of the extension, and what their numbers mean in torch."""

import enum
from typing import Any

import torch

from transformer_engine_torch.python_code import python_code

__all__ = ["DType", "FP8BwdTensors", "FP8FwdTensors", "NVTE_Fused_Attn_Backend"]


class DType(enum.IntEnum):
    kByte = 0
    kInt32 = 2
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat4E2M1 = 10


FP8FwdTensors = enum.IntEnum(
    "FP8FwdTensors", [f"GEMM{gemm}_{part}" for gemm in (1, 2, 3) for part in ("INPUT", "WEIGHT", "OUTPUT")], start=0
)
FP8BwdTensors = enum.IntEnum(
    "FP8BwdTensors", [f"{part}{gemm}" for gemm in (1, 2, 3) for part in ("GRAD_OUTPUT", "GRAD_INPUT")], start=0
)


_BACKENDS = {"NVTE_No_Backend": -1, "NVTE_F16_max512_seqlen": 0, "NVTE_F16_arbitrary_seqlen": 1, "NVTE_FP8": 2}
# The installed Python code and the extension must name the same ones, and newer releases dropped one.
NVTE_Fused_Attn_Backend = enum.IntEnum(
    "NVTE_Fused_Attn_Backend", {name: number for name, number in _BACKENDS.items() if name[5:] in python_code()}
)


TORCH_DTYPES = {
    DType.kByte: torch.uint8,
    DType.kInt32: torch.int32,
    DType.kFloat32: torch.float32,
    DType.kFloat16: torch.float16,
    DType.kBFloat16: torch.bfloat16,
}


def torch_dtype(dtype: Any) -> torch.dtype:
    """The torch dtype of a number or member of either of Transformer Engine's two enumerations."""
    if isinstance(dtype, torch.dtype):
        return dtype
    return TORCH_DTYPES[DType(int(dtype))]


class _Named(type):
    """Makes a class whose every attribute is a number of its own, given out as it is asked for."""

    def __getattr__(cls, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(cls, name, len(cls.__members__))
        cls.__members__[name] = getattr(cls, name)
        return getattr(cls, name)

    def name_of(cls, number: int) -> str:
        """The name that was asked for when this number was given out."""
        return list(cls.__members__)[int(number)]


def named_values(name: str) -> Any:
    """An enumeration whose members need only differ."""
    return _Named(name, (), {"__members__": {}})
