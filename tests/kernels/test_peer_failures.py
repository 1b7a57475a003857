"""Bugs found in other implementations of this operation: each docstring tells the bug that its test would show."""

import math

import pytest
import torch
from head_oracle import assert_matches_reference, oracle, run, tiles
from torch import Tensor

from fastpref import linear_logps
from fastpref.testing.adversarial import (
    ADVERSARIAL,
    IGNORE,
    HeadInputs,
    bad_labels,
    common_offset,
    leading_columns_masked,
    ragged_inputs,
    strongly_negative,
)

pytestmark = pytest.mark.usefixtures("small_tiles")


def test_vocabulary_not_a_multiple_of_the_tile() -> None:
    """verl #2899: the columns that fill up the last tile entered the softmax as logits of 0, +0.19 nat.

    With every logit at -3 the phantom columns would hold most of the probability.
    """
    vocab_size = 33
    hidden_TH, weight_VH = torch.ones(4, 3), torch.full((vocab_size, 3), -1.0)
    result = linear_logps(hidden_TH, weight_VH, torch.arange(4), cu_seqlens=torch.tensor([0, 4]))
    torch.testing.assert_close(result.logps, torch.tensor([-4 * math.log(vocab_size)]))


def test_strongly_negative_logits() -> None:
    """A running maximum that starts at 0 instead of -inf: exp of everything underflows and log(0) follows."""
    result, _ = run(strongly_negative())
    assert result.logps.isfinite().all()
    assert_matches_reference(strongly_negative(), torch.float32)


def test_first_tile_all_masked() -> None:
    """Fault 1: -inf minus -inf in the first tile's online softmax gave NaN for the whole row."""
    inputs = leading_columns_masked()
    with tiles(columns=16):  # three whole tiles without one finite logit
        result, gradients = run(inputs)
        assert result.logps.isfinite().all()
        assert_matches_reference(inputs, torch.float32)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert not gradients["weight"][:48].any()


@pytest.mark.parametrize("label", bad_labels(97))
def test_label_outside_the_vocabulary(label: int) -> None:
    """Fault 5. Apple's CCE reads in front of the weight for label -5, and passes label >= V silently.

    Here that token is NaN, has no gradient, and leaves every other sequence and the memory around the inputs alone.
    """
    inputs = ragged_inputs()
    inputs.labels_SL[0, 3:6] = 11
    clean = inputs._replace(labels_SL=inputs.labels_SL.clone())
    clean.labels_SL[0, 4] = IGNORE
    inputs.labels_SL[0, 4] = label
    guarded = torch.full((97 + 40, 33), float("nan"))
    guarded[20:-20] = inputs.weight_VH
    guards = guarded.clone()
    leaves = [inputs.hidden_SLH.clone().requires_grad_(), guarded[20:-20].requires_grad_()]
    result = linear_logps(*leaves, inputs.labels_SL, stats=("token_logps",))
    expected_leaves = [inputs.hidden_SLH.clone().requires_grad_(), inputs.weight_VH.clone().requires_grad_()]
    expected = linear_logps(*expected_leaves, clean.labels_SL)
    assert result.logps.isnan().tolist() == [True, False, False, False]
    assert torch.equal(result.logps[1:], expected.logps[1:])
    is_bad_R = result.rows == 4
    assert torch.equal(result.token_logps.isnan(), is_bad_R)
    assert result.counts[0] == expected.counts[0] + 1
    gradients = torch.autograd.grad(result.token_logps.sum(), leaves)
    expected_gradients = torch.autograd.grad(expected.logps.sum(), expected_leaves)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert torch.equal(gradient, expected_gradient)
    assert torch.equal(guarded.isnan(), guards.isnan())
    reference = linear_logps(*leaves, inputs.labels_SL, backend="reference", stats=("token_logps",))
    assert torch.equal(reference.token_logps.isnan(), is_bad_R)


def test_every_token_ignored() -> None:
    """Fault 8. A mean over no tokens: ZeroDivisionError in one peer, NaN in the weight's gradient in another."""
    inputs = ragged_inputs()
    inputs = inputs._replace(labels_SL=torch.full_like(inputs.labels_SL, IGNORE))
    for backend in ("torch", "reference"):
        result, gradients = run(inputs, backend)
        assert result.logps.tolist() == [0.0] * 4
        assert result.counts.tolist() == [0] * 4
        assert result.entropy.tolist() == result.hits.tolist() == result.mean_logit.tolist() == [0.0] * 4
        assert not any(gradient.any() for gradient in gradients.values())


def test_count_of_an_empty_sequence_in_a_mean() -> None:
    """Dividing by the count before clamping it makes the weight's gradient NaN for the good sequences too."""
    inputs = ragged_inputs()
    weight_VH = inputs.weight_VH.clone().requires_grad_()
    result = linear_logps(inputs.hidden_SLH, weight_VH, inputs.labels_SL)
    assert result.counts[1] == 0
    (result.logps / result.counts.clamp(min=1)).sum().backward()
    assert weight_VH.grad.isfinite().all()
    assert weight_VH.grad.any()


def test_large_offset_common_to_all_logits() -> None:
    """pytorch #195829: `target - log_sum_exp` with both near 2^15 has no bits left for their difference."""
    inputs = common_offset()
    unshifted, _ = run(inputs._replace(bias_V=None))
    shifted, _ = run(inputs)
    assert torch.equal(shifted.logps, unshifted.logps)
    assert_matches_reference(inputs, torch.float32)


def test_masked_position_of_minus_infinity() -> None:
    """`mask * logp` is NaN where the mask is 0 and the log-prob -inf; masking must select."""
    inputs = ADVERSARIAL["second_mask"]()
    bias_V = torch.zeros(97)
    labels_SL = torch.where(inputs.labels_SL == 3, 4, inputs.labels_SL)
    nll_labels_SL = torch.where(inputs.nll_labels_SL == 3, 4, inputs.nll_labels_SL)
    only_nll = (labels_SL < 0) & (nll_labels_SL >= 0)
    nll_labels_SL[only_nll] = 3
    bias_V[3] = float("-inf")
    hidden_SLH = inputs.hidden_SLH.clone().requires_grad_()
    result = linear_logps(hidden_SLH, inputs.weight_VH, labels_SL, nll_labels=nll_labels_SL, bias=bias_V)
    assert result.nll.isinf().any()
    assert result.logps.isfinite().all()
    result.logps.sum().backward()
    assert hidden_SLH.grad.isfinite().all()


def test_token_axis_beyond_32_bits() -> None:
    """Fault 12: offsets in int32 wrap past 2^31 elements. The token axis here is one row seen 2^31 + 8 times."""
    num_tokens, hidden_size = 2**31 + 8, 4
    hidden_TH = torch.tensor([[1.0, 2.0, 3.0, 4.0]]).expand(num_tokens, hidden_size)
    labels_T = torch.tensor([2]).expand(num_tokens)
    weight_VH = torch.randn(5, hidden_size)
    rows = torch.tensor([num_tokens - 1, 0, 2**31, num_tokens // hidden_size])
    result = linear_logps(hidden_TH, weight_VH, labels_T, rows=rows, cu_rows=torch.tensor([0, 4]))
    expected = 4 * torch.log_softmax(weight_VH @ hidden_TH[0], 0)[2]
    torch.testing.assert_close(result.logps, expected.unsqueeze(0))


def output_gradient(inputs: HeadInputs, pick: str) -> Tensor:
    weight_VH = inputs.weight_VH.clone().requires_grad_()
    result = linear_logps(
        inputs.hidden_SLH, weight_VH, inputs.labels_SL, nll_labels=inputs.nll_labels_SL, stats=("token_logps",)
    )
    values = {"logps": result.logps, "nll": result.nll, "token_logps": result.token_logps}
    (gradient,) = torch.autograd.grad(sum(values[name].sum() for name in pick.split("+")), weight_VH)
    return gradient


def test_gradients_of_every_returned_logp() -> None:
    """Peers return log-probs beside the loss and drop the gradients that come back through them without a word."""
    inputs = ADVERSARIAL["second_mask"]().cast(torch.float64)
    parts = {name: output_gradient(inputs, name) for name in ("logps", "nll", "token_logps")}
    assert all(part.abs().max() > 0.1 for part in parts.values())
    torch.testing.assert_close(parts["logps"], parts["token_logps"])
    torch.testing.assert_close(output_gradient(inputs, "logps+nll+token_logps"), sum(parts.values()))
    nll_only = inputs._replace(labels_SL=inputs.nll_labels_SL, nll_labels_SL=None)
    (expected,) = [run_weight_gradient(nll_only)]
    torch.testing.assert_close(parts["nll"], -expected)


def run_weight_gradient(inputs: HeadInputs) -> Tensor:
    weight_VH = inputs.weight_VH.clone().requires_grad_()
    linear_logps(inputs.hidden_SLH, weight_VH, inputs.labels_SL).logps.sum().backward()
    return weight_VH.grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_accumulate_in_fp32(dtype: torch.dtype) -> None:
    """Gradients summed over many tiles in bf16 carry several times the error of a single rounding at the end.

    64 chunks for hidden and 16 row tiles for the weight; the result may be off by that one rounding and no more.
    """
    inputs = ragged_inputs(8, 32, 16, 512, seed=4).cast(dtype)
    inputs = inputs._replace(labels_SL=inputs.labels_SL.clamp(min=0))
    with tiles(block_rows=8, bwd_rows=16, columns=8):
        _, actual = run(inputs)
    _, exact = run(inputs.cast(torch.float64), "reference")
    half_ulp = torch.finfo(dtype).eps / 2
    for name, gradient in exact.items():
        rounding = half_ulp * gradient.abs() + 1e-5 * gradient.abs().max()
        assert ((actual[name].double() - gradient).abs() <= rounding).all(), name


def test_backward_twice_and_after_a_change_in_place() -> None:
    """Kernels that reuse a gradient buffer are silently wrong on a second backward or after a changed input."""
    inputs = ragged_inputs()
    hidden_SLH, weight_VH = inputs.hidden_SLH.clone().requires_grad_(), inputs.weight_VH.clone().requires_grad_()
    logps = linear_logps(hidden_SLH, weight_VH, inputs.labels_SL).logps.sum()
    first = torch.autograd.grad(logps, (hidden_SLH, weight_VH), retain_graph=True)
    second = torch.autograd.grad(logps, (hidden_SLH, weight_VH), retain_graph=True)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    for changed in (weight_VH, hidden_SLH):
        logps = linear_logps(hidden_SLH, weight_VH, inputs.labels_SL).logps.sum()
        with torch.no_grad():
            changed.mul_(1.5)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            logps.backward()


def test_masks_that_disagree() -> None:
    """A token with two different labels: NaN in both sums rather than one label chosen silently."""
    inputs = ADVERSARIAL["second_mask"]()
    both = ((inputs.labels_SL >= 0) & (inputs.nll_labels_SL >= 0)).nonzero()[0]
    s, t = both.tolist()
    agreeing, _ = run(inputs)
    inputs.nll_labels_SL[s, t] = (inputs.labels_SL[s, t] + 1) % 97
    for backend in ("torch", "reference"):
        result, _ = run(inputs, backend)
        assert result.logps.isnan().nonzero().tolist() == result.nll.isnan().nonzero().tolist() == [[s]]
        assert result.nll_counts.tolist() == agreeing.nll_counts.tolist()


def test_oracle_of_these_tests_is_not_the_package() -> None:
    inputs = ragged_inputs()
    expected = oracle(inputs)
    logps_SLV = torch.log_softmax((inputs.hidden_SLH @ inputs.weight_VH.t()).double(), -1)
    picked_SL = logps_SLV.gather(2, inputs.labels_SL.clamp(min=0).unsqueeze(2)).squeeze(2)
    picked_SL = torch.where(inputs.labels_SL >= 0, picked_SL, 0.0)
    torch.testing.assert_close(torch.tensor(expected["logps"]).double(), picked_SL.sum(1), rtol=1e-5, atol=1e-5)
