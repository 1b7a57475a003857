"""Whether a tile's forward kernel is right on this device: small problems, ragged in every way, all that it can give.

For kernels that have run on no device of this kind before. What is small is compared with the formula in fp64; the same
rows must have the same bits with and without column masses, statistics and a cache, and each time they are scored.

Dims: `R` rows, `H` hidden, `V` vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpref.kernels import torch_tiles, triton_engine
from fastpref.kernels.engine import ForwardRows, Head
from fastpref.kernels.outputs import FIELDS, LOGP_FIELDS
from fastpref.kernels.tiles import Tile

SEEDS, REPEATS = 3, 5
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias, scale, softcap": {"bias": True, "logit_scale": 0.7, "softcap": 8.0},
}
# Logits of a few units, summed by tensor cores that cut off what fp32 cannot hold: a wrong kernel is off by units.
AGREEMENT = 1e-3
# A cached exponential has 8 bits.
CACHE_AGREEMENT = 2.0**-8 + AGREEMENT


def sizes(tile: Tile) -> list[tuple[int, int, int]]:
    """Return (R, H, V): one of each; ends of rows, columns and H inside of tiles; more tiles than multiprocessors."""
    rows, columns, hidden = tile.rows, tile.columns, tile.hidden
    return [
        (1, 8, 1),
        (rows // 2, hidden, columns),
        (rows + 1, hidden + 8, columns + 1),
        (5 * rows - 3, 9 * hidden + 8, 31 * columns - 5),
    ]


def disagreement(tile: Tile, dtype: torch.dtype, device: str = "cuda") -> str | None:
    """Return the first thing that is wrong, with the problem at which it shows, or None."""
    for size in sizes(tile):
        for name, options in HEADS.items():
            for seed in range(SEEDS):
                x_RH, head, labels_R = _problem(*size, dtype, device, seed, **options)
                error = _compare(tile, x_RH, head, labels_R)
                if error is not None:
                    return f"{error} (R, H, V = {size}, head {name}, seed {seed})"
    return None


def _problem(
    num_rows: int,
    hidden_size: int,
    vocab_size: int,
    dtype: torch.dtype,
    device: str,
    seed: int,
    *,
    bias: bool = False,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Head, Tensor]:
    """Return rows, a head and labels, some of them outside of the vocabulary."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device=device)

    weight_VH = (randn(vocab_size, hidden_size) * (2.0 / hidden_size**0.5)).to(dtype)
    bias_V = randn(vocab_size).to(dtype) if bias else None
    size = (num_rows,)
    labels_R = torch.randint(-2, vocab_size + 2, size, generator=generator, dtype=torch.int64, device=device)
    return randn(num_rows, hidden_size).to(dtype), Head(weight_VH, bias_V, logit_scale, softcap), labels_R


def _compare(tile: Tile, x_RH: Tensor, head: Head, labels_R: Tensor) -> str | None:
    bound_R = torch.linspace(-1.0, 2.0, x_RH.shape[0], dtype=torch.float32, device=x_RH.device)
    with_cache = head.softcap is None

    def run(*, extras: bool) -> ForwardRows:
        return triton_engine.forward_rows(
            x_RH,
            head,
            labels_R,
            fields=tuple(FIELDS) if extras else LOGP_FIELDS,
            bound_R=bound_R if extras else None,
            with_cache=with_cache and extras,
            tile=tile,
        )

    full = run(extras=True)
    wide_head = Head(
        head.weight_VH.double(), None if head.bias_V is None else head.bias_V.double(), head.logit_scale, head.softcap
    )
    wide = torch_tiles.forward_rows(
        x_RH.double(), wide_head, labels_R, fields=tuple(FIELDS), bound_R=bound_R.double(), with_cache=False
    )
    for field in FIELDS:
        if not torch.allclose(full.partials[field], wide.partials[field], AGREEMENT, AGREEMENT, equal_nan=True):
            return f"{field} differs from fp64 by {_gap(full.partials[field], wide.partials[field]):.3g}"
    assert full.mass_CV is not None and wide.mass_CV is not None
    if not torch.allclose(full.mass_CV.double(), wide.mass_CV.double(), rtol=AGREEMENT, atol=0.0):
        return f"column masses differ from fp64 by {_gap(full.mass_CV, wide.mass_CV):.3g}"
    if full.cache is not None and not _cache_agrees(full, x_RH, wide_head):
        return "cached exponentials differ from fp64"
    for repeat in range(REPEATS):
        extras = bool(repeat % 2)
        again = run(extras=extras)
        if not all(_same_bits(again.partials[field], full.partials[field]) for field in again.partials.fields):
            return f"a row's bits differ {'in another run' if extras else 'without masses, statistics and cache'}"
        if again.mass_CV is not None and not _same_bits(again.mass_CV, full.mass_CV):
            return "column masses differ in another run"
    return None


def _gap(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max())


def _same_bits(found: Tensor, expected: Tensor) -> bool:
    return torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))


def _cache_agrees(found: ForwardRows, x_RH: Tensor, head: Head) -> bool:
    """Compare what the cache stands for with the exponentials of the logits."""
    assert found.cache is not None
    z_RV = x_RH.double() @ head.weight_VH.t()
    if head.bias_V is not None:
        z_RV += head.bias_V
    exponents_RV = found.cache.exponents_RN.repeat_interleave(found.cache.columns_per_group, dim=1)[:, : z_RV.shape[1]]
    kept_RV = found.cache.values_RV.double() * 2.0 ** exponents_RV.double()
    return torch.allclose(kept_RV, (z_RV * head.logit_scale).exp(), rtol=CACHE_AGREEMENT, atol=1e-30)
