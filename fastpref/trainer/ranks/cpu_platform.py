"""What Megatron-Core needs to run on a machine without a GPU.

Megatron asks CUDA for its device, its random state and its tensor types by name. Each shim below answers one
of these questions with the CPU; none changes what a tensor operation computes, and none is installed where
CUDA is available.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.moe import token_dispatcher

CPU = torch.device("cpu")
# Factories that Megatron calls with `device="cuda"`.
FACTORIES = ("tensor", "zeros", "ones", "empty", "empty_like", "full", "arange")


class _TensorType(str):
    """A CPU tensor type name that also equals its CUDA name.

    Gradient clipping and the mixed-precision optimizers sort parameters by `tensor.type() == "torch.cuda.FloatTensor"`.
    """

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and str.__eq__(self, other.replace("torch.cuda.", "torch."))

    __hash__ = str.__hash__


def install_cpu_platform() -> bool:
    """Let Megatron-Core run on the CPU of a machine that has no GPU; a second call changes nothing.

    Returns:
        True where the shims are in place, False where CUDA is available and nothing was changed.
    """
    if torch.cuda.is_available():
        return False
    if torch.cuda.current_device is _current_device:
        return True
    _replace_device_queries()
    _replace_random_state()
    token_dispatcher.maybe_move_tensor_to_cpu = _on_host
    # Last, because it says that all of them are in place.
    torch.cuda.current_device = _current_device  # type: ignore[assignment]
    return True


def _current_device() -> torch.device:
    return CPU


def _stay(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return self


class _HostEvent:
    """An event on the one stream of a CPU: whatever was asked for before has happened.

    It takes the place of a class, as the stream does, which other libraries name in their annotations.
    """

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        """Take what a CUDA event takes; there is nothing to choose."""

    def record(self, stream: _HostStream | None = None) -> None:
        """Return."""

    def wait(self, stream: _HostStream | None = None) -> None:
        """Return."""

    def query(self) -> bool:
        """Say that it has passed."""
        return True

    def synchronize(self) -> None:
        """Return."""


class _HostStream:
    """The one stream of a CPU."""

    def __init__(self, device: object = None, priority: int = 0) -> None:
        """Take what a CUDA stream takes; there is nothing to choose."""

    def wait_stream(self, stream: _HostStream) -> None:
        """Return."""

    def wait_event(self, event: _HostEvent) -> None:
        """Return."""

    def record_event(self, event: _HostEvent | None = None) -> _HostEvent:
        """Return an event that has passed."""
        return event or _HostEvent()

    def synchronize(self) -> None:
        """Return."""


def _replace_device_queries() -> None:
    """Megatron's buffers and messages live on `torch.cuda.current_device()`, `"cuda"` or `tensor.cuda()`."""
    torch.cuda.synchronize = lambda device=None: None
    # Experts copy token counts to the host on a stream of their own; Megatron-Core 0.19 waits for CUDA graphs on one,
    # and Transformer Engine's attention lets those of context parallelism wait for each other's events.
    torch.cuda.Event = _HostEvent  # type: ignore[assignment,misc]
    torch.cuda.Stream = _HostStream  # type: ignore[assignment,misc]
    torch.cuda.current_stream = _HostStream  # type: ignore[assignment]
    torch.cuda.stream = contextlib.nullcontext  # type: ignore[assignment]
    torch.Tensor.cuda = _stay  # type: ignore[method-assign,assignment]
    # `with torch.device(...)` knows factories by identity and lists them once: the originals, which the wrappers call.
    torch.utils._device._device_constructors()
    for name in FACTORIES:
        factory = getattr(torch, name)
        wrapper = _on_cpu(factory)
        # The compiler of TorchScript does, too; forward-mode differentiation runs it on its first use.
        operator = torch.jit._builtins._find_builtin(factory)
        if operator is not None:
            torch.jit._builtins._register_builtin(wrapper, operator)
        setattr(torch, name, wrapper)
    torch_type = torch.Tensor.type

    @functools.wraps(torch_type)
    def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = torch_type(self, *args, **kwargs)
        return _TensorType(answer) if isinstance(answer, str) else answer

    torch.Tensor.type = tensor_type  # type: ignore[method-assign,assignment]


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = CPU
        # Pages are pinned for copies to a GPU, and only a GPU's driver can pin them.
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return create


def _on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Sizes for a collective, which Megatron turns into the numpy array it needs for CUDA tensors alone."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _replace_random_state() -> None:
    """Megatron keeps one CUDA random state per parallel region; the CPU generator takes its place."""
    torch.cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)  # type: ignore[assignment]
    torch.cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    megatron_random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)
