"""Bitwise promises: a sequence's log-probs depend on the sequence alone, and a run repeats."""

import hashlib
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from head_oracle import STATS, run, tiles
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


def strided_views(inputs: HeadInputs) -> dict[str, HeadInputs]:
    """The same values behind other strides."""
    hidden_SLH, weight_VH, labels_SL = inputs.hidden_SLH, inputs.weight_VH, inputs.labels_SL
    sliced = torch.full((*hidden_SLH.shape[:2], 2 * hidden_SLH.shape[2]), float("nan"), dtype=hidden_SLH.dtype)
    sliced[..., ::2] = hidden_SLH
    offset = torch.full((labels_SL.numel() + 1,), 7)
    offset[1:] = labels_SL.reshape(-1)
    return {
        "hidden transposed": inputs._replace(hidden_SLH=hidden_SLH.transpose(0, 1).contiguous().transpose(0, 1)),
        "hidden every second": inputs._replace(hidden_SLH=sliced[..., ::2]),
        "weight transposed": inputs._replace(weight_VH=weight_VH.t().contiguous().t()),
        "weight inside a wider one": inputs._replace(
            weight_VH=torch.cat([weight_VH, weight_VH], 1)[:, : weight_VH.shape[1]]
        ),
        "labels transposed": inputs._replace(labels_SL=labels_SL.t().contiguous().t()),
        "labels[1:]": inputs._replace(labels_SL=offset[1:].view_as(labels_SL)),
    }


@pytest.mark.parametrize("view", strided_views(ragged_inputs()))
def test_linear_logps_of_strided_inputs(view: str) -> None:
    """Fault 11: equal to contiguous inputs bit for bit, gradients included, and nothing is written to."""
    inputs = batch(48, torch.float32)
    expected, expected_grads = run(inputs)
    strided = strided_views(inputs)[view]
    copies = [tensor.clone() for tensor in strided if isinstance(tensor, Tensor)]
    actual, actual_grads = run(strided)
    assert_same_bits(actual, expected, list(range(7)))
    for name, gradient in expected_grads.items():
        assert torch.equal(actual_grads[name], gradient)
    for tensor, copy in zip((t for t in strided if isinstance(t, Tensor)), copies, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.usefixtures("small_tiles")
def test_linear_logps_with_expanded_upstream_gradient() -> None:
    """Fault 11: the gradient of a sum arrives with stride 0."""
    inputs = ragged_inputs()
    gradients = []
    for upstream in (torch.full((4,), 0.5), torch.tensor(0.5).expand(4)):
        hidden_SLH = inputs.hidden_SLH.clone().requires_grad_()
        result = linear_logps(hidden_SLH, inputs.weight_VH, inputs.labels_SL, stats=("token_logps",))
        token_upstream = upstream[0].expand(result.token_logps.shape)
        torch.autograd.backward((result.logps, result.token_logps), (upstream, token_upstream))
        gradients.append(hidden_SLH.grad)
    assert torch.equal(*gradients)


def test_linear_logps_repeats() -> None:
    """Fault 16: 20 times the same bytes, outputs and gradients."""
    inputs = batch(48, torch.float32, vocab_size=2100)
    expected, expected_grads = run(inputs)
    for _ in range(19):
        actual, actual_grads = run(inputs)
        assert_same_bits(actual, expected, list(range(7)))
        assert all(torch.equal(actual_grads[name], gradient) for name, gradient in expected_grads.items())


DIGEST = """
import hashlib, torch
from fastpref import linear_logps
from fastpref.testing.adversarial import ragged_inputs
torch.set_num_threads(1)
inputs = ragged_inputs(7, 60, 48, 2500, seed=5)
hidden, weight = inputs.hidden_SLH.requires_grad_(), inputs.weight_VH.requires_grad_()
logps = linear_logps(hidden, weight, inputs.labels_SL).logps
logps.sum().backward()
print(hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in (logps, hidden.grad, weight.grad))).hexdigest())
"""


def test_linear_logps_repeats_in_another_process() -> None:
    """Fault 16: a fresh process computes the same bytes as one with a history."""
    fresh = subprocess.run([sys.executable, "-c", DIGEST], capture_output=True, text=True, check=True).stdout.strip()
    torch.randn(500, 500) @ torch.randn(500, 500)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    inputs = ragged_inputs(7, 60, 48, 2500, seed=5)
    hidden, weight = inputs.hidden_SLH.requires_grad_(), inputs.weight_VH.requires_grad_()
    logps = linear_logps(hidden, weight, inputs.labels_SL).logps
    logps.sum().backward()
    torch.set_num_threads(num_threads)
    here = b"".join(tensor.detach().numpy().tobytes() for tensor in (logps, hidden.grad, weight.grad))
    assert hashlib.sha256(here).hexdigest() == fresh
