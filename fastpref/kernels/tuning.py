"""Measure tiles on this machine's GPU and write the fastest as a table for FASTPREF_TILES.

`python -m fastpref.kernels.tuning tiles.json`. A tile whose results differ from PyTorch's is never written, however
fast it is. Tiles change the last bits of results: use one table for all ranks and for the whole of a run.

The Gluon kernel waits on barriers of its own, so an error in it may be a wait for ever: it runs in processes apart,
under a deadline, and before it is timed it has a trial (`tile_trial`).

Dims: `R` rows, `H` hidden, `V` vocabulary.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fastpref.errors import ConfigError
from fastpref.kernels import forward_kernel, tile_trial, torch_tiles, triton_engine
from fastpref.kernels.apart import run_apart
from fastpref.kernels.engine import Head
from fastpref.kernels.outputs import LOGP_FIELDS, Partials
from fastpref.kernels.partials import finish_rows
from fastpref.kernels.tiles import CANDIDATES, TABLE, Tile, architecture_of, save_table

HIDDEN_SIZES = (1024, 2048, 4096, 8192)
NUM_ROWS, VOCAB_SIZE = 8192, 131072
DTYPES = {16: torch.bfloat16, 32: torch.float32}
REPEATS = 7
# Agreement with PyTorch's log-probabilities on random logits of a few units, both from the device's own products of
# equal inputs. In another order its tensor cores, which cut their sums off, move one by 6e-5 at H = 8192 (emulated:
# docs/numerics.md), a wrong tile by whole units.
AGREEMENT = 1e-3
# A trial compiles some eight variants, a measurement one.
TRIAL_SECONDS, MEASURE_SECONDS = 180.0, 60.0


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One tile at one H."""

    tile: Tile
    milliseconds: float
    """Median time of a forward pass."""
    error: str | None
    """Why the tile must not be used; None = it may."""


def tune(
    path: str,
    hidden_sizes: Sequence[int] = HIDDEN_SIZES,
    *,
    widths: Sequence[int] = tuple(DTYPES),
    seconds: float = math.inf,
    report: Callable[[str, int, Sequence[Measurement]], None] | None = None,
) -> dict[str, tuple[Tile, ...]]:
    """Measure every candidate on the current GPU and write the table of the fastest.

    Args:
        path: file to write, for FASTPREF_TILES.
        hidden_sizes: values of H to measure; each serves those up to the next.
        widths: of the operands in bits, 16 and 32.
        seconds: after these no further H and width is begun; what has been measured is written, if anything.
        report: gets the key of the table, H and what was measured; None prints it.

    Returns:
        What was written: the entries of this GPU's architecture.

    Raises:
        ConfigError: no GPU, or one that the kernels cannot run on.
        RuntimeError: no candidate gave right results.
    """
    if not torch.cuda.is_available():
        raise ConfigError("tuning measures on a GPU, and PyTorch sees none; run it on the machine that will train")
    architecture, deadline = architecture_of(torch.cuda.get_device_capability()), time.monotonic() + seconds
    table = {}
    for bits in widths:
        key = f"{architecture}/{bits}"
        candidates = CANDIDATES.get(key, TABLE[key])
        best = {}
        for hidden_size in hidden_sizes:
            if time.monotonic() >= deadline:
                break
            found = [measure(tile, DTYPES[bits], hidden_size) for tile in candidates]
            best[hidden_size] = fastest(key, hidden_size, found)
            (report or _report)(key, hidden_size, found)
        if best:
            table[key] = entries(best)
    if table:  # nothing measured is no reason to replace what an earlier run found
        save_table(path, table)
    return table


def measure(tile: Tile, dtype: torch.dtype, hidden_size: int) -> Measurement:
    """Check and time one tile on the current GPU; one of the Gluon kernel only after its trial."""
    if tile.kernel != "gluon":
        return _measure_here(tile, dtype, hidden_size)
    device = torch.cuda.current_device()
    error = forward_kernel.unavailable_reason() or _trial_error(tile, dtype, device)
    if error is not None:
        return Measurement(tile, math.inf, error)
    try:
        milliseconds, error = run_apart(_measure_on, device, tile, dtype, hidden_size, seconds=MEASURE_SECONDS)
    except (TimeoutError, RuntimeError) as problem:
        return Measurement(tile, math.inf, f"measured at H={hidden_size}: {problem}")
    return Measurement(tile, milliseconds, error)


@functools.cache
def _trial_error(tile: Tile, dtype: torch.dtype, device: int) -> str | None:
    """Return why a tile of the Gluon kernel must not be used; its trial takes place once, in a process of its own."""
    try:
        error = run_apart(_try_on, device, tile, dtype, seconds=TRIAL_SECONDS)
    except (TimeoutError, RuntimeError) as problem:
        error = str(problem)
    return None if error is None else f"in its trial: {error}"


def _try_on(device: int, tile: Tile, dtype: torch.dtype) -> str | None:
    torch.cuda.set_device(device)
    return tile_trial.disagreement(tile, dtype)


def _measure_on(device: int, tile: Tile, dtype: torch.dtype, hidden_size: int) -> tuple[float, str | None]:
    torch.cuda.set_device(device)
    found = _measure_here(tile, dtype, hidden_size)
    return found.milliseconds, found.error


def _measure_here(tile: Tile, dtype: torch.dtype, hidden_size: int) -> Measurement:
    from triton.errors import TritonError

    # fp32 has no tensor core: a tenth of the work takes as long.
    num_rows, vocab_size = (NUM_ROWS, VOCAB_SIZE) if dtype.itemsize == 2 else (NUM_ROWS // 4, VOCAB_SIZE // 4)
    generator = torch.Generator(device="cuda").manual_seed(0)
    x_RH, weight_VH = (
        torch.randn(size, hidden_size, generator=generator, dtype=torch.float32, device="cuda")
        for size in (num_rows, vocab_size)
    )
    labels_R = torch.randint(0, vocab_size, (num_rows,), generator=generator, dtype=torch.int64, device="cuda")
    head = Head((weight_VH * (2.0 / hidden_size**0.5)).to(dtype), None, 1.0, None)
    x_RH = x_RH.to(dtype)
    try:
        error = _disagreement(tile, x_RH, head, labels_R)
    except (RuntimeError, TritonError) as problem:  # too much shared memory, say; the next tile may do
        return Measurement(tile, float("inf"), f"{type(problem).__name__}: {problem}")
    return Measurement(tile, _median_milliseconds(tile, x_RH, head, labels_R), error)


def fastest(key: str, hidden_size: int, found: Sequence[Measurement]) -> Tile:
    """Return the fastest tile among those with right results.

    Raises:
        RuntimeError: there is none.
    """
    right = [measurement for measurement in found if measurement.error is None]
    if not right:
        reasons = "; ".join(f"{one.tile.rows}x{one.tile.columns}: {one.error}" for one in found)
        raise RuntimeError(f"no tile of {key} gave a right result at H={hidden_size}: {reasons}")
    return min(right, key=lambda measurement: measurement.milliseconds).tile


def entries(best: Mapping[int, Tile]) -> tuple[Tile, ...]:
    """Turn the best tile of each H into entries of a table: one where the winner changes, the first from H = 0 on."""
    kept: list[Tile] = []
    for hidden_size in sorted(best):
        tile = dataclasses.replace(best[hidden_size], min_hidden=hidden_size if kept else 0)
        if not kept or dataclasses.replace(kept[-1], min_hidden=0) != dataclasses.replace(tile, min_hidden=0):
            kept.append(tile)
    return tuple(kept)


def _forward(tile: Tile, x_RH: Tensor, head: Head, labels_R: Tensor) -> Partials:
    return triton_engine.forward_rows(
        x_RH, head, labels_R, fields=LOGP_FIELDS, bound_R=None, with_cache=False, tile=tile
    ).partials


def _disagreement(tile: Tile, x_RH: Tensor, head: Head, labels_R: Tensor) -> str | None:
    """Return how far the results of the first rows are from PyTorch's, or None if they agree and repeat."""
    partials = _forward(tile, x_RH, head, labels_R)
    few = slice(0, 1024)
    expected = torch_tiles.forward_rows(
        x_RH[few], head, labels_R[few], fields=LOGP_FIELDS, bound_R=None, with_cache=False
    )
    logps_R = finish_rows(partials, torch.float32).token_logps[few]
    gap = float((logps_R - finish_rows(expected.partials, torch.float32).token_logps).abs().max())
    if not gap <= AGREEMENT:
        return f"log-probabilities differ from PyTorch's by {gap:.3g}"
    if not torch.equal(partials.values_FR, _forward(tile, x_RH, head, labels_R).values_FR):
        return "two runs gave different bits"
    return None


def _median_milliseconds(tile: Tile, x_RH: Tensor, head: Head, labels_R: Tensor) -> float:
    times = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        _forward(tile, x_RH, head, labels_R)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def _report(key: str, hidden_size: int, found: Sequence[Measurement]) -> None:
    for one in sorted(found, key=lambda measurement: measurement.milliseconds):
        print(f"{key} H={hidden_size} {one.milliseconds:8.3f} ms  {one.tile}  {one.error or ''}", flush=True)


def main() -> None:
    """Tune and write."""
    parser = argparse.ArgumentParser(description="Measure the tiles of the Triton kernels on this GPU.")
    parser.add_argument("path", help="file to write; name it in FASTPREF_TILES to use it")
    parser.add_argument("--hidden-sizes", type=int, nargs="+", default=list(HIDDEN_SIZES))
    options = parser.parse_args()
    tune(options.path, options.hidden_sizes)


if __name__ == "__main__":
    main()
