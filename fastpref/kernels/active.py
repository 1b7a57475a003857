"""The active columns of a batch: those that hold all but a sliver of the softmax of its rows.

On real text most columns of a large vocabulary have next to no probability at any row of a batch, and next to no
gradient. The forward pass sees every logit once; on the way it adds up each column's mass, `sum over rows of p`. It
does not know the normaliser yet, so it uses a lower bound of it and overestimates the mass. The columns with the
smallest masses whose sum stays below a limit are cold; the rest, and every label, are active. A flat distribution
(an untrained model) has hardly any cold columns, and the backward pass is then the exact one.

Nothing here waits for the device: sizes depend on shapes alone, numbers stay where they are.

Dims: `R` rows, `C` chunks of rows, `H` hidden, `V` vocabulary, `L` pilot columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastpref.kernels.engine import Engine, Head, accumulation_dtype
from fastpref.kernels.outputs import LOGP_FIELDS, Partials
from fastpref.kernels.torch_tiles import tile_shape
from fastpref.kernels.vocab_parallel import merge_bounds

# With more active columns than this share, gathering them costs more than leaving the cold ones out saves.
FLAT_SHARE = 0.75
# Columns of the pilot of the lower bound: a part of all that are there, and one more for so many rows, at most as many
# again or 2048, for labels: on text so many are not among the lowest ids. In small vocabularies at least one for each
# of up to 2048 rows, so that no label is cut off. A tighter bound would leave more out (docs/experiments.md).
PILOT_SHARE, MAX_PILOT, ROWS_PER_LABEL, MAX_LABELS = 1 / 64, 4096, 4, 2048


def mark_labels(labels_R: Tensor, num_columns: int) -> Tensor:
    """Return, as bool [V], which columns are labels; others than [0, V) are none."""
    # Two places behind the last column take the labels that are not here: V, and -1, which counts from the end.
    is_label = torch.zeros(num_columns + 2, dtype=torch.bool, device=labels_R.device)
    return is_label.index_fill_(0, labels_R.clamp(-1, num_columns), True)[:num_columns]


def pilot_columns(is_label_V: Tensor, num_rows: int) -> Tensor:
    """Choose the columns of the pilot: labels, lowest ids first, and then the lowest other ids.

    Tokenizers give low ids to frequent tokens. No column is there twice, or what is meant as a lower bound would count
    it twice; their number is a matter of shapes.

    Returns:
        int64 [L].
    """
    num_columns, multiple = is_label_V.shape[0], tile_shape(is_label_V.device).multiple
    first = min(int(num_columns * PILOT_SHARE) + 1, MAX_PILOT)
    filled = first + min(num_rows // ROWS_PER_LABEL, max(first, MAX_LABELS))
    num_pilots = -(-max(filled, min(num_rows, MAX_LABELS)) // multiple) * multiple
    return is_label_V.view(torch.uint8).argsort(descending=True, stable=True)[:num_pilots]


def lower_bounds(engine: Engine, x_RH: Tensor, head: Head, labels_R: Tensor, pilot_L: Tensor) -> Tensor:
    """Bound each row's log-sum-exp from below by that of some columns.

    Args:
        engine: multiplies.
        x_RH: rows [R, H].
        head: the projection.
        labels_R: int64 [R], of no consequence here.
        pilot_L: int64 [L], the columns, distinct.

    Returns:
        [R] in the accumulation dtype; -inf where there is no column at all.
    """
    bias_L = None if head.bias_V is None else head.bias_V.index_select(0, pilot_L)
    pilot = head._replace(weight_VH=head.weight_VH.index_select(0, pilot_L), bias_V=bias_L)
    done = engine.forward_rows(x_RH, pilot, labels_R, fields=LOGP_FIELDS, bound_R=None, with_cache=False)
    bound_R = x_RH.new_empty(x_RH.shape[0], dtype=accumulation_dtype(x_RH.dtype))
    return torch.add(done.partials["max"], done.partials["sum"].log(), out=bound_R)


class Activity(NamedTuple):
    """What a forward pass found out about the columns.

    Attributes:
        is_active_V: bool [V].
        num_active: int64 [1], their number.
        cold_mass: fp64 [], the mass of the others in all rows, overestimated as the masses are.
    """

    is_active_V: Tensor
    num_active: Tensor
    cold_mass: Tensor


def select_active(
    mass_CV: Tensor, is_label_V: Tensor, num_rows: int, active_eps: float, num_shards: float = 1
) -> Activity:
    """Split the columns: one set for all rows.

    Cold are the columns with the smallest masses, as many as hold `active_eps / num_shards` per row together; but no
    label, and none that alone may hold more than `active_eps` of any one row: its mass in that row's chunk tells.

    Args:
        mass_CV: fp32 [C, V] from the forward pass; NaN and inf mean "do not leave this column out".
        is_label_V: bool [V].
        num_rows: R.
        active_eps: tolerance.
        num_shards: ranks that share it; of a sample, by how many times its columns there are more.
    """
    is_one_chunk = mass_CV.shape[0] == 1
    peak_V = mass_CV[0] if is_one_chunk else mass_CV.amax(dim=0)
    total_V = mass_CV[0] if is_one_chunk else mass_CV.sum(dim=0)
    # A label, or not small (NaN is not): `is_label | ~is_small` in one operation.
    is_needed_V = is_label_V >= (peak_V <= active_eps)
    total_V = total_V.masked_fill(is_needed_V, float("inf"))
    sorted_V, order_V = total_V.sort(stable=True)
    is_over_V = sorted_V.cumsum(0, dtype=torch.float64) > active_eps / num_shards * max(num_rows, 1)
    is_active_V = torch.empty_like(is_needed_V).scatter_(0, order_V, is_over_V)
    cold_mass = total_V.masked_fill_(is_active_V, 0.0).sum(dtype=torch.float64)
    return Activity(is_active_V, is_active_V.sum(dim=0, keepdim=True), cold_mass)


def summary(num_active: Tensor, cold_mass: Tensor, num_rows: int, num_columns: int) -> dict[str, Tensor]:
    """Return the share of columns that get gradients, and the mass per row of the others, each fp64 []."""
    is_flat = (num_active > FLAT_SHARE * num_columns)[0]
    # A shard without columns has no share of them that is active.
    share = num_active[0].double() / max(num_columns, 1)
    return {
        "active_fraction": share.masked_fill(is_flat, 1.0),
        "cold_mass": cold_mass.masked_fill(is_flat, 0.0) / max(num_rows, 1),
    }


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
    """Run the forward pass, and choose the active columns.

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
    num_rows = x_RH.shape[0]
    is_label_V = mark_labels(labels_R, head.weight_VH.shape[0])
    bound_R = lower_bounds(engine, x_RH, head, labels_R, pilot_columns(is_label_V, num_rows))
    if group is not None:
        # Most rows have their mass on another shard, which this one would overestimate without bound.
        bound_R = merge_bounds(bound_R, group)
    done = engine.forward_rows(x_RH, head, labels_R, fields=fields, bound_R=bound_R, with_cache=False)
    assert done.mass_CV is not None
    num_shards = 1 if group is None else group.size()
    return done.partials, select_active(done.mass_CV, is_label_V, num_rows, active_eps, num_shards)
