"""What `linear_logps` accepts and refuses, special values, and what a failure may not touch."""

import re

import pytest
import torch
from head_oracle import run

from fastpref import linear_logps
from fastpref.errors import MissingDependencyError
from fastpref.testing.adversarial import ragged_inputs

HIDDEN_SLH, WEIGHT_VH = torch.randn(2, 3, 4), torch.randn(7, 4)
LABELS_SL = torch.tensor([[1, 2, -100], [-100, 0, 6]])
FLAT = {"hidden": HIDDEN_SLH.flatten(0, 1), "labels": LABELS_SL.flatten()}
ROWS = {"rows": torch.tensor([0, 1, 4, 5]), "cu_rows": torch.tensor([0, 2, 4])}

# argument changes, error, what the message must say
REFUSALS = {
    "hidden no tensor": ({"hidden": [[1.0]]}, TypeError, "hidden must be a torch.Tensor, got list"),
    "hidden integers": ({"hidden": HIDDEN_SLH.long()}, TypeError, "hidden must be float32, .* got torch.int64"),
    "hidden 1-D": ({"hidden": torch.randn(4)}, ValueError, r"hidden must be \[T, H\] or \[S, L, H\], got shape \(4,\)"),
    "weight dtype": ({"weight": WEIGHT_VH.bfloat16()}, TypeError, "weight and hidden must have one dtype.*cast"),
    "weight shape": ({"weight": WEIGHT_VH.t()}, ValueError, r"H = 4 .* got shape \(4, 7\); .*not its transpose"),
    "weight empty": ({"weight": WEIGHT_VH[:0]}, ValueError, "at least one row.*V = 0"),
    "weight device": (
        {"weight": WEIGHT_VH.to("meta")},
        ValueError,
        "weight must be on the device of hidden, cpu, got meta",
    ),
    "bias shape": ({"bias": torch.randn(6)}, ValueError, r"bias must be \[V\] with V = 7"),
    "bias dtype": ({"bias": torch.randn(7).double()}, TypeError, "bias and hidden must have one dtype"),
    "labels int32": (
        {"labels": LABELS_SL.int()},
        TypeError,
        r"labels must be int64.*got torch.int32; use labels.long\(\)",
    ),
    "labels with grad": (
        {"labels": LABELS_SL.float().requires_grad_()},
        TypeError,
        "labels must be int64 .*without grad",
    ),
    "labels shape": ({"labels": LABELS_SL[:, 1:]}, ValueError, r"labels must have one label per token, shape \(2, 3\)"),
    "labels device": ({"labels": LABELS_SL.to("meta")}, ValueError, "labels must be on the device of hidden"),
    "nll_labels shape": ({"nll_labels": LABELS_SL[:1]}, ValueError, "nll_labels must have one label per token"),
    "nll_labels dtype": ({"nll_labels": LABELS_SL.int()}, TypeError, "nll_labels must be int64"),
    "cu_seqlens with padded": ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, "cu_seqlens is for packed hidden"),
    "flat without bounds": ({**FLAT}, ValueError, "needs the sequence bounds; pass cu_seqlens"),
    "rows alone": ({"rows": ROWS["rows"]}, ValueError, "rows without cu_rows; pass both or neither"),
    "cu_rows alone": ({"cu_rows": ROWS["cu_rows"]}, ValueError, "cu_rows without rows"),
    "rows and cu_seqlens": ({**FLAT, **ROWS, "cu_seqlens": torch.tensor([0, 6])}, ValueError, "both describe"),
    "rows int32": ({**ROWS, "rows": ROWS["rows"].int()}, TypeError, "rows must be torch.int64, got torch.int32"),
    "rows 2-D": ({**ROWS, "rows": ROWS["rows"][None]}, ValueError, r"rows must be \[R\], got shape \(1, 4\)"),
    "rows too large": (
        {**ROWS, "rows": torch.tensor([0, 1, 6, 5])},
        ValueError,
        r"rows must be in \[0, 6\).*rows\[2\] = 6",
    ),
    "rows negative": ({**ROWS, "rows": torch.tensor([0, -1, 4, 5])}, ValueError, r"rows\[1\] = -1"),
    "cu_rows empty": (
        {**ROWS, "cu_rows": torch.tensor([], dtype=torch.int64)},
        ValueError,
        r"cu_rows must be \[S\+1\]",
    ),
    "cu_rows short": ({**ROWS, "cu_rows": torch.tensor([0, 2, 3])}, ValueError, "cu_rows must start at 0.*end at 4"),
    "cu_rows late": ({**ROWS, "cu_rows": torch.tensor([1, 2, 4])}, ValueError, "cu_rows must start at 0"),
    "cu_rows back": ({**ROWS, "cu_rows": torch.tensor([0, 3, 2, 4])}, ValueError, "never decrease"),
    "cu_rows float": (
        {**ROWS, "cu_rows": torch.tensor([0.0, 4.0])},
        TypeError,
        "cu_rows must be torch.int32 or torch.int64",
    ),
    "cu_seqlens short": ({**FLAT, "cu_seqlens": torch.tensor([0, 5])}, ValueError, "cu_seqlens must start .* end at 6"),
    "logit_scale tensor": ({"logit_scale": torch.tensor(1.0)}, TypeError, "logit_scale must be a Python number"),
    "logit_scale nan": ({"logit_scale": float("nan")}, ValueError, "logit_scale must be finite, got nan"),
    "softcap zero": ({"softcap": 0.0}, ValueError, "softcap must be > 0"),
    "softcap inf": ({"softcap": float("inf")}, ValueError, "softcap must be finite"),
    "ignore_index": ({"ignore_index": None}, TypeError, "ignore_index must be an int"),
    "stats string": ({"stats": "entropy"}, TypeError, r"stats=\('entropy',\)"),
    "stats unknown": ({"stats": ("entrpy",)}, ValueError, "did you mean 'entropy'"),
    "backend unknown": ({"backend": "torhc"}, ValueError, "backend must be one of .* did you mean 'torch'"),
    "backend triton in fp64": (
        {"backend": "triton", "hidden": HIDDEN_SLH.double(), "weight": WEIGHT_VH.double()},
        (ValueError, MissingDependencyError),
        "backend='triton' .*use backend='torch'",
    ),
    "backward unknown": ({"backward": "exat"}, ValueError, "did you mean 'exact'"),
    "backward active on reference": (
        {"backend": "reference", "backward": "active"},
        ValueError,
        "backend='reference' keeps the logits.*use backward='auto'",
    ),
    "reference recomputing": ({"backend": "reference", "backward": "recompute"}, ValueError, "keeps the logits"),
    "cached with a softcap": ({"backward": "cached", "softcap": 30.0}, ValueError, "softcap=30.0.*backward='exact'"),
    "unused active_eps": ({"active_eps": 1e-3}, ValueError, "active_eps is used by backward='active' only, got 0.001"),
    "active_eps too large": ({"backward": "active", "active_eps": 1}, ValueError, r"active_eps must be in \(0, 1\)"),
    "active_eps tensor": (
        {"backward": "active", "active_eps": torch.tensor(0.1)},
        TypeError,
        "active_eps must be a Python number, got Tensor",
    ),
    "unused cache_bytes": (
        {"backward": "active", "cache_bytes": 1},
        ValueError,
        "cache_bytes is used by backward='cached' and 'exact' only, got 1",
    ),
    "cache_bytes of fp32": (
        {"backward": "exact", "cache_bytes": 10},
        ValueError,
        "for bf16 and fp16 inputs without a softcap only, got 10 with torch.float32",
    ),
    "cache_bytes float": ({"cache_bytes": 1e9}, TypeError, "cache_bytes must be an int, got 1000000000.0"),
    "cache_bytes negative": ({"cache_bytes": -1}, ValueError, "cache_bytes must be >= 0, got -1"),
    "stats of another plan": (
        {"stats": ("active_fraction",)},
        ValueError,
        "'active_fraction' describes backward='active', got backward='auto' with torch.float32",
    ),
    "main_grad dtype": (
        {"weight": WEIGHT_VH.clone().requires_grad_(), "main_grad": torch.zeros(7, 4, dtype=torch.bfloat16)},
        ValueError,
        r"main_grad must have the shape of weight, \(7, 4\), in fp32",
    ),
    "main_grad of a frozen weight": ({"main_grad": torch.zeros(7, 4)}, ValueError, "requires_grad=False; leave it out"),
    "main_grad on reference": (
        {"backend": "reference", "main_grad": torch.zeros(7, 4), "weight": WEIGHT_VH.clone().requires_grad_()},
        ValueError,
        "backend='reference' has not",
    ),
    "vocab_start alone": ({"vocab_start": 0}, ValueError, "vocab_start .* needs tp_group"),
    "vocab_start type": ({"vocab_start": 1.5}, TypeError, "vocab_start must be an int"),
    "sequence_parallel alone": (
        {**FLAT, **ROWS, "sequence_parallel": True},
        ValueError,
        "sequence_parallel .* needs tp_group",
    ),
    "sequence_parallel padded": ({"sequence_parallel": True}, ValueError, r"slice of the flat token axis, \[T/P, H\]"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_linear_logps_refuses(case: str) -> None:
    """Fault 14: argument, rule, what was given and the remedy, before any work."""
    changes, error, message = REFUSALS[case]
    arguments = {"hidden": HIDDEN_SLH, "weight": WEIGHT_VH, "labels": LABELS_SL, **changes}
    with pytest.raises(error, match=re.compile(message, re.DOTALL)):
        linear_logps(**arguments)


@pytest.mark.parametrize("backward", ["auto", "exact", "recompute"])
def test_linear_logps_exact_plans_agree(backward: str) -> None:
    inputs = ragged_inputs()
    expected, expected_grads = run(inputs)
    actual, grads = run(inputs, "auto", backward=backward)
    assert torch.equal(actual.logps, expected.logps)
    assert all(torch.equal(grads[name], gradient) for name, gradient in expected_grads.items())


def test_linear_logps_ignore_index_inside_the_vocabulary() -> None:
    inputs = ragged_inputs()
    zero_ignored = torch.where(inputs.labels_SL == -100, 0, inputs.labels_SL.clamp(min=1))
    expected = linear_logps(
        inputs.hidden_SLH, inputs.weight_VH, torch.where(zero_ignored == 0, -100, zero_ignored), stats=("token_logps",)
    )
    actual = linear_logps(inputs.hidden_SLH, inputs.weight_VH, zero_ignored, ignore_index=0, stats=("token_logps",))
    assert torch.equal(actual.token_logps, expected.token_logps)
    assert torch.equal(actual.counts, expected.counts)


def test_linear_logps_given_rows_without_a_label() -> None:
    """Rows that the caller lists but neither mask labels count for nothing."""
    inputs = ragged_inputs()
    flat_T = inputs.labels_SL.flatten()
    rows, cu_rows = torch.arange(36), torch.arange(0, 37, 9)
    result = linear_logps(
        inputs.hidden_SLH, inputs.weight_VH, inputs.labels_SL, rows=rows, cu_rows=cu_rows, stats=("token_logps",)
    )
    expected = linear_logps(inputs.hidden_SLH, inputs.weight_VH, inputs.labels_SL)
    assert torch.equal(result.logps, expected.logps)
    assert torch.equal(result.counts, expected.counts)
    assert torch.equal(result.token_logps == 0, flat_T == -100)


def test_linear_logps_statistics_have_no_gradient() -> None:
    inputs = ragged_inputs()
    hidden_SLH = inputs.hidden_SLH.clone().requires_grad_()
    for backend in ("torch", "reference"):
        result = linear_logps(
            hidden_SLH,
            inputs.weight_VH,
            inputs.labels_SL,
            stats=("token_logps", "entropy", "hits", "mean_logit"),
            backend=backend,
        )
        assert result.logps.requires_grad
        assert result.token_logps.requires_grad
        assert not any(values.requires_grad for values in (result.entropy, result.hits, result.mean_logit))


def test_linear_logps_returns_what_was_asked_for() -> None:
    inputs = ragged_inputs()
    result = linear_logps(inputs.hidden_SLH, inputs.weight_VH, inputs.labels_SL, stats=("hits",))
    assert result.hits is not None
    absent = (result.token_logps, result.nll, result.nll_counts, result.entropy, result.mean_logit)
    assert absent == (None,) * 5
    assert result.logps.dtype == torch.float32
    assert result.counts.dtype == torch.int64
    narrow = inputs.cast(torch.bfloat16)
    assert linear_logps(narrow.hidden_SLH, narrow.weight_VH, narrow.labels_SL).logps.dtype == torch.float32


@pytest.mark.usefixtures("small_tiles")
def test_linear_logps_under_autocast() -> None:
    """Autocast must not reach into the tiles and round fp32 logits."""
    inputs = ragged_inputs()
    expected, expected_grads = run(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        actual, gradients = run(inputs)
    assert torch.equal(actual.logps, expected.logps)
    assert all(torch.equal(gradients[name], gradient) for name, gradient in expected_grads.items())


def test_linear_logps_under_inference_mode_and_no_grad() -> None:
    inputs = ragged_inputs()
    weight_VH = inputs.weight_VH.clone().requires_grad_()
    expected = linear_logps(inputs.hidden_SLH, weight_VH, inputs.labels_SL).logps
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            logps = linear_logps(inputs.hidden_SLH, weight_VH, inputs.labels_SL).logps
        assert not logps.requires_grad
        assert torch.equal(logps, expected)
