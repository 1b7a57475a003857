"""The CPU engine in C++ (csrc/cpu): product, softmax partials and gradient of a tile while it is in the cache.

- The library is optional. Without it, or on a CPU that lacks AVX2, `supports` is False for every dtype,
  `unavailable_reason` says why, and callers use `torch_tiles`.
- It is loaded with ctypes, which releases the GIL, and shares the OpenMP runtime of PyTorch: a second one would be a
  second pool of threads on the same cores.
- Sums are fp32. Operands are widened to fp32, but for bf16 numbers on a CPU with AVX512-BF16, which multiplies them in
  pairs at almost twice the rate. What counts is the numbers: `logit_gradient` gets them widened and does the same.
- fp64, other devices and `with_cache` are not its business.
- C++ sees addresses, so what is at them is checked here, in `_pointer`, by checks that `python -O` keeps.

`FASTPREF_NATIVE` in the environment chooses the build: unset or 1 the best for this CPU, 0 none, or its name.

Dims: `R` rows, `C` chunks of rows, `H` hidden, `V` vocabulary, `F` fields of a part; lower case `r`, `v`: a block.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fastpref.errors import ConfigError
from fastpref.kernels.engine import ForwardRows, Head, Int8Head, Int8Rows, RowScalars, row_chunks
from fastpref.kernels.outputs import FIELDS, Partials

LIBRARY = Path(__file__).with_name("libfastpref_cpu.so")
REBUILD = "`pip install -e .` in a checkout, or `python setup.py build_ext --inplace`, with a C++17 compiler"

# The counterparts of csrc/cpu/abi.h.
ABI_VERSION = 3
BUILDS = ("avx512_bf16", "avx512_vnni", "avx512", "avx_vnni", "avx2")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
INT8 = 3


class _Product(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "x_scales", "weight_scales", "labels")),
        *((name, ctypes.c_int64) for name in ("num_rows", "num_columns", "hidden_size")),
        *((name, ctypes.c_int64) for name in ("x_stride", "weight_stride", "dtype")),
        *((name, ctypes.c_float) for name in ("logit_scale", "softcap")),
    ]


class _ForwardArgs(ctypes.Structure):
    _fields_ = [
        ("product", _Product),
        *((name, ctypes.c_void_p) for name in ("bound", *FIELDS, "mass")),
        ("num_threads", ctypes.c_int64),
    ]


class _GradientArgs(ctypes.Structure):
    _fields_ = [
        ("product", _Product),
        *((name, ctypes.c_void_p) for name in ("coefficients", "row_max", "row_sum", "out", "covered")),
        ("num_threads", ctypes.c_int64),
    ]


class _QuantiseArgs(ctypes.Structure):
    _fields_ = [
        ("rows", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("num_rows", "hidden_size", "stride", "dtype")),
        ("signs", ctypes.c_void_p),
        ("rotation_size", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("num_threads", ctypes.c_int64),
    ]


class _SymbolInfo(ctypes.Structure):
    """`Dl_info` of the C library."""

    _fields_ = [
        ("file_name", ctypes.c_char_p),
        ("file_base", ctypes.c_void_p),
        ("symbol_name", ctypes.c_char_p),
        ("symbol_address", ctypes.c_void_p),
    ]


class _Unavailable(Exception):
    """The library cannot be used; the message is the reason and the remedy."""


def is_available() -> bool:
    """Return whether the library is built and can run here."""
    return unavailable_reason() is None


def unavailable_reason() -> str | None:
    """Return why the engine cannot be used and what to do about it, or None if it can.

    Raises:
        ConfigError: FASTPREF_NATIVE has a value that is neither 0 nor 1 nor the name of a build.
    """
    return _load()[1]


def build_name() -> str:
    """Return the name of the build that runs here; only where the engine is available."""
    loaded, reason = _load()
    assert loaded is not None, reason
    return BUILDS[loaded[1]]


def supports(dtype: torch.dtype) -> bool:
    """Return whether the engine can be used here, and on rows and weight of this dtype."""
    return dtype in DTYPES and is_available()


def forward_rows(
    x_RH: Tensor,
    head: Head,
    labels_R: Tensor,
    *,
    fields: tuple[str, ...],
    bound_R: Tensor | None,
    with_cache: bool,
) -> ForwardRows:
    """Reduce the logits of `x_RH` over the vocabulary of `head`; see `engine.Engine`.

    The weight may have any distance between its rows. Columns of mass are NaN or inf where a bound is not finite or so
    far below the logits that fp32 cannot tell: to be taken for large.

    Memory: the rows in fp32 (half as much again with AVX512-BF16); up to 1 KiB per row and field
    for partials; per thread 768 KiB (or 32 columns of the weight, if larger) and up to 256 bytes per row.
    Determinism: the same bits whatever the number of threads.
    """
    assert not with_cache, "the native engine keeps no exponentials"
    sizes = x_RH.shape[0], head.weight_VH.shape[0]
    return _reduce(lambda rows: _product(x_RH[rows], head, labels_R[rows]), *sizes, fields, bound_R)


def screen_rows(
    rows: Int8Rows, head: Int8Head, labels_R: Tensor, *, fields: tuple[str, ...], bound_R: Tensor | None
) -> ForwardRows:
    """Reduce the logits of int8 rows over the columns of an int8 head; see `engine.Engine`.

    Memory: the rows, packed anew; else as `forward_rows`.
    Determinism: the same bits whatever the number of threads, and whatever the build but for exp and tanh.
    """
    sizes = rows.scales_N.shape[0], head.columns.scales_N.shape[0]

    def describe(part: slice) -> tuple[_Product, object]:
        return _int8_product(Int8Rows(*(values[part] for values in rows)), head, labels_R[part])

    return _reduce(describe, *sizes, fields, bound_R)


Describe = Callable[[slice], tuple[_Product, object]]
"""The operands of some rows, and what must outlive the call."""


def _reduce(
    describe: Describe, num_rows: int, num_columns: int, fields: tuple[str, ...], bound_R: Tensor | None
) -> ForwardRows:
    """Reduce rows, chunk by chunk where their column masses are wanted."""
    partials = Partials(fields, torch.empty(len(fields), num_rows, dtype=torch.float64, device="cpu"))
    if bound_R is None:
        _forward(*describe(slice(None)), partials, None, None)
        return ForwardRows(partials, None, None)
    _pointer("bound", bound_R, torch.float32, (num_rows,))
    chunks = row_chunks(num_rows)
    mass_CV = torch.empty(len(chunks), num_columns, dtype=torch.float32, device="cpu")
    for chunk, mass_V in zip(chunks, mass_CV, strict=True):
        _forward(*describe(chunk), Partials(fields, partials.values_FR[:, chunk]), bound_R[chunk], mass_V)
    return ForwardRows(partials, mass_CV, None)


def _forward(product: _Product, keep: object, out: Partials, bound_R: Tensor | None, mass_V: Tensor | None) -> None:
    """Fill the partials of rows, and their column masses where there is a bound."""
    num_rows, num_columns = product.num_rows, product.num_columns
    args = _ForwardArgs(
        product=product,
        bound=None if bound_R is None else _pointer("bound", bound_R, torch.float32, (num_rows,)),
        **{field: _pointer(field, out[field], torch.float64, (num_rows,)) for field in out.fields},
        mass=None if mass_V is None else _pointer("mass", mass_V, torch.float32, (num_columns,)),
        num_threads=torch.get_num_threads(),
    )
    _call("fastpref_forward_rows", args)
    del keep


def logit_gradient(
    x_rH: Tensor, head: Head, labels_r: Tensor, rows: RowScalars, out_rv: Tensor, covered_r: Tensor | None
) -> None:
    """Write the gradient of `x @ weight.T + bias` for one block of rows and columns; see `engine.Engine`.

    Rows with coefficient 0 get zeros, whatever they hold, and add nothing to `covered_r`.
    """
    if x_rH.dtype != torch.float32:
        raise TypeError(f"the native engine takes blocks of fp32 operands, got {x_rH.dtype}; widen them")
    num_rows, num_columns = x_rH.shape[0], head.weight_VH.shape[0]
    product, keep = _product(x_rH, head, labels_r)
    args = _GradientArgs(
        product=product,
        coefficients=_pointer("coefficients", rows.coefficients, torch.float32, (num_rows,)),
        row_max=_pointer("row_max", rows.row_max, torch.float32, (num_rows,)),
        row_sum=_pointer("row_sum", rows.row_sum, torch.float32, (num_rows,)),
        out=_pointer("out", out_rv, torch.float32, (num_rows, num_columns)),
        covered=None if covered_r is None else _pointer("covered", covered_r, torch.float32, (num_rows,)),
        num_threads=torch.get_num_threads(),
    )
    _call("fastpref_logit_gradient", args)
    del keep


def quantise_rows(rows_NH: Tensor, signs_H: Tensor, rotation_size: int) -> tuple[Tensor, Tensor]:
    """Turn rows [N, H] into int8 and their scales; see `screening.quantise_rows`."""
    num_rows, hidden_size = rows_NH.shape
    assert hidden_size % rotation_size == 0
    values_NH = torch.empty(num_rows, hidden_size, dtype=torch.int8, device="cpu")
    scales_N = torch.empty(num_rows, dtype=torch.float32, device="cpu")
    args = _QuantiseArgs(
        rows=_pointer("rows", rows_NH, rows_NH.dtype, (num_rows, hidden_size), any_row_stride=True),
        num_rows=num_rows,
        hidden_size=hidden_size,
        stride=rows_NH.stride(0),
        dtype=DTYPES[rows_NH.dtype],
        signs=_pointer("signs", signs_H, torch.float32, (hidden_size,)),
        rotation_size=rotation_size,
        out=_pointer("out", values_NH, torch.int8, (num_rows, hidden_size)),
        scales=_pointer("scales", scales_N, torch.float32, (num_rows,)),
        num_threads=torch.get_num_threads(),
    )
    _call("fastpref_quantise_rows", args)
    return values_NH, scales_N


def _int8_product(rows: Int8Rows, head: Int8Head, labels_R: Tensor) -> tuple[_Product, Tensor | None]:
    """Describe int8 operands; the tensor that comes along must outlive the call."""
    (num_rows, hidden_size), num_columns = rows.values_NH.shape, head.columns.scales_N.shape[0]
    assert head.softcap is None or head.softcap > 0
    bias_V = None if head.bias_V is None else head.bias_V.contiguous()
    product = _Product(
        x=_pointer("rows", rows.values_NH, torch.int8, (num_rows, hidden_size)),
        weight=_pointer("columns", head.columns.values_NH, torch.int8, (num_columns, hidden_size)),
        bias=None if bias_V is None else _pointer("bias", bias_V, torch.float32, (num_columns,)),
        x_scales=_pointer("row scales", rows.scales_N, torch.float32, (num_rows,)),
        weight_scales=_pointer("column scales", head.columns.scales_N, torch.float32, (num_columns,)),
        labels=_pointer("labels", labels_R, torch.int64, (num_rows,)),
        num_rows=num_rows,
        num_columns=num_columns,
        hidden_size=hidden_size,
        x_stride=hidden_size,
        weight_stride=hidden_size,
        dtype=INT8,
        logit_scale=head.logit_scale,
        softcap=head.softcap or 0.0,
    )
    return product, bias_V


def _product(x_RH: Tensor, head: Head, labels_R: Tensor) -> tuple[_Product, Tensor | None]:
    """Describe the operands; the tensor that comes along must outlive the call."""
    weight_VH, dtype = head.weight_VH, x_RH.dtype
    (num_rows, hidden_size), num_columns = x_RH.shape, weight_VH.shape[0]
    if dtype not in DTYPES or not hidden_size:
        raise ValueError(f"the native engine multiplies {list(DTYPES)} with H > 0, got {dtype} and H = {hidden_size}")
    assert head.softcap is None or head.softcap > 0
    bias_V = None if head.bias_V is None else head.bias_V.to(dtype).contiguous()
    product = _Product(
        x=_pointer("x", x_RH, dtype, (num_rows, hidden_size), any_row_stride=True),
        weight=_pointer("weight", weight_VH, dtype, (num_columns, hidden_size), any_row_stride=True),
        bias=None if bias_V is None else _pointer("bias", bias_V, dtype, (num_columns,)),
        labels=_pointer("labels", labels_R, torch.int64, (num_rows,)),
        num_rows=num_rows,
        num_columns=num_columns,
        hidden_size=hidden_size,
        x_stride=x_RH.stride(0),
        weight_stride=weight_VH.stride(0),
        dtype=DTYPES[dtype],
        logit_scale=head.logit_scale,
        softcap=head.softcap or 0.0,
    )
    return product, bias_V


def _pointer(
    name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], *, any_row_stride: bool = False
) -> int:
    """Return the address of a tensor, once it is certain that C++ finds `shape` elements of `dtype` there.

    Args:
        name: for the message.
        tensor: what C++ will read or write.
        dtype: as C++ takes it.
        shape: as C++ takes it.
        any_row_stride: rows may have any distance; else contiguous.

    Raises:
        ValueError: it is something else, or has no memory of its own (another device, a wrapper, freed storage).
    """
    is_strided = tensor.layout == torch.strided
    found = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
    if tensor.dtype != dtype or tensor.shape != shape or tensor.device.type != "cpu" or not is_strided:
        raise ValueError(f"the native engine takes {name} as {dtype} {shape} on cpu, got {found}; convert it")
    rows_are_dense = any_row_stride and (shape[1] == 1 or tensor.stride(1) == 1)
    if not (tensor.is_contiguous() or rows_are_dense) or tensor.is_neg():
        raise ValueError(
            f"the native engine takes {name} {shape} with contiguous {'rows' if any_row_stride else 'elements'}, got "
            f"strides {tensor.stride()}; pass {name}.contiguous()"
        )
    reach = sum((size - 1) * stride for size, stride in zip(shape, tensor.stride(), strict=True)) + 1
    needed = (tensor.storage_offset() + reach) * tensor.element_size() if tensor.numel() else 0
    if tensor.untyped_storage().nbytes() < needed or (needed and not tensor.data_ptr()):
        raise ValueError(f"{name} is {found} without memory behind it; its storage was freed, gather or allocate it")
    return tensor.data_ptr()


def _call(name: str, args: ctypes.Structure) -> None:
    loaded, reason = _load()
    assert loaded is not None, reason
    library, isa = loaded
    if getattr(library, name)(isa, ctypes.byref(args)) != 0:
        raise MemoryError(f"{name} could not allocate its buffers; give the op fewer rows at once")


@functools.cache
def _load() -> tuple[tuple[ctypes.CDLL, int] | None, str | None]:
    """Load the library once: (it and the number of the build to use, None), or (None, the reason why not)."""
    try:
        return _open_library(os.environ.get("FASTPREF_NATIVE", "1")), None
    except _Unavailable as unavailable:
        return None, str(unavailable)


def _open_library(wanted: str) -> tuple[ctypes.CDLL, int]:
    if wanted == "0":
        raise _Unavailable("switched off by FASTPREF_NATIVE=0; unset it")
    if wanted not in ("1", *BUILDS):
        raise ConfigError(f"FASTPREF_NATIVE must be 0, 1 or one of {', '.join(BUILDS)}, got {wanted!r}; unset it")
    if not LIBRARY.exists():
        raise _Unavailable(f"{LIBRARY.name} is not built, it needs x86-64 Linux; build it by {REBUILD}")
    _share_openmp_runtime()
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        raise _Unavailable(f"{LIBRARY.name} does not load ({error}); rebuild it by {REBUILD}") from error
    if library.fastpref_abi_version() != ABI_VERSION:
        raise _Unavailable(f"{LIBRARY.name} is of another version of fastpref; rebuild it by {REBUILD}")
    name = None if wanted == "1" else wanted.encode()
    isa = library.fastpref_find_isa(name)
    if isa < 0:
        needed = "AVX2, FMA and F16C" if name is None else f"what the build {wanted} named by FASTPREF_NATIVE needs"
        raise _Unavailable(f"this CPU lacks {needed}; the PyTorch engine takes its place")
    return library, isa


def _share_openmp_runtime() -> None:
    """Put the OpenMP runtime that PyTorch uses where the library, which names none itself, finds its symbols."""
    torch_library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        entry = ctypes.CDLL(str(torch_library)).GOMP_parallel
        info = _SymbolInfo()
        ctypes.CDLL(None).dladdr(ctypes.cast(entry, ctypes.c_void_p), ctypes.byref(info))
        path = info.file_name.decode()
    except (OSError, AttributeError):
        # A PyTorch without OpenMP: no second pool of threads to fear.
        path = "libgomp.so.1"
    try:
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise _Unavailable(f"no OpenMP runtime ({error}); install libgomp, the one of GCC") from error
