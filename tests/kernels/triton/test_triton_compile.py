"""Faults 12, 18: every kernel compiles without a GPU for every architecture, and to the machine code that was meant."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: there is nothing to compile", allow_module_level=True)

from fastpref.kernels.tiles import CANDIDATES, TABLE
from fastpref.kernels.triton_compile import (
    FLAGS,
    CompiledKernel,
    Variant,
    all_variants,
    compile_all,
    compile_variant,
    describe,
    faults,
    format_table,
    operands,
    pairwise,
    representative_variants,
    variants,
)

# Bytes that variants spilled when this was recorded, the largest of Triton 3.6 and 3.9; others spill nothing.
SPILL_LIMITS = json.loads((Path(__file__).parent / "spills.json").read_text(encoding="utf-8"))
TILE = TABLE["sm_90/16"][0]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_kernels_stay_within_the_recorded_limits() -> None:
    rows = [*compile_all(representative_variants(), processes=min(2, os.cpu_count() or 1))]
    assert not faults(rows, SPILL_LIMITS), "\n".join(faults(rows, SPILL_LIMITS))


def test_recorded_limits_are_those_of_known_variants() -> None:
    assert set(SPILL_LIMITS) <= {variant.name for variant in representative_variants()}


def test_default_variants_may_not_spill() -> None:
    """The plain pass and the one with column masses; the gradient with and without what it covers."""
    for kernel, flags in (("forward", ()), ("forward", ("mass",)), ("gradient", ()), ("gradient", ("covered",))):
        assert Variant(kernel, "sm_90", "bf16", flags, TILE).name not in SPILL_LIMITS
    for key, (tile, *_) in TABLE.items():
        architecture, bits = key.split("/")
        if bits == "8":
            for flags in ((), ("mass",)):
                assert Variant("screen", architecture, "int8", flags, tile).name not in SPILL_LIMITS


@pytest.mark.parametrize("kernel", FLAGS)
def test_pairwise_covers_every_pair(kernel: str) -> None:
    everything = list(variants(kernel, "sm_90", operands(kernel)[0]))
    cover = pairwise(everything)
    assert len(cover) <= len(everything)
    for first in FLAGS[kernel]:
        for second in FLAGS[kernel]:
            for wanted in ((True, True), (True, False), (False, True), (False, False)):
                reachable = any((first in v.flags, second in v.flags) == wanted for v in everything)
                assert reachable == any((first in v.flags, second in v.flags) == wanted for v in cover)


def test_representative_variants_cover_kernels_dtypes_architectures_and_shapes() -> None:
    cover = representative_variants()
    assert {variant.kernel for variant in cover} == set(FLAGS)
    assert {variant.dtype for variant in cover if variant.kernel == "forward"} == {"bf16", "fp16", "fp32"}
    for kernel in ("forward", "screen", "gradient"):
        reached = {variant.architecture for variant in cover if variant.kernel == kernel}
        assert reached == {"sm_80", "sm_86", "sm_90", "sm_100"}
    shapes = {variant.name.split()[3] for variant in cover if variant.architecture == "sm_90"}
    for tile in (*CANDIDATES["sm_90/16"], *TABLE["sm_90/16"]):
        assert Variant("forward", "sm_90", "bf16", (), tile).name.split()[3] in shapes
    assert set(cover) <= set(all_variants())


def test_kernels_have_at_most_25_arguments() -> None:
    for kernel in FLAGS:
        assert len(describe(next(variants(kernel, "sm_90", operands(kernel)[0]))).kernel.arg_names) <= 25


def test_faults_names_what_is_wrong() -> None:
    variant = Variant("forward", "sm_90", "bf16", (), TILE)
    good = CompiledKernel(variant, 255, 0, 200_000, "wgmma", 8, 0)
    assert faults([good], {}) == []
    bad = CompiledKernel(variant, 255, 8, 300_000, "mma", 0, 2)
    messages = faults([bad], {})
    for part in ("spills 8 bytes", "300000 bytes of shared", "2 offsets", "by mma, expected wgmma", "0 tensor copies"):
        assert any(part in message for message in messages)
    assert variant.name in format_table([good]) and "wgmma" in format_table([good])
    assert not any("spills" in message for message in faults([bad], {variant.name: 8}))


def test_compile_variant_counts_narrow_products() -> None:
    """The check of offsets finds the product that it is there to find."""
    import triton
    import triton.language as tl

    from fastpref.kernels import triton_compile

    @triton.jit
    def narrow(pointer, stride, count):
        places = tl.program_id(0) * 16 + tl.arange(0, 16)
        tl.store(pointer + places * stride, tl.full((16,), 0.0, tl.float32), mask=places < count)

    source = triton.compiler.ASTSource(narrow, {"pointer": "*fp32", "stride": "i32", "count": "i32"})
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    compiled = triton.compile(source, target=target)
    assert triton_compile._narrow_products(str(compiled.asm["ttir"])) == 1
    assert compile_variant(next(variants("sum", "sm_90", "fp32"))).narrow_products == 0


def test_triton_compile_prints_a_table() -> None:
    command = [sys.executable, "-m", "fastpref.kernels.triton_compile", "--representative", "--match", "sum sm_90 bf16"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    header, *rows = result.stdout.strip().splitlines()
    assert header.startswith("variant") and len(rows) == 2
    assert re.match(r"sum sm_90 bf16 .* -  ", rows[0]) and re.match(r"sum sm_90 bf16 .* adds  ", rows[1])
