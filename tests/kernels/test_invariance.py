"""Bitwise promises: a sequence's log-probs depend on the sequence alone, and a run repeats."""

from itertools import pairwise

import pytest
import torch
from head_oracle import STATS, tiles
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastpref import SequenceLogps, linear_logps
from fastpref.testing.adversarial import IGNORE, HeadInputs, ragged_inputs

SUMS = ("logps", "counts", "entropy", "hits", "mean_logit")


def batch(hidden_size: int, dtype: torch.dtype, vocab_size: int = 2500) -> HeadInputs:
    """Seven sequences whose rows cross two blocks of the shipped tile size."""
    inputs = ragged_inputs(7, 60, hidden_size, vocab_size, seed=hidden_size).cast(dtype)
    inputs.labels_SL[3, 5:] = 17
    return inputs


def score(inputs: HeadInputs, **options: Tensor) -> SequenceLogps:
    return linear_logps(inputs.hidden_SLH, inputs.weight_VH, inputs.labels_SL, stats=STATS, backend="torch", **options)


def assert_same_bits(actual: SequenceLogps, expected: SequenceLogps, order: list[int]) -> None:
    for name in SUMS:
        assert torch.equal(getattr(actual, name), getattr(expected, name)[order]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hidden_size", [1, 33, 256, 641])
def test_linear_logps_of_a_sequence_ignores_its_neighbours(hidden_size: int, dtype: torch.dtype) -> None:
    """The policy and its own reference give a margin of exactly 0 whatever batches they were scored in."""
    inputs = batch(hidden_size, dtype)
    together = score(inputs)
    for order in ([4], [6, 3], [5, 4, 3, 2, 1, 0, 6]):
        some = inputs._replace(hidden_SLH=inputs.hidden_SLH[order], labels_SL=inputs.labels_SL[order])
        assert_same_bits(score(some), together, order)


@given(data=st.data(), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_linear_logps_of_any_selection_of_sequences(data: st.DataObject, seed: int) -> None:
    inputs = ragged_inputs(5, 13, 33, 97, seed)
    order = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=8))
    with tiles():
        together = score(inputs)
        some = inputs._replace(hidden_SLH=inputs.hidden_SLH[order], labels_SL=inputs.labels_SL[order])
        assert_same_bits(score(some), together, order)


def packed(inputs: HeadInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Unpadded tokens, labels, and bounds: sequence s keeps its first 40 + 2 s tokens."""
    lengths = [40 + 2 * s for s in range(inputs.labels_SL.shape[0])]
    hidden_TH = torch.cat([inputs.hidden_SLH[s, :length] for s, length in enumerate(lengths)])
    labels_T = torch.cat([inputs.labels_SL[s, :length] for s, length in enumerate(lengths)])
    for s, length in enumerate(lengths):
        inputs.labels_SL[s, length:] = IGNORE
    return hidden_TH, labels_T, torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_logps_packed_equals_padded(dtype: torch.dtype) -> None:
    inputs = batch(48, dtype)
    hidden_TH, labels_T, cu_seqlens = packed(inputs)
    padded = score(inputs)
    flat = linear_logps(hidden_TH, inputs.weight_VH, labels_T, cu_seqlens=cu_seqlens, stats=STATS)
    assert_same_bits(flat, padded, list(range(7)))
    assert torch.equal(flat.token_logps, padded.token_logps)


def test_linear_logps_sequence_major_rows_equal_padded() -> None:
    """Megatron's [L, S, H]: rows that jump through the token axis, in an order of the caller's own."""
    inputs = batch(48, torch.float32)
    num_sequences, length = inputs.labels_SL.shape
    padded = score(inputs)
    groups = []
    for s in range(num_sequences):
        positions = (inputs.labels_SL[s] != IGNORE).nonzero().squeeze(1)
        groups.append(positions * num_sequences + s)
    hidden_TH = inputs.hidden_SLH.transpose(0, 1).reshape(num_sequences * length, -1).requires_grad_()
    cu_rows = torch.tensor([0, *map(len, groups)]).cumsum(0)
    flat = linear_logps(
        hidden_TH,
        inputs.weight_VH,
        inputs.labels_SL.t().reshape(-1),
        rows=torch.cat(groups),
        cu_rows=cu_rows,
        stats=STATS,
    )
    assert_same_bits(flat, padded, list(range(num_sequences)))
    backwards = torch.cat([group.flip(0) for group in groups])
    labels_T = inputs.labels_SL.t().reshape(-1)
    flipped = linear_logps(
        hidden_TH, inputs.weight_VH, labels_T, rows=backwards, cu_rows=cu_rows, stats=("token_logps",)
    )
    assert torch.equal(flipped.rows, backwards)
    for start, stop in pairwise(cu_rows.tolist()):
        assert torch.equal(flipped.token_logps[start:stop].flip(0), flat.token_logps[start:stop])


def test_linear_logps_row_given_twice_gets_both_gradients() -> None:
    """The last token of a shared prompt predicts the first token of either response."""
    inputs = ragged_inputs(1, 6, 16, 50).cast(torch.float64)
    hidden_TH = inputs.hidden_SLH[0].requires_grad_()
    labels_T = torch.arange(6)
    rows, cu_rows = torch.tensor([1, 2, 1, 4]), torch.tensor([0, 2, 4])
    result = linear_logps(hidden_TH, inputs.weight_VH, labels_T, rows=rows, cu_rows=cu_rows)
    (gradient,) = torch.autograd.grad((result.logps * torch.tensor([2.0, 3.0])).sum(), hidden_TH)
    logps_TV = torch.log_softmax(hidden_TH @ inputs.weight_VH.t(), dim=1)
    expected = 2 * (logps_TV[1, 1] + logps_TV[2, 2]) + 3 * (logps_TV[1, 1] + logps_TV[4, 4])
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, hidden_TH)[0])
