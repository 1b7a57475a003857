"""Compile the Triton kernels without a GPU and say what the machine code uses: registers, spills, tensor cores, TMA.

`python -m fastpref.kernels.triton_compile` prints every variant; the test suite compares a cover of them with recorded
limits. What is compiled is what the launchers describe, on tensors without storage.

Dims: `R` rows, `H` hidden, `V` vocabulary, `N` vocabulary tiles.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastpref.kernels import forward_kernel
from fastpref.kernels.engine import ExponentCache, Head, Int8Head, Int8Rows, RowScalars
from fastpref.kernels.machine_code import resource_usage
from fastpref.kernels.outputs import FIELDS, LOGP_FIELDS, Partials
from fastpref.kernels.tiles import CACHE_COLUMNS, CANDIDATES, TABLE, Tile, select_tile
from fastpref.kernels.triton_backward import cached_gradient_call, logit_gradient_call
from fastpref.kernels.triton_common import KernelCall
from fastpref.kernels.triton_parts import TILE_FIELDS, TileParts, merge_call, sum_call
from fastpref.kernels.triton_quantise import quantise_call
from fastpref.kernels.triton_screen import screen_call

# Architectures of the table, and the shared memory that a program can have there.
SHARED_BYTES = {"sm_80": 166_912, "sm_86": 101_376, "sm_90": 232_448, "sm_100": 232_448}
ARCHITECTURES = tuple(SHARED_BYTES)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "int8": torch.int8}
FLAGS = {
    "forward": ("pointers", "bias", "scale", "softcap", *TILE_FIELDS, "mass", "cache"),
    "screen": ("pointers", "bias", "scale", "softcap", *TILE_FIELDS, "mass"),
    "gradient": ("pointers", "bias", "scale", "softcap", "covered"),
    "cached": ("scale", "places"),
    "merge": TILE_FIELDS,
    "sum": ("adds",),
    "quantise": (),
}
# Sizes of the tensors that are described; only their divisibility by 16 enters the code.
NUM_ROWS, HIDDEN_SIZE, VOCAB_SIZE = 8192, 4096, 131072
TYPE_NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Variant:
    """One kernel as one caller would get it."""

    kernel: str
    """A key of FLAGS."""
    architecture: str
    dtype: str
    """Of the operands: a key of DTYPES."""
    flags: tuple[str, ...]
    """Some of FLAGS[kernel], in that order."""
    tile: Tile

    @property
    def name(self) -> str:
        """Return a key that says everything about the variant."""
        tile = self.tile
        shape = f"{tile.rows}x{tile.columns}x{tile.hidden}/{tile.slices}w{tile.warps}s{tile.stages}"
        if tile.kernel == "gluon":
            shape += "/gluon"
        return f"{self.kernel} {self.architecture} {self.dtype} {shape} {'+'.join(self.flags) or '-'}"


@dataclass(frozen=True)
class CompiledKernel:
    """What the machine code of a variant uses."""

    variant: Variant
    registers: int
    """Per thread."""
    spilled_bytes: int
    """Local memory per thread: registers that did not fit."""
    shared_bytes: int
    """Shared memory per program."""
    matrix_unit: str
    """wgmma, tcgen05 or mma, or fma where no tensor core is used."""
    tma_loads: int
    """Instructions that start a tensor copy to shared memory."""
    narrow_products: int
    """32-bit index products of two run-time numbers, which could overflow; there should be none."""


def operands(kernel: str) -> tuple[str, ...]:
    """Return the dtypes that a kernel's operands may have, keys of DTYPES, the most common one first."""
    return ("int8",) if kernel == "screen" else ("bf16", "fp16", "fp32")


def variants(kernel: str, architecture: str, dtype: str) -> Iterator[Variant]:
    """Yield every combination of flags that a caller can reach, on the table's tile."""
    tile = select_tile(architecture, DTYPES[dtype], HIDDEN_SIZE)
    names = FLAGS[kernel]
    for chosen in itertools.product((False, True), repeat=len(names)):
        flags = tuple(itertools.compress(names, chosen))
        # A cache serves no cap, and without a cap nothing asks the kernel for totals.
        if not ("cache" in flags if "softcap" in flags else kernel == "forward" and "total" in flags):
            yield Variant(kernel, architecture, dtype, flags, tile)


def pairwise(candidates: Iterable[Variant]) -> list[Variant]:
    """Return a small part of the variants in which every pair of flags occurs in all its combinations."""
    candidates = list(candidates)
    wanted = set().union(*(_settings(variant) for variant in candidates)) if candidates else set()
    cover = candidates[:1]
    wanted -= set().union(*(_settings(variant) for variant in cover))
    while wanted:
        best = max(candidates, key=lambda variant: len(_settings(variant) & wanted))
        cover.append(best)
        wanted -= _settings(best)
    return cover


def _settings(variant: Variant) -> set[tuple[str, bool, str, bool]]:
    """Return how each pair of flags is set; alone flags count as a pair with themselves."""
    names = FLAGS[variant.kernel]
    pairs = itertools.combinations_with_replacement(names, 2)
    return {(first, first in variant.flags, second, second in variant.flags) for first, second in pairs}


def representative_variants() -> list[Variant]:
    """Return a cover: every kernel and dtype, every pair of flags, every shape among the tiles, every architecture.

    Flags and dtypes on Hopper; of the other architectures one variant per kernel.
    """
    cover: list[Variant] = []
    for kernel in FLAGS:
        common, *others = operands(kernel)
        cover += pairwise(variants(kernel, "sm_90", common))
        if kernel not in ("merge", "sum"):  # those read fp32 whatever the operands are
            cover += [next(variants(kernel, "sm_90", dtype)) for dtype in others]
    shipped = TABLE["sm_90/16"][0]
    cover.append(Variant("gradient", "sm_90", "bf16", ("covered",), shipped))
    for architecture in ARCHITECTURES:
        tile = TABLE[f"{architecture}/8"][0]
        cover.append(Variant("screen", architecture, "int8", ("mass",), tile))
    for tile in CANDIDATES["sm_90/16"]:
        if tile.group_rows == shipped.group_rows:
            cover.append(Variant("forward", "sm_90", "bf16", ("mass",), tile))
    for architecture in ("sm_80", "sm_86", "sm_100"):
        plain, *_, fullest = variants("forward", architecture, "bf16")
        cover += [plain if architecture == "sm_86" else fullest, next(variants("gradient", architecture, "bf16"))]
    return list(dict.fromkeys(cover))


def all_variants() -> list[Variant]:
    """Return every kernel, architecture, dtype and combination of flags on the table's tiles, and every candidate."""
    everything = [
        variant
        for kernel, architecture in itertools.product(FLAGS, ARCHITECTURES)
        for dtype in operands(kernel)
        for variant in variants(kernel, architecture, dtype)
    ]
    for key, tiles in CANDIDATES.items():
        architecture, bits = key.split("/")
        for dtype, tile in itertools.product(DTYPES, tiles):
            if DTYPES[dtype].itemsize * 8 == int(bits):
                everything.append(Variant("forward", architecture, dtype, ("mass",), tile))
                if tile.kernel == "gluon":  # of the forward pass; the gradient is Triton's
                    everything.append(Variant("forward", architecture, dtype, (), tile))
                else:
                    everything.append(Variant("gradient", architecture, dtype, ("covered",), tile))
    return list(dict.fromkeys(everything))


def describe(variant: Variant) -> KernelCall:
    """Return the launch that a caller of this variant would make, on tensors without storage."""
    tile, flags, dtype = variant.tile, set(variant.flags), DTYPES[variant.dtype]
    num_tiles, num_masses = VOCAB_SIZE // tile.columns, NUM_ROWS // tile.mass_rows

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    labels, scale = new(NUM_ROWS, dtype=torch.int64), 0.5 if "scale" in flags else 1.0
    exponents = new(NUM_ROWS, VOCAB_SIZE // CACHE_COLUMNS, dtype=torch.int32)
    cache = ExponentCache(new(NUM_ROWS, VOCAB_SIZE, dtype=torch.bfloat16), exponents, CACHE_COLUMNS)
    scalars = RowScalars(new(NUM_ROWS), new(NUM_ROWS), new(NUM_ROWS))
    out, row = new(NUM_ROWS, VOCAB_SIZE, dtype=dtype), new(NUM_ROWS)
    x = new(NUM_ROWS, HIDDEN_SIZE, dtype=dtype)
    fields = tuple(field for field in FIELDS if field in LOGP_FIELDS or field in flags)
    parts = TileParts.empty(x, VOCAB_SIZE, fields, tile)
    if variant.kernel == "merge":
        merged = Partials(fields, new(len(fields), NUM_ROWS, dtype=torch.float64))
        return merge_call(parts, labels, merged, VOCAB_SIZE, tile)
    if variant.kernel == "sum":
        return sum_call(new(num_masses, VOCAB_SIZE), new(2, VOCAB_SIZE), num_masses // 2, adds="adds" in flags)
    if variant.kernel == "cached":
        places = labels if "places" in flags else None
        return cached_gradient_call(cache, places, 0, labels, scalars, scale, out)
    if variant.kernel == "quantise":
        values = new(NUM_ROWS, HIDDEN_SIZE, dtype=torch.int8)
        return quantise_call(x, new(HIDDEN_SIZE), 128, values, row, 127.0, 2.0**-96)
    bias = new(VOCAB_SIZE, dtype=torch.float32 if variant.kernel == "screen" else dtype) if "bias" in flags else None
    head = Head(new(VOCAB_SIZE, HIDDEN_SIZE, dtype=dtype), bias, scale, 30.0 if "softcap" in flags else None)
    # Older devices have no copy engine; there the launcher passes pointers.
    use_tma = "pointers" not in flags and variant.architecture in ("sm_90", "sm_100")
    if variant.kernel == "gradient":
        covered = new(num_tiles, NUM_ROWS) if "covered" in flags else None
        return logit_gradient_call(x, head, labels, scalars, out, covered, tile=tile, use_tma=use_tma, num_sms=132)
    bound, masses = (row, new(num_masses, VOCAB_SIZE)) if "mass" in flags else (None, None)
    launch: dict[str, Any] = {"bound_R": bound, "mass_MV": masses, "tile": tile, "use_tma": use_tma, "num_sms": 132}
    if variant.kernel == "screen":
        int8_head = Int8Head(Int8Rows(head.weight_VH, new(VOCAB_SIZE)), *head[1:])
        return screen_call(Int8Rows(x, row), int8_head, labels, parts, **launch)
    kept = cache if "cache" in flags else None
    return forward_kernel.forward_call(tile)(x, head, labels, parts, cache=kept, **launch)


def build(variant: Variant) -> Any:
    """Compile one variant; Triton's own object, which has every stage of the code in `asm`."""
    return compile_call(describe(variant), variant.architecture)


def compile_variant(variant: Variant) -> CompiledKernel:
    """Compile one variant to machine code and read it."""
    compiled = build(variant)
    registers, spilled_bytes = resource_usage(compiled.asm["cubin"])
    return CompiledKernel(
        variant=variant,
        registers=registers,
        spilled_bytes=spilled_bytes,
        shared_bytes=compiled.metadata.shared,
        matrix_unit=_matrix_unit(compiled.asm["ptx"]),
        tma_loads=len(re.findall(r"cp\.async\.bulk\.tensor\.2d\.shared", compiled.asm["ptx"])),
        narrow_products=_narrow_products(str(compiled.asm["ttgir" if variant.tile.kernel == "gluon" else "ttir"])),
    )


def compile_call(call: KernelCall, architecture: str) -> Any:
    """Return what Triton makes of a launch: `asm` with its intermediate forms and machine code, and `metadata`."""
    options = {"num_warps": call.num_warps, "num_stages": call.num_stages, "enable_fp_fusion": False}
    target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    return triton.compile(_source(call), target=target, options=options)


def compile_all(wanted: Iterable[Variant], processes: int) -> Iterator[CompiledKernel]:
    """Compile variants in `processes` fresh processes; each as it is done, in the order given."""
    if processes == 1:
        yield from map(compile_variant, wanted)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(compile_variant, wanted)


def _source(call: KernelCall) -> ASTSource:
    signature, constants, attributes = {}, {}, {}
    constexprs = {parameter.name for parameter in call.kernel.params if parameter.is_constexpr}
    varying = {parameter.name for parameter in call.kernel.params if parameter.do_not_specialize}
    for place, name in enumerate(call.kernel.arg_names):
        value = call.arguments[name]
        is_known = name not in varying and isinstance(value, int)
        if name in constexprs or value is None or (is_known and value == 1):
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = _type_of(value)
            if isinstance(value, Tensor) or (is_known and value % 16 == 0):
                attributes[(place,)] = [["tt.divisibility", 16]]
    if call.kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        return GluonASTSource(call.kernel, signature, constants, attributes)
    return ASTSource(call.kernel, signature, constants, attributes)


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + TYPE_NAMES[value.dtype]
    if hasattr(value, "block_shape"):
        block = ", ".join(map(str, value.block_shape))
        layout = f",{value.layout!r}" if hasattr(value, "layout") else ""  # Gluon's descriptors have one
        return f"tensordesc<{TYPE_NAMES[value.base.dtype]}[{block}]{layout}>"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _matrix_unit(ptx: str) -> str:
    for unit, instruction in (("wgmma", "wgmma.mma_async"), ("tcgen05", "tcgen05.mma"), ("mma", "mma.sync")):
        if instruction in ptx:
            return unit
    return "fma"


def _narrow_products(ttir: str) -> int:
    """Count 32-bit products of two run-time numbers in an offset; the number of tiles is one that cannot overflow."""
    constants = set(re.findall(r"(%\S+) = arith.constant", ttir))
    products = re.findall(r"(%\S+) = arith\.muli (%\S+), (%\S+) .*: (tensor<[0-9x]*x)?i32", ttir)
    return sum(
        not {left, right} & constants and not (name.startswith("%num_tiles") and not tensor)
        for name, left, right, tensor in products
    )


def format_table(rows: Iterable[CompiledKernel]) -> str:
    """Return the rows as an aligned text table."""
    header = ("variant", "registers", "spilled bytes", "shared bytes", "matrix unit", "TMA loads", "narrow products")
    lines: list[tuple[str, ...]] = [header]
    for row in rows:
        numbers = (row.registers, row.spilled_bytes, row.shared_bytes, row.matrix_unit, row.tma_loads)
        lines.append((row.variant.name, *map(str, numbers), str(row.narrow_products)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def faults(rows: Iterable[CompiledKernel], spill_limits: Mapping[str, int]) -> list[str]:
    """Return what is wrong with compiled kernels, a message each.

    Args:
        rows: of `compile_all`.
        spill_limits: bytes that variants may spill, by name; none where there is no entry.
    """
    messages = []
    for row in rows:
        name, limit = row.variant.name, spill_limits.get(row.variant.name, 0)
        available = SHARED_BYTES[row.variant.architecture]
        if row.spilled_bytes > limit:
            messages.append(f"{name}: spills {row.spilled_bytes} bytes, at most {limit} recorded")
        if row.shared_bytes > available:
            messages.append(f"{name}: needs {row.shared_bytes} bytes of shared memory, a program can have {available}")
        if row.narrow_products:
            messages.append(f"{name}: {row.narrow_products} offsets are multiplied in 32 bits")
        if row.variant.kernel in ("forward", "screen", "gradient"):
            units, uses_tma = _expected_hardware(row.variant)
            if row.matrix_unit not in units:
                messages.append(f"{name}: multiplies by {row.matrix_unit}, expected {' or '.join(units)}")
            if bool(row.tma_loads) != uses_tma:
                messages.append(f"{name}: {row.tma_loads} tensor copies, expected {'some' if uses_tma else 'none'}")
    return messages


def _expected_hardware(variant: Variant) -> tuple[tuple[str, ...], bool]:
    """Return the matrix units that will do, and whether tiles are loaded by the copy engine."""
    if variant.dtype == "fp32":
        units: tuple[str, ...] = ("fma",)
    else:
        units = {"sm_90": ("wgmma",), "sm_100": ("tcgen05",)}.get(variant.architecture, ("mma",))
    if variant.dtype == "int8" and variant.architecture == "sm_100":
        # Triton 3.6 has int8 on the older unit only, 3.9 on Blackwell's own.
        units = ("tcgen05", "mma")
    return units, variant.architecture in ("sm_90", "sm_100") and "pointers" not in variant.flags


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Compile every Triton kernel without a GPU and print what it uses.")
    parser.add_argument("--representative", action="store_true", help="only the cover that the tests compile")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--match", default="", help="only variants whose name contains this text")
    options = parser.parse_args()
    wanted = representative_variants() if options.representative else all_variants()
    wanted = [variant for variant in wanted if options.match in variant.name]
    print(format_table(compile_all(wanted, options.processes)))


if __name__ == "__main__":
    main()
