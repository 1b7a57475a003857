"""The screened forward pass: eight bits find the columns that matter, and those are multiplied exactly.

1. An exact pilot bounds each row's log-sum-exp from below, and a sample of columns tells a flat distribution, which has
   nothing to leave out and gets the exact pass instead.
2. All columns are multiplied in int8 (`screening`): their masses choose the active ones, as in an exact pass.
3. The active columns are multiplied exactly. Their int8 part is taken out of the sums, and the exact one put in.

What stays in int8 is the probability of the columns that are left out, at most `active_eps` of a row on average; the
logit of a label and the largest logits are exact. Every row's active columns are those of the whole call, so the last
bits of a row depend on what else is in the batch.

Dims: `R` rows, `H` hidden, `V` vocabulary, `A` active columns, `L` pilot columns, `N` sampled columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from fastpref.kernels.active import FLAT_SHARE, Activity, lower_bounds, mark_labels, pilot_columns, select_active
from fastpref.kernels.engine import Engine, Head, Int8Head, Int8Rows
from fastpref.kernels.outputs import LOGP_FIELDS, Partials
from fastpref.kernels.partials import finite_shift
from fastpref.kernels.rows import is_recorded
from fastpref.kernels.schedule import selected_columns
from fastpref.kernels.screening import quantise_rows, stale
from fastpref.kernels.torch_tiles import tile_shape
from fastpref.kernels.vocab_parallel import merge_bounds

# Share of columns that are expected to be active: with more, the int8 products and the exact ones of the active columns
# cost more than an exact pass.
MOST_EXPECTED = 0.5
SAMPLED = 1024
# Of a smaller vocabulary pilot and sample are too large a part.
LEAST_COLUMNS = 4 * SAMPLED


class Screened(NamedTuple):
    """What a screened pass leaves.

    Attributes:
        partials: of this shard.
        activity: its active columns; without a backward pass all of them where the exact pass took its place.
        is_exact: the exact pass took its place.
    """

    partials: Partials
    activity: Activity
    is_exact: bool


def forward_screened(
    engine: Engine,
    x_RH: Tensor,
    head: Head,
    labels_R: Tensor,
    columns: Int8Rows | None,
    *,
    fields: tuple[str, ...],
    active_eps: float,
    needs_gradient: bool,
    can_compare: bool,
    group: ProcessGroup | None,
) -> Screened:
    """Run the screened forward pass.

    Args:
        engine: does the products.
        x_RH: rows [R, H].
        head: the projection.
        labels_R: int64 [R] columns of the labels.
        columns: int8 form of the weight; None makes it here.
        fields: as in the engine.
        active_eps: mass per row that the columns of all shards that stay in int8 may hold.
        needs_gradient: a backward pass follows, which leaves out the same columns.
        can_compare: `columns` is of these very weights.
        group: ranks that hold the other shards.

    Raises:
        ValueError: `columns` is of another weight, or a CUDA graph is recorded.
    """
    if is_recorded(x_RH):
        raise ValueError(
            "forward='screened' waits for the device to learn which columns matter, which a CUDA graph cannot record; "
            "use forward='exact' in the graph"
        )
    num_rows, num_columns = x_RH.shape[0], head.weight_VH.shape[0]
    is_label_V = mark_labels(labels_R, num_columns)
    pilot_L = pilot_columns(is_label_V, num_rows)
    bound_R = lower_bounds(engine, x_RH, head, labels_R, pilot_L)
    if group is not None:
        bound_R = merge_bounds(bound_R, group)
    num_shards = 1 if group is None else group.size()
    run = _Pass(engine, x_RH, head, labels_R, is_label_V, bound_R, fields, active_eps, num_shards)
    is_hopeless = is_stale = torch.zeros((), dtype=torch.bool, device=x_RH.device)
    if columns is not None and can_compare:
        is_stale = _differs(columns, head.weight_VH, pilot_L)
        if group is not None:  # all of them raise, or none
            dist.all_reduce(is_stale := is_stale.long(), group=group)
    is_large = num_rows > 0 and num_columns >= LEAST_COLUMNS
    if is_large:
        rows = quantise_rows(x_RH)
        is_hopeless = run.looks_flat() | ~bound_R.isfinite().all() | rows.scales_N.isnan().any()
    is_hopeless, is_stale = torch.stack([is_hopeless.long(), is_stale.long()]).tolist()
    if is_stale:
        raise stale()
    if is_hopeless or not is_large:
        return run.exact(needs_gradient)
    return run.screened(rows, columns or quantise_rows(head.weight_VH), needs_gradient)


class _Pass(NamedTuple):
    """One forward pass; see `forward_screened`."""

    engine: Engine
    x_RH: Tensor
    head: Head
    labels_R: Tensor
    is_label_V: Tensor
    bound_R: Tensor
    fields: tuple[str, ...]
    active_eps: float
    num_shards: int

    def looks_flat(self) -> Tensor:
        """Guess from a sample whether so many columns are active that screening does not pay: bool []."""
        num_columns = self.head.weight_VH.shape[0]
        places_N = torch.arange(SAMPLED, dtype=torch.int64, device=self.x_RH.device) * (num_columns // SAMPLED)
        sample = _take(self.head, places_N)
        nowhere_R = torch.full_like(self.labels_R, -1)
        done = self.engine.forward_rows(
            self.x_RH, sample, nowhere_R, fields=LOGP_FIELDS, bound_R=self.bound_R, with_cache=False
        )
        assert done.mass_CV is not None
        # Each stands for as many others of its mass, so they may leave out less, as a shard may. What one column may
        # hold of a row stays what it is.
        nothing_N, share = torch.zeros_like(places_N, dtype=torch.bool), self.num_shards * num_columns / SAMPLED
        found = select_active(done.mass_CV, nothing_N, self.x_RH.shape[0], self.active_eps, share)
        return (found.num_active > MOST_EXPECTED * SAMPLED).squeeze(0)

    def exact(self, needs_gradient: bool) -> Screened:
        """Run the exact pass in the place of the screened one."""
        num_columns = self.head.weight_VH.shape[0]
        bound_R = self.bound_R if needs_gradient else None
        done = self.engine.forward_rows(
            self.x_RH, self.head, self.labels_R, fields=self.fields, bound_R=bound_R, with_cache=False
        )
        if done.mass_CV is not None:
            return Screened(done.partials, self.choose(done.mass_CV), True)
        everything_V = torch.ones_like(self.is_label_V)
        nothing = everything_V.new_zeros((), dtype=torch.float64)
        num_active = nothing.new_full((1,), num_columns).long()
        return Screened(done.partials, Activity(everything_V, num_active, nothing), True)

    def choose(self, mass_CV: Tensor) -> Activity:
        """Choose the active columns."""
        return select_active(mass_CV, self.is_label_V, self.x_RH.shape[0], self.active_eps, self.num_shards)

    def screened(self, rows: Int8Rows, columns: Int8Rows, needs_gradient: bool) -> Screened:
        """Multiply everything in int8, and what is active exactly."""
        head, labels_R, fields = self.head, self.labels_R, self.fields
        bias_V = None if head.bias_V is None else head.bias_V.float()
        int8_head = Int8Head(columns, bias_V, head.logit_scale, head.softcap)
        nowhere_R = torch.full_like(labels_R, -1)
        everything = self.engine.screen_rows(rows, int8_head, nowhere_R, fields=fields, bound_R=self.bound_R.float())
        assert everything.mass_CV is not None
        activity = self.choose(everything.mass_CV)
        is_unfit = columns.scales_N.isnan().any() if columns.scales_N.numel() else torch.zeros_like(activity.num_active)
        num_active, is_unfit = torch.stack([activity.num_active[0], is_unfit.long().reshape(())]).tolist()
        if is_unfit or num_active > FLAT_SHARE * head.weight_VH.shape[0]:
            return self.exact(needs_gradient)
        multiple = tile_shape(labels_R.device).multiple
        chosen = selected_columns(activity.is_active_V, num_active, labels_R, multiple, is_shard=True)
        ids_A = chosen.ids_A
        assert ids_A is not None
        int8_part = Int8Head(
            Int8Rows(*(values.index_select(0, ids_A) for values in columns)),
            None if bias_V is None else bias_V.index_select(0, ids_A),
            head.logit_scale,
            head.softcap,
        )
        screened = self.engine.screen_rows(rows, int8_part, nowhere_R, fields=fields, bound_R=None).partials
        exact = self.engine.forward_rows(
            self.x_RH, _take(head, ids_A), chosen.labels_R, fields=fields, bound_R=None, with_cache=False
        )
        return Screened(_exchange(everything.partials, screened, exact.partials), activity, False)


def _take(head: Head, places: Tensor) -> Head:
    """Return the head of some columns."""
    bias_V = None if head.bias_V is None else head.bias_V.index_select(0, places)
    return head._replace(weight_VH=head.weight_VH.index_select(0, places), bias_V=bias_V)


def _differs(columns: Int8Rows, weight_VH: Tensor, places_L: Tensor) -> Tensor:
    """Tell whether the int8 form of some columns is not that of these weights: bool []."""
    anew = quantise_rows(weight_VH.index_select(0, places_L))
    values_LH, scales_L = (values.index_select(0, places_L) for values in columns)
    is_other_L = (scales_L != anew.scales_N) & ~(scales_L.isnan() & anew.scales_N.isnan())
    return is_other_L.any() | (values_LH != anew.values_NH).any()


def _exchange(everything: Partials, part: Partials, exact: Partials) -> Partials:
    """Take a part of the columns out of the sums over all, and put the exact sums over it in.

    Args:
        everything: int8, of all columns.
        part: int8, of the active ones.
        exact: exact, of the active ones; the largest logit is among them.
    """
    fields = everything.fields
    result = Partials(fields, torch.empty_like(everything.values_FR))
    # Without an active column (a shard that holds none) the largest in int8 has to do.
    max_R = torch.where(exact["max"] == float("-inf"), everything["max"], exact["max"])
    shift_R = finite_shift(max_R)
    result["max"], result["target"] = max_R, exact["target"]
    left_R = (_sum_at(shift_R, everything) - _sum_at(shift_R, part)).clamp_(min=0.0)
    result["sum"] = left_R + _sum_at(shift_R, exact)
    if "moment" in fields:
        left_R = _moment_at(shift_R, everything) - _moment_at(shift_R, part)
        result["moment"] = left_R + _moment_at(shift_R, exact)
    if "total" in fields:
        result["total"] = everything["total"] - part["total"] + exact["total"]
    if "size" in fields:
        result["size"] = everything["size"]
    return result


def _factor(shift_R: Tensor, partials: Partials) -> Tensor:
    return (finite_shift(partials["max"]) - shift_R).exp()


def _sum_at(shift_R: Tensor, partials: Partials) -> Tensor:
    """Return the sum of exponentials about another shift."""
    return torch.where(partials["sum"] == 0, 0.0, _factor(shift_R, partials) * partials["sum"])


def _moment_at(shift_R: Tensor, partials: Partials) -> Tensor:
    """Return the sum of `exp(z - shift) * (z - shift)` about another shift."""
    gap_R = finite_shift(partials["max"]) - shift_R
    moment_R = _factor(shift_R, partials) * (partials["moment"] + gap_R * partials["sum"])
    return torch.where(partials["sum"] == 0, 0.0, moment_R)
