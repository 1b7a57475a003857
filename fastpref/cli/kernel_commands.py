"""`fastpref kernels`: what the op runs on here, what its GPU kernels compile to, and their tiles."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fastpref.cli.printing import show
from fastpref.cli.tables import new_table
from fastpref.errors import MissingDependencyError

if TYPE_CHECKING:
    from fastpref.kernels.triton_compile import CompiledKernel


@click.group()
def kernels() -> None:
    """Look at the kernels of the op `linear_logps`."""


@kernels.command()
def info() -> None:
    """Say which engines can run on this machine, and why the others cannot."""
    import torch

    from fastpref.kernels import native, triton_engine
    from fastpref.kernels.engines import HAS_TRITON

    table = new_table("Engines of linear_logps", ("engine", "backend", "devices", "status"))
    for column in table.columns:
        column.justify = "left"
    table.add_row("PyTorch tiles", "torch", "any", f"ready, torch {torch.__version__}")
    status = native.unavailable_reason() or f"ready, {native.build_name()}, {torch.get_num_threads()} threads"
    table.add_row("native", "torch", "CPU", status)
    table.add_row(
        "Triton", "triton", "NVIDIA, compute capability >= 8.0", triton_engine.unavailable_reason() or "ready"
    )
    if HAS_TRITON:
        table.add_row("Gluon, its forward pass", "triton", "NVIDIA, compute capability 9.0", _gluon_status())
    show(table)


@kernels.command()
@click.option("--all", "is_all", is_flag=True, help="Every combination of flags and every tile, not just a cover.")
@click.option("--match", default="", metavar="TEXT", help="Only variants whose name contains TEXT.")
@click.option("--processes", type=click.IntRange(min=1), default=1, show_default=True, help="Compilers at once.")
def inspect(is_all: bool, match: str, processes: int) -> None:
    """Compile the GPU kernels, without a GPU, and print what the machine code uses."""
    _require_triton()
    from fastpref.kernels import triton_compile

    wanted = triton_compile.all_variants() if is_all else triton_compile.representative_variants()
    wanted = [variant for variant in wanted if match in variant.name]
    if not wanted:
        raise click.BadParameter(f"no variant's name contains {match!r}", param_hint="--match")
    console = Console(stderr=True)
    compiled = track(
        triton_compile.compile_all(wanted, processes),
        "compiling",
        total=len(wanted),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    show(resource_table(compiled))


@kernels.command()
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--hidden", "hidden_sizes", type=click.IntRange(min=16), multiple=True, help="Values of H to measure.")
@click.option("--seconds", type=click.FloatRange(min=0, min_open=True), help="Begin no further H after these.")
def tune(output: Path, hidden_sizes: tuple[int, ...], seconds: float | None) -> None:
    """Measure the candidate tiles on this GPU, right results only, and write the table OUTPUT of the fastest.

    On compute capability 9.0 the Gluon kernel takes part, after a trial in a process that is killed if it hangs.
    """
    _require_triton()
    from fastpref.kernels import tuning

    tuning.tune(str(output), hidden_sizes or tuning.HIDDEN_SIZES, seconds=seconds or math.inf)
    click.echo(f"wrote {output}; FASTPREF_TILES={output} uses it")


def resource_table(rows: Iterable[CompiledKernel]) -> Table:
    """One line per compiled variant; what should not be there is red."""
    headers = (
        "kernel",
        "arch",
        "dtype",
        "tile",
        "flags",
        "registers",
        "spills",
        "shared KiB",
        "MMA",
        "TMA",
        "i32 products",
    )
    table = new_table("GPU kernels", headers)
    for column in table.columns[:5]:
        column.justify = "left"
    for row in rows:
        variant, tile = row.variant, row.variant.tile
        style = "red" if row.spilled_bytes or row.narrow_products else ""
        table.add_row(
            variant.kernel,
            variant.architecture,
            variant.dtype,
            f"{tile.rows}x{tile.columns}x{tile.hidden}/{tile.slices} w{tile.warps} s{tile.stages}"
            + (" gluon" if tile.kernel == "gluon" else ""),
            "+".join(variant.flags) or "-",
            str(row.registers),
            str(row.spilled_bytes),
            f"{row.shared_bytes / 1024:.0f}",
            row.matrix_unit,
            str(row.tma_loads),
            str(row.narrow_products),
            style=style,
        )
    return table


def _gluon_status() -> str:
    """Say whether the Gluon kernel can be had, and what switches it on."""
    from fastpref.kernels import forward_kernel
    from fastpref.kernels.tiles import GLUON_KEY, OVERRIDE_VARIABLE, load_table

    reason = forward_kernel.unavailable_reason()
    if reason is not None:
        return reason
    path = os.environ.get(OVERRIDE_VARIABLE)
    if path and any(tile.kernel == "gluon" for tile in load_table(path).get(GLUON_KEY, ())):
        return f"named in {path}"
    return f"off until `fastpref kernels tune` finds it right and fastest, and {OVERRIDE_VARIABLE} names its table"


def _require_triton() -> None:
    from fastpref.kernels.engines import HAS_TRITON

    if not HAS_TRITON:
        raise MissingDependencyError("this command needs Triton; install it with `pip install 'fastpref[triton]'`")
