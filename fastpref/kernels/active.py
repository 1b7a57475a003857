"""The active columns of a batch: those that hold all but a sliver of the softmax of its rows.

On real text most columns of a large vocabulary have next to no probability at any row of a batch, and next to no
gradient. The forward pass sees every logit once; on the way it adds up each column's mass, `sum over rows of p`. It
does not know the normaliser yet, so it uses a lower bound of it and overestimates the mass. The columns with the
smallest masses whose sum stays below a limit are cold; the rest, and every label, are active. A flat distribution
(an untrained model) has hardly any cold columns, and the backward pass is then the exact one.

Dims: `R` rows, `H` hidden, `V` vocabulary, `C` chunks of rows, `L` pilot columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastpref.kernels.engine import Engine, Head, accumulation_dtype, operand_dtype
from fastpref.kernels.outputs import Partials
from fastpref.kernels.rows import gather_rows
from fastpref.kernels.torch_tiles import product, tile_shape
from fastpref.kernels.vocab_parallel import merge_bounds

# Rows that share one set. A taller chunk spares passes over the weight; at equal cold mass the error of the weight's
# gradient grows with its height (relative 2.4e-4 at 512 rows, 4.5e-4 at 3300: Gemma-3-270m, docs/numerics.md).
CHUNK_ROWS = 4096
# With more active columns than this share, gathering them costs more than leaving the cold ones out saves.
FLAT_SHARE = 0.75
# Columns beside the labels in the pilot of the lower bound. Tokenizers give low ids to frequent tokens.
PILOT_SHARE, MAX_PILOT = 1 / 64, 4096


def lower_bounds(x_RH: Tensor, head: Head, labels_R: Tensor) -> Tensor:
    """Bound each row's log-sum-exp from below by that of the batch's labels and the first ids of the vocabulary.

    Args:
        x_RH: rows [R, H].
        head: the projection.
        labels_R: int64 [R], columns; others than [0, V) are left out.

    Returns:
        [R] in the accumulation dtype; -inf where there is no column at all. One device sync, for the distinct labels.
    """
    num_columns = head.weight_VH.shape[0]
    num_first = min(int(num_columns * PILOT_SHARE) + 1, MAX_PILOT, num_columns)
    pilot_L = torch.arange(num_first, dtype=torch.int64, device=x_RH.device)
    labels_R = labels_R[(labels_R >= 0) & (labels_R < num_columns)]
    pilot_L = torch.cat([pilot_L, labels_R]).unique()
    operand, dtype = operand_dtype(x_RH), accumulation_dtype(x_RH.dtype)
    num_pilots = pilot_L.shape[0]
    # The product has columns beyond them, as `TileShape.multiple` says; nobody reads those.
    pilot_L = torch.nn.functional.pad(pilot_L, (0, -num_pilots % tile_shape(x_RH.device).multiple))
    weight_LH = gather_rows(head.weight_VH, pilot_L).to(operand)
    bias_L = None if head.bias_V is None else head.bias_V[pilot_L[:num_pilots]].to(dtype)
    bounds = []
    for x_rH in x_RH.to(operand).split(1024):
        # In the accumulation dtype: logits rounded to 16 bits would make it an estimate.
        z_rL = x_rH.new_empty(x_rH.shape[0], pilot_L.shape[0], dtype=dtype)
        product(x_rH, weight_LH.t(), z_rL)
        z_rL = z_rL[:, :num_pilots]
        z_rL = (z_rL if bias_L is None else z_rL + bias_L) * head.logit_scale
        if head.softcap is not None:
            z_rL = head.softcap * torch.tanh(z_rL / head.softcap)
        bounds.append(z_rL.logsumexp(dim=1))
    return torch.cat(bounds) if bounds else x_RH.new_empty(0, dtype=dtype)


def select_active(mass_V: Tensor, labels_R: Tensor, active_eps: float, num_shards: int = 1) -> tuple[Tensor, Tensor]:
    """Split the columns of one chunk of rows.

    Cold are the columns with the smallest masses, as many as hold `active_eps / num_shards` per row together; but no
    label, and none that alone may hold more than `active_eps` of any one row.

    Args:
        mass_V: fp32 [V] from the forward pass; NaN and inf mean "do not leave this column out".
        labels_R: int64 [R] columns of the labels; others than [0, V) are ignored.
        active_eps: tolerance.
        num_shards: ranks that share it.

    Returns:
        (bool [V], True = active; fp64 [], the mass per row that the cold columns hold, overestimated as `mass_V` is).
        No device sync.
    """
    num_columns = mass_V.shape[0]
    mass_V = mass_V.double().nan_to_num(nan=float("inf"))
    sorted_V, order_V = mass_V.sort(stable=True)
    num_rows = max(labels_R.shape[0], 1)
    is_active_V = torch.ones(num_columns + 1, dtype=torch.bool, device=mass_V.device)
    is_active_V[order_V] = (sorted_V.cumsum(0) > active_eps / num_shards * num_rows) | (sorted_V > active_eps)
    # A place behind the last column takes the labels that are not here.
    is_here_R = (labels_R >= 0) & (labels_R < num_columns)
    is_active_V[torch.where(is_here_R, labels_R, num_columns)] = True
    is_active_V = is_active_V[:num_columns]
    return is_active_V, torch.where(is_active_V, 0.0, mass_V).sum() / num_rows


def is_too_flat(is_active_CV: Tensor) -> Tensor:
    """Tell, as bool [], whether so many columns are active in some chunk that none is left out. No device sync."""
    return is_active_CV.any(dim=0).double().mean() > FLAT_SHARE


class Activity(NamedTuple):
    """What a forward pass found out about the columns.

    Attributes:
        is_active_CV: bool [C, V], of each chunk of rows.
        summary: fp64 [2]: share of columns that get gradients, and mass per row on the others (overestimated).
    """

    is_active_CV: Tensor
    summary: Tensor


def forward_with_activity(
    engine: Engine,
    x_RH: Tensor,
    head: Head,
    labels_R: Tensor,
    *,
    fields: tuple[str, ...],
    active_eps: float,
    group: ProcessGroup | None,
) -> tuple[Partials, Activity]:
    """Run the forward pass chunk of rows by chunk of rows, and choose each chunk's active columns.

    Args:
        engine: does the pass.
        x_RH: rows [R, H].
        head: the projection.
        labels_R: int64 [R] columns of the labels.
        fields: as in the engine.
        active_eps: mass per row that the cold columns of all shards may hold.
        group: ranks that hold the other shards.

    Returns:
        (partials of this shard, Activity).
    """
    chunks = list(zip(x_RH.split(CHUNK_ROWS), labels_R.split(CHUNK_ROWS), strict=True))
    bound_R = torch.cat([lower_bounds(x_rH, head, labels_r) for x_rH, labels_r in chunks])
    if group is not None:
        # Most rows have their mass on another shard, which this one would overestimate without bound.
        bound_R = merge_bounds(bound_R, group)
    num_shards = 1 if group is None else group.size()
    partials, actives, colds = [], [], []
    for (x_rH, labels_r), bound_r in zip(chunks, bound_R.split(CHUNK_ROWS), strict=True):
        done = engine.forward_rows(x_rH, head, labels_r, fields=fields, bound_R=bound_r, with_cache=False)
        assert done.mass_V is not None
        is_active_V, cold = select_active(done.mass_V, labels_r, active_eps, num_shards)
        partials.append(done.partials.values_FR)
        actives.append(is_active_V)
        colds.append(cold * (x_rH.shape[0] / max(x_RH.shape[0], 1)))
    is_active_CV = torch.stack(actives)
    cold = torch.stack(colds).sum()
    # A shard without columns has no share of them that is active.
    share = is_active_CV.double().mean() if is_active_CV.numel() else torch.zeros_like(cold)
    flat = is_too_flat(is_active_CV)
    summary = torch.stack([torch.where(flat, 1.0, share), torch.where(flat, 0.0, cold)])
    return Partials(fields, torch.cat(partials, dim=1)), Activity(is_active_CV, summary)
