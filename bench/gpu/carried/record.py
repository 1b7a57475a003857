"""Which variants code for a GPU asks Triton for, on the simulated device: noted as the JIT's own keys, not compiled.

The launching code runs as it is, in true shapes; large tensors have no numbers, so size costs nothing. Of small ones
PyTorch computes what the kernels would have returned, so that code that reads results goes its usual way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # first: what it imports reads what is replaced here
import triton
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map_only
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from bench.simulated_device import DEVICE, DeviceTensor, SimulatedDevice, simulated
from fastpref.kernels import screening, torch_tiles, triton_engine, tuning
from fastpref.kernels.engine import ForwardRows, Head, Int8Head, operand_dtype
from fastpref.kernels.triton_common import KernelCall

CAPABILITY = (9, 0)
MOST_PRODUCTS = 6e10
"""R * H * V of a call whose results PyTorch computes; those of larger ones have no meaning."""

Note = Callable[[str], None]


class HopperDriver:
    """What Triton asks of a driver before it launches."""

    def get_current_target(self) -> GPUTarget:
        """Hopper."""
        return GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32)

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default stream."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """The only one."""
        return DEVICE


def ask_for_kernel(call: KernelCall) -> None:
    """Ask Triton's JIT for the variant that a launch needs."""
    call.kernel.run(
        **call.arguments,
        grid=(call.num_programs,),
        warmup=True,
        num_warps=call.num_warps,
        num_stages=call.num_stages,
        enable_fp_fusion=False,
    )


@contextmanager
def recorded(note: Note, fill: Callable[[KernelCall], None] | None = None) -> Iterator[SimulatedDevice]:
    """Run what is in the block on the simulated device and hear of every variant that it asks Triton for.

    Args:
        note: gets each variant as the text that `JITFunction.preload` reads; the same one once per launch.
        fill: gives what a kernel has written its numbers; None computes results with PyTorch.
    """

    def run(call: KernelCall) -> None:
        ask_for_kernel(call)
        if fill is not None:
            fill(call)

    device = SimulatedDevice(run)
    with ExitStack() as scope:
        scope.enter_context(mock.patch.object(driver, "_active", HopperDriver()))
        scope.enter_context(_jit_hook(note))
        for owner, name, value in _patches():
            scope.enter_context(mock.patch.object(owner, name, value))
        for name in ENGINE if fill is None else ():
            scope.enter_context(mock.patch.object(triton_engine, name, _computed(name)))
        scope.enter_context(simulated(device))
        scope.enter_context(_Indexed())
        yield device


def _patches() -> Iterator[tuple[Any, str, Any]]:
    for name, value in (
        ("is_available", lambda: True),
        ("get_device_capability", lambda device=None: CAPABILITY),
        ("current_device", lambda: 0),
        ("set_device", lambda device: None),
        ("synchronize", lambda device=None: None),
        ("graph", lambda *_, **__: contextlib.nullcontext()),
        ("CUDAGraph", mock.MagicMock),
        ("Event", lambda **_: mock.Mock(elapsed_time=lambda other: 1.0)),
    ):
        yield torch.cuda, name, value
    yield torch, "Generator", _generator(torch.Generator)
    yield torch, "compile", lambda model=None, **_: model if model is not None else lambda wrapped: wrapped
    # What the tuner leaves to another process is launched here, too.
    yield tuning, "run_apart", lambda function, *arguments, seconds: function(*arguments)


class _Indexed(TorchFunctionMode):
    """Gives "cuda" its index, which a build without CUDA cannot look up."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {name: _indexed(value) for name, value in (kwargs or {}).items()}
        if func is torch.tensor and kwargs.get("device") == DEVICE:  # it would allocate below the dispatcher
            return func(*args, **(kwargs | {"device": "cpu"})).to(DEVICE)
        return func(*map(_indexed, args), **kwargs)


def _indexed(value: Any) -> Any:
    return DEVICE if isinstance(value, torch.device | str) and str(value) == "cuda" else value


def _generator(make: Callable[..., torch.Generator]) -> Callable[..., torch.Generator]:
    return lambda device="cpu": make()


@contextmanager
def _jit_hook(note: Note) -> Iterator[None]:
    """Hear of every variant before it is compiled, and let none be."""

    def hook(*_: Any, **given: Any) -> bool:
        note(given["compile"]["specialization_data"])
        return True

    with mock.patch.object(triton.knobs.runtime, "jit_cache_hook", hook):
        yield


def _forward_rows(found: ForwardRows, *args: Any, tile: Any = None, **kwargs: Any) -> None:
    _copy(found, torch_tiles.forward_rows(*args, **kwargs))


def _screen_rows(found: ForwardRows, *args: Any, tile: Any = None, **kwargs: Any) -> None:
    _copy(found, torch_tiles.screen_rows(*args, **kwargs))


def _quantise_rows(found: tuple[Tensor, ...], rows_NH: Tensor, signs_H: Tensor, size: int, *_: float) -> None:
    for to, values in zip(found, screening._quantise(rows_NH.float(), signs_H, size), strict=True):
        to.inner.copy_(values)


def _copy(found: ForwardRows, right: ForwardRows) -> None:
    pairs = [(found.partials.values_FR, right.partials.values_FR), (found.mass_CV, right.mass_CV)]
    if found.cache is not None and right.cache is not None:
        # On a CPU more columns share an exponent.
        times = right.cache.columns_per_group // found.cache.columns_per_group
        exponents_RN = right.cache.exponents_RN.repeat_interleave(times, dim=1)[:, : found.cache.exponents_RN.shape[1]]
        pairs += [(found.cache.values_RV, right.cache.values_RV), (found.cache.exponents_RN, exponents_RN)]
    for to, values in pairs:
        if isinstance(to, DeviceTensor) and values is not None:
            to.inner.copy_(values)


def _logit_gradient(found: None, x_rH: Tensor, head: Head, *others: Any) -> None:
    # A CPU has no product of 16-bit operands in fp32.
    head = head._replace(weight_VH=head.weight_VH.to(operand_dtype(head.weight_VH)))
    torch_tiles.logit_gradient(x_rH.to(operand_dtype(x_rH)), head, *others)


ENGINE: dict[str, Callable[..., None]] = {
    "forward_rows": _forward_rows,
    "quantise_rows": _quantise_rows,
    "screen_rows": _screen_rows,
    "logit_gradient": _logit_gradient,
}
"""What launches, and what gives its results their numbers, from numbers on the CPU."""


def _num_products(rows: Any, head: Any) -> int:
    if isinstance(head, Int8Head):
        return int(rows.values_NH.shape[0] * head.columns.values_NH.numel())
    return int(rows.shape[0] * head.weight_VH.numel() if isinstance(head, Head) else rows.numel())


def _computed(name: str) -> Callable[..., Any]:
    launch, compute = getattr(triton_engine, name), ENGINE[name]

    def run(*args: Any, **kwargs: Any) -> Any:
        result = launch(*args, **kwargs)
        given = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, DeviceTensor)]
        has_numbers = all(one.inner.device.type != "meta" for one in given)
        if has_numbers and _num_products(*args[:2]) <= MOST_PRODUCTS:
            here, options = tree_map_only(DeviceTensor, lambda tensor: tensor.inner, (args, kwargs))
            with _disable_current_modes():
                compute(result, *here, **options)
        return result

    return run
