"""A stand-in for the compiled extension of Transformer Engine: the functions of the fp32 and 16-bit paths in torch.

Written from the calls that the Python code of releases 2.8 to 2.20 makes. Sums are taken in fp32, those of matrix
products in fp64, and rounded once, as the kernels do. Every other name that this Python code asks for exists and raises
by name when it is used.
"""

from typing import Any, NoReturn

from transformer_engine_torch.attention import *  # noqa: F403
from transformer_engine_torch.enums import *  # noqa: F403
from transformer_engine_torch.enums import named_values
from transformer_engine_torch.gemm import *  # noqa: F403
from transformer_engine_torch.multi_tensor import *  # noqa: F403
from transformer_engine_torch.norms import *  # noqa: F403
from transformer_engine_torch.packed_rows import *  # noqa: F403
from transformer_engine_torch.python_code import names_asked_for
from transformer_engine_torch.softmax import *  # noqa: F403

device_types = ("cpu",)
"""Where it computes."""

_ENUMERATIONS = ("NVTE", "CommOverlapType", "CommOverlapAlgo", "CommGemmOverlapRole", "Float8BlockScaleTensorFormat")


def get_num_cublas_streams() -> int:
    return 1


def get_cublasLt_version() -> int:
    return 130000


def get_cudnn_version() -> int:
    return 91400


def get_stream_priority_range(*device: object) -> tuple[int, int]:
    return 0, -1


def device_supports_multicast(*device: object) -> bool:
    return False


def ubuf_built_with_mpi() -> bool:
    return False


def _absent(name: str) -> Any:
    """What stands for a name without a stand-in: enumerations answer, functions and classes raise when used."""
    if name.startswith(_ENUMERATIONS):
        return named_values(name)

    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(f"transformer_engine_torch.{name} has no stand-in for the CPU")

    if name[0].isupper():
        return type(name, (), {"__init__": refuse})
    refuse.__name__ = refuse.__qualname__ = name
    return refuse


for _name in names_asked_for():
    if _name not in globals():
        globals()[_name] = _absent(_name)
