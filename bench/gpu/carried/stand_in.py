"""A CUDA device that is not there, for code that launches Triton kernels: what it launches is noted, not run.

Every tensor says that it lives on a Hopper GPU and stays in the CPU's memory. The engine's own launching code runs on
copies of its arguments without storage, so that Triton's JIT specialises on true sizes, strides and alignments; what
the kernels would have returned comes from the PyTorch engine, so that code that reads values goes its usual way.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # first: what it imports reads what is replaced here
import triton
from torch import Tensor
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_map_only
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fastpref.kernels import torch_tiles, triton_engine

CUDA = torch.device("cuda", 0)
TARGET = GPUTarget("cuda", 90, 32)
PROPERTIES = SimpleNamespace(major=9, minor=0, multi_processor_count=132, name="a stand-in for a Hopper GPU")
ENGINE = {"forward_rows": torch_tiles.forward_rows, "logit_gradient": torch_tiles.logit_gradient}
"""Functions that launch, and what computes in their place; the values of a cached gradient decide nothing."""
ENGINE_WITHOUT_VALUES = ("cached_logit_gradient",)
MOST_GRADIENTS = 2**22
"""Elements of a gradient that PyTorch computes; they decide nothing either, but that a small test goes on."""
MOST_PRODUCTS, FEW_PRODUCTS = 6e10, 3e9
"""R * H * V of a call that PyTorch computes; for more than that a few columns have to do. The second is for calls that
keep nothing of each column, masses or exponentials: what follows them reads no more than their shapes."""
FEW_COLUMNS = 4096
MANY = 2**28

Note = Callable[[str], None]


class StandInDriver:
    """What Triton asks of a driver before it launches."""

    def get_current_target(self) -> GPUTarget:
        """Hopper."""
        return TARGET

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default stream."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """The only one."""
        return CUDA


def _in_memory(function: Callable[..., Any]) -> Callable[..., Any]:
    """Send what is asked of a GPU to the CPU, and do there what only a GPU can."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        here = [_here(value) for value in args]
        options = {key: _here(value) for key, value in kwargs.items() if key not in ("pin_memory", "out_dtype")}
        wide = kwargs.get("out_dtype")
        if wide is not None:
            # On a CPU a product has the dtype of its operands.
            here = [value.to(wide) if isinstance(value, Tensor) else value for value in here]
        return function(*here, **options)

    return run


def _zeros(zeros: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Zeros; where there are many, pages that nobody has touched, which are zeros as well."""
    few, many = _in_memory(zeros), _in_memory(torch.empty)
    return lambda *size, **kwargs: (many if math.prod(s for s in size if isinstance(s, int)) > MANY else few)(
        *size, **kwargs
    )


def _here(value: Any) -> Any:
    is_cuda = isinstance(value, torch.device | str) and str(value).startswith("cuda")
    return "cpu" if is_cuda else value


@contextmanager
def stand_in(note: Note, hidden: dict[int, int] | None = None) -> Iterator[None]:
    """Let this process believe that it has a Hopper GPU, until the end of the block.

    Args:
        note: gets each variant that Triton's JIT would compile, as the text that `JITFunction.preload` reads; the same
            one once per launch.
        hidden: hidden sizes that are computed with (no other axis may have them), and what the JIT is told instead.
    """
    with ExitStack() as scope:
        scope.enter_context(mock.patch.object(driver, "_active", StandInDriver()))
        scope.enter_context(_jit_hook(note))
        for owner, name, value in _patches():
            scope.enter_context(mock.patch.object(owner, name, value))
        for name, compute in (ENGINE | dict.fromkeys(ENGINE_WITHOUT_VALUES)).items():
            recorded = _recorded(getattr(triton_engine, name), compute, hidden or {})
            scope.enter_context(mock.patch.object(triton_engine, name, recorded))
        triton_engine._device_traits.cache_clear()
        scope.callback(triton_engine._device_traits.cache_clear)
        yield


def _patches() -> Iterator[tuple[Any, str, Any]]:
    yield Tensor, "device", property(lambda tensor: CUDA)
    yield Tensor, "is_cuda", property(lambda tensor: True)
    for name, value in (
        ("is_available", lambda: True),
        ("get_device_capability", lambda device=None: (PROPERTIES.major, PROPERTIES.minor)),
        ("get_device_properties", lambda device=None: PROPERTIES),
        ("get_device_name", lambda device=None: PROPERTIES.name),
        ("is_current_stream_capturing", lambda: False),
        ("current_stream", lambda device=None: mock.MagicMock()),
        ("synchronize", lambda device=None: None),
        ("empty_cache", lambda: None),
        ("device", lambda device: contextlib.nullcontext()),
        ("graph", lambda *_, **__: contextlib.nullcontext()),
        ("CUDAGraph", mock.MagicMock),
        ("Event", lambda **_: mock.Mock(elapsed_time=lambda other: 1.0)),
    ):
        yield torch.cuda, name, value
    for constructor in (*_device_constructors(), torch.mm, torch.addmm, torch.Generator):
        if getattr(torch, constructor.__name__, None) is constructor:
            yield torch, constructor.__name__, _in_memory(constructor)
    for name in ("to", "new_empty", "new_zeros", "new_full", "new_ones", "new_tensor"):
        yield Tensor, name, _in_memory(getattr(Tensor, name))
    yield torch, "zeros", _zeros(torch.zeros)
    yield Tensor, "pin_memory", lambda tensor: tensor
    yield torch, "compile", lambda model=None, **_: model if model is not None else lambda wrapped: wrapped


@contextmanager
def _jit_hook(note: Note) -> Iterator[None]:
    """Hear of every variant before it is compiled, and let none be."""

    def hook(*_: Any, **given: Any) -> bool:
        note(given["compile"]["specialization_data"])
        return True

    before = triton.knobs.runtime.jit_cache_hook
    triton.knobs.runtime.jit_cache_hook = hook
    try:
        yield
    finally:
        triton.knobs.runtime.jit_cache_hook = before


def _recorded(
    launch: Callable[..., Any], compute: Callable[..., Any] | None, hidden: dict[int, int]
) -> Callable[..., Any]:
    """Return a function of the engine that launches for the record, and returns what PyTorch computes."""

    def run(*args: Any, tile: Any = None, **kwargs: Any) -> Any:
        shadows, shadow_kwargs = tree_map_only(Tensor, lambda tensor: _shadow(tensor, hidden), (args, kwargs))
        launch(*shadows, **({"tile": tile} if tile is not None else {}), **shadow_kwargs)
        if compute is torch_tiles.forward_rows:
            keeps_columns = kwargs.get("bound_R") is not None or bool(kwargs.get("with_cache"))
            head = _few_columns(args[0], args[1], MOST_PRODUCTS if keeps_columns else FEW_PRODUCTS)
            return compute(args[0], head, *args[2:], **kwargs)
        is_small = args[0].shape[0] * args[1].weight_VH.shape[0] <= MOST_GRADIENTS if compute is not None else False
        return compute(*args, **kwargs) if is_small and compute is not None else None

    return run


def _few_columns(x_RH: Tensor, head: Any, most_products: float) -> Any:
    """The head, or a few columns of it where all of them are too many to compute with."""
    if x_RH.shape[0] * head.weight_VH.numel() <= most_products:
        return head
    bias_V = None if head.bias_V is None else head.bias_V[:FEW_COLUMNS]
    return head._replace(weight_VH=head.weight_VH[:FEW_COLUMNS], bias_V=bias_V)


def _shadow(tensor: Tensor, hidden: dict[int, int]) -> Tensor:
    """A tensor without storage: the same sizes, strides and alignment, and the hidden size that is to be reported."""
    narrow = tensor.shape[-1] if tensor.dim() else 0
    wide = hidden.get(narrow, narrow)
    size = (*tensor.shape[:-1], wide) if tensor.dim() else ()
    stride = tuple(step // narrow * wide if narrow and step % narrow == 0 else step for step in tensor.stride())
    stride = stride if wide != narrow else tensor.stride()
    offset = tensor.data_ptr() % 16 // tensor.itemsize
    extent = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True) if length) + 1
    return torch.empty(max(extent, 0), dtype=tensor.dtype, device="meta").as_strided(size, stride, offset)
