"""A GPU that is not there: runs PyTorch code meant for one and counts what it would have to do.

- Tensors say that they are on `cuda:0`. Their numbers are on the CPU, or nowhere: what is computed from a tensor
  without numbers has none either, so operands of any size cost nothing while index work is done in earnest. Whoever
  looks at a number that is not there fails.
- A dispatch mode sees every operator of PyTorch below autograd. A *launch* is one that is no view and allocates more
  than memory, a copy, or a Triton kernel; PyTorch may start several kernels for one (a sort does). A *sync* is
  whatever makes the host wait for the device: a number or a shape that depends on device memory, a copy to the host,
  a copy from memory of the host that is not pinned.
- *Bytes* are the inputs a launch must read and the outputs it must write, each once; of a gathered or scattered tensor
  the part that is touched. Products are kept apart.

Dims: `R` rows, `H` hidden, `V` vocabulary.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

from fastpref.kernels import checks, ops, rows, triton_engine, vocab_parallel
from fastpref.kernels.triton_common import KernelCall

DEVICE = torch.device("cuda", 0)
NUM_SMS = 132
# Larger floating tensors that are made from nothing get no numbers.
LARGE = 2**24
# Matrix products thinner than this are reductions in disguise.
THIN = 64
OPERATORS = {
    definition._opoverload: definition._init_fn
    for module in (ops, rows, vocab_parallel)
    for definition in vars(module).values()
    if isinstance(definition, torch.library.CustomOpDef)
}
# The kernels whose launches are products of the plan, whatever they are given.
PRODUCT_KERNELS = ("_logit_gradient_kernel", "_screen_kernel")
PHASES = {"linear_logps_fwd": "forward", "linear_logps_bwd": "backward", "linear_logps_bwd_into": "backward"}
ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "lift_fresh", "lift", "alias")
FILLS = ("zeros", "new_zeros", "zeros_like", "full", "new_full", "full_like", "ones", "new_ones", "ones_like", "arange")
FILLS += ("scalar_tensor", "fill_", "zero_")
GATHERS = ("index_select", "gather", "index", "embedding")
SCATTERS = ("index_add_", "index_copy_", "index_put_", "scatter_", "scatter_add_", "index_fill_")
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount")
WAITS += ("equal", "repeat_interleave", "is_nonzero")
MATRIX_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "addmm_")

_ATEN = torch.ops.aten
WIDE_PRODUCTS = {
    _ATEN.mm.dtype: _ATEN.mm.default,
    _ATEN.mm.dtype_out: _ATEN.mm.out,
    _ATEN.addmm.dtype: _ATEN.addmm.default,
    _ATEN.addmm.dtype_out: _ATEN.addmm.out,
}

# What makes tensors on a device by name.
FACTORIES = ("tensor", "zeros", "ones", "empty", "empty_like", "full", "arange")


class Event(NamedTuple):
    """Something that the device does or is waited for.

    Attributes:
        phase: "api", or the pass of the operator that it belongs to: "forward", "backward".
        name: operator or kernel.
        is_launch: whether work is queued.
        is_sync: whether the host waits.
        is_product: whether it is one of the products that the plan is about.
        num_bytes: read and written.
    """

    phase: str
    name: str
    is_launch: bool
    is_sync: bool
    is_product: bool
    num_bytes: int


class DeviceTensor(Tensor):
    """A tensor on the simulated device; `inner` has its numbers on the CPU, or none on the meta device."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> DeviceTensor:
        """Wrap numbers."""
        # Below Python it is a meta tensor: a build without CUDA has no streams and guards for anything else.
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="meta",
        )
        made.inner = inner
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where it says it is."""
        return DEVICE

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        """What device code asks."""
        return True

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        """What nobody may learn."""
        return False

    def tolist(self) -> Any:
        """Copy the numbers to the host, which PyTorch does below the dispatcher."""
        return self.cpu().tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"DeviceTensor({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} ran outside of its simulated device; keep the mode on")


class SimulatedDevice(TorchDispatchMode):
    """Runs and counts; `events` holds what happened, in order.

    Args:
        on_kernel: called with every Triton kernel instead of running it; may `give` its outputs numbers.
    """

    def __init__(self, on_kernel: Callable[[KernelCall], None] = lambda _: None) -> None:
        super().__init__()
        self.events: list[Event] = []
        self._phase, self._on_kernel = "api", on_kernel
        self._pinned: list[Tensor] = []

    def count(self, what: str, phase: str | None = None) -> int:
        """Count "launch", "sync" or "product" events, of one phase or of all."""
        return sum(getattr(event, f"is_{what}") for event in self.events if phase in (None, event.phase))

    def num_bytes(self, is_product: bool, phase: str | None = None) -> int:
        """Add up the bytes of the products, or of everything else."""
        found = [event for event in self.events if event.is_product == is_product and phase in (None, event.phase)]
        return sum(event.num_bytes for event in found)

    def put(self, values: Tensor) -> DeviceTensor:
        """Place numbers on the device, for nothing."""
        return DeviceTensor(values)

    def nothing(self, *shape: int, dtype: torch.dtype) -> DeviceTensor:
        """Place a tensor without numbers on the device."""
        with _disable_current_modes():
            return DeviceTensor(torch.empty(shape, dtype=dtype, device="meta"))

    def launch(self, call: KernelCall) -> None:
        """Count a Triton kernel."""
        tensors = [value for value in call.arguments.values() if isinstance(value, Tensor)]
        bases = [value.base for value in call.arguments.values() if hasattr(value, "block_shape")]
        name = call.kernel.__name__
        is_product = name in PRODUCT_KERNELS or (name == "_linear_logps_fwd_kernel" and not self._is_pilot(call))
        self._note(name, sum(map(_size, tensors + bases)), is_product=is_product)
        self._on_kernel(call)

    def _is_pilot(self, call: KernelCall) -> bool:
        """A forward pass over a few columns comes before the one over all of them, in int8 or not."""
        has_screened = any(event.name == "_screen_kernel" for event in self.events)
        return call.arguments["num_columns"] < self.num_columns and not has_screened

    num_columns = 0
    """V of the call that is counted; a forward kernel over fewer is no product, unless all were screened before it."""

    def _note(self, name: str, num_bytes: int, *, is_sync: bool = False, is_product: bool = False) -> None:
        self.events.append(Event(self._phase, name, True, is_sync, is_product, num_bytes))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in OPERATORS:
            return self._run_operator(func, args, kwargs)
        if func._can_decompose():  # inside of operators PyTorch hands over what it takes apart elsewhere
            with self:
                return func.decompose(*args, **kwargs)
        name = func.overloadpacket.__name__
        given = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        target = kwargs.get("device")
        is_here = any(isinstance(one, DeviceTensor) for one in given)
        goes_here = target is not None and torch.device(target).type in ("cuda", "meta")
        if name == "is_pinned":
            return any(args[0].untyped_storage().data_ptr() == one.untyped_storage().data_ptr() for one in self._pinned)
        if name == "_pin_memory":
            self._pinned.append(args[0].clone())
            return self._pinned[-1]
        if not is_here and not goes_here:
            return func(*args, **kwargs)
        if name == "_to_copy" and is_here and goes_here and kwargs.get("dtype") in (None, args[0].dtype):
            return args[0]
        if name in ("_to_copy", "copy_"):
            done = self._transfer(name, func, args, kwargs)
            if done is not None:
                return done
        result = self._compute(func, args, kwargs)
        if not func.is_view and name not in ALLOCATIONS:
            self._count(name, func, given, args, kwargs, result)
        return result

    def _run_operator(self, func: Any, args: Any, kwargs: Any) -> Any:
        outside, self._phase = self._phase, PHASES.get(func._schema.name.split("::")[1], self._phase)
        try:
            with self:
                return OPERATORS[func](*args, **kwargs)
        finally:
            self._phase = outside

    def _transfer(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """Copy between host and device; None where no border is crossed."""
        if name == "copy_":
            to, source = args[0], args[1]
            is_async = bool(args[2]) if len(args) > 2 else bool(kwargs.get("non_blocking"))
            lands_here = isinstance(to, DeviceTensor)
        else:
            source, is_async = args[0], bool(kwargs.get("non_blocking"))
            target = kwargs.get("device")
            lands_here = isinstance(source, DeviceTensor) if target is None else torch.device(target).type != "cpu"
        if lands_here == isinstance(source, DeviceTensor):
            return None
        with self:
            is_pinned = not isinstance(source, DeviceTensor) and source.is_pinned()
        result = self._compute(func, args, kwargs, host=not lands_here)
        if source.numel():
            self._note(
                f"{name} {'from' if lands_here else 'to'} host", _size(source), is_sync=not (is_pinned and is_async)
            )
        return result

    def _compute(self, func: Any, args: Any, kwargs: Any, *, host: bool = False) -> Any:
        """Run an operator on the numbers, or on their shapes where some are not there."""
        wrappers = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, DeviceTensor)]
        has_numbers = all(one.inner.device.type != "meta" for one in wrappers)
        changed = _changed(func, args, kwargs)

        def numbers(value: Any) -> Any:
            if isinstance(value, DeviceTensor):
                value = value.inner
            elif isinstance(value, torch.device):
                return torch.device("cpu" if has_numbers else "meta")
            return value.to("meta") if isinstance(value, Tensor) and not has_numbers else value

        inner_args, inner_kwargs = tree_map(numbers, (args, kwargs))
        if not wrappers and has_numbers and _is_large(func, inner_args, inner_kwargs):
            inner_kwargs["device"] = "meta"
        elif "device" in inner_kwargs:
            inner_kwargs["device"] = "cpu" if has_numbers else "meta"
        inner_kwargs.pop("pin_memory", None)
        func, inner_args, inner_kwargs = _on_cpu(func, inner_args, inner_kwargs)
        result = func(*inner_args, **inner_kwargs)
        if not has_numbers:
            for one in changed:
                if isinstance(one, DeviceTensor) and one.inner.device.type != "meta":
                    one.inner = one.inner.to("meta")
        if changed:
            return changed[0] if not isinstance(result, tuple) else tuple(changed)
        if host:
            return result
        return tree_map(lambda value: DeviceTensor(value) if isinstance(value, Tensor) else value, result)

    def _count(self, name: str, func: Any, given: Sequence[Tensor], args: Any, kwargs: Any, result: Any) -> None:
        results = [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor)]
        changed = _changed(func, args, kwargs)
        if results and not any(one.numel() for one in results) and name not in WAITS:
            return
        if name in FILLS:
            num_bytes = sum(map(_size, results))
        elif name in GATHERS:
            num_bytes = 2 * sum(map(_size, results)) + sum(map(_size, given[1:]))
        elif name in SCATTERS:
            touched = sum(map(_size, given[1:]))
            num_bytes = touched + _size(given[-1]) * (2 if name.endswith("add_") else 1)
        else:
            read = [one for one in given if not any(one is out for out in changed) or not _is_out(func)]
            num_bytes = sum(map(_size, read)) + sum(map(_size, results))
        is_product = self._phase == "backward" and name in MATRIX_PRODUCTS
        if is_product:
            # All three extents: those of the operands, whose shared one counts twice.
            is_product = min(min(one.shape) for one in given if one.dim() == 2) >= THIN
        self._note(name, num_bytes, is_sync=name in WAITS or _indexes_badly(name, args), is_product=is_product)


def _on_cpu(func: Any, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
    """Return what a CPU has instead of a product with a dtype of its own: one of operands in that dtype."""
    if func not in WIDE_PRODUCTS:
        return func, args, kwargs
    num_tensors = 3 if "addmm" in func.name() else 2
    dtype = args[num_tensors]
    return WIDE_PRODUCTS[func], (*(one.to(dtype) for one in args[:num_tensors]), *args[num_tensors + 1 :]), kwargs


def _changed(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Return the arguments that an operator writes to."""
    found = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = kwargs.get(argument.name, args[place] if place < len(args) else None)
            if value is not None:
                found.append(value)
    return found


def _is_out(func: Any) -> bool:
    return any(argument.is_out for argument in func._schema.arguments)


def _is_large(func: Any, args: Any, kwargs: Any) -> bool:
    """Tell whether a tensor that is made from nothing is a floating one that no index work is done with."""
    if not func._schema.arguments or func._schema.arguments[0].name != "size":
        return False
    dtype = kwargs.get("dtype") or torch.get_default_dtype()
    return dtype.is_floating_point and torch.Size(args[0]).numel() >= LARGE


def _indexes_badly(name: str, args: Any) -> bool:
    """Tell whether an indexing operator has to learn how many places a mask has, or to fetch indices from the host."""
    if name not in ("index", "index_put_"):
        return False
    indices = [one for one in args[1] if one is not None]
    return any(one.dtype == torch.bool or not isinstance(one, DeviceTensor) for one in indices)


def _size(tensor: Tensor) -> int:
    """Return the bytes behind a tensor; an expanded axis has them once."""
    numel = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        numel *= size if stride else min(size, 1)
    return numel * tensor.element_size()


@contextlib.contextmanager
def simulated(device: SimulatedDevice, *, is_capturing: bool = False) -> Iterator[None]:
    """Let the op run on `device`, its Triton engine as on an H100; `is_capturing`: into a CUDA graph."""
    # On a CPU platform for Megatron these make CPU tensors whatever device is asked for.
    factories = {name: inspect.unwrap(getattr(torch, name)) for name in FACTORIES}
    with (
        mock.patch.multiple(torch, **factories),
        mock.patch.object(torch.cuda, "_lazy_init", lambda: None),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: is_capturing),
        mock.patch.object(checks, "TRANSPARENT_TENSORS", (*checks.TRANSPARENT_TENSORS, DeviceTensor)),
        mock.patch.object(triton_engine, "unavailable_reason", lambda: None),
        mock.patch.object(triton_engine, "_device_traits", lambda _: ("sm_90", NUM_SMS, True)),
        mock.patch.object(triton_engine, "_device_guard", lambda _: contextlib.nullcontext()),
        mock.patch.object(KernelCall, "launch", lambda call: device.launch(call)),
        device,
    ):
        yield
