"""Forward and gradient of the tiled backend against the fp64 reference; the reference against the formula."""

import pytest
import torch
from head_oracle import OUTPUTS, STATS, assert_matches_reference, flatten, oracle, run, tiles
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpref import linear_logps
from fastpref.testing.adversarial import ADVERSARIAL, HeadInputs, ragged_inputs
from fastpref.testing.numerics import assert_within_rule, max_error

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("case", ADVERSARIAL)
def test_reference_equals_the_formula(case: str) -> None:
    inputs = ADVERSARIAL[case]().cast(torch.float64)
    expected = oracle(inputs)
    result, _ = run(inputs, "reference")
    assert result.counts.tolist() == expected["counts"]
    if inputs.nll_labels_SL is not None:
        assert result.nll_counts.tolist() == expected["nll_counts"]
    for name in OUTPUTS:
        values = getattr(result, name)
        if values is not None:
            torch.testing.assert_close(values, torch.tensor(expected[name], dtype=torch.float64))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ADVERSARIAL)
def test_linear_logps_on_adversarial_inputs(case: str, dtype: str) -> None:
    assert_matches_reference(ADVERSARIAL[case](), DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_logps_across_tiles_of_the_shipped_size(dtype: str) -> None:
    """300 rows and 4103 columns: three row blocks and three chunks, the last of each ragged."""
    inputs = ragged_inputs(num_sequences=6, length=100, hidden_size=48, vocab_size=4103, seed=3)
    labels_SL = torch.where(inputs.labels_SL < 0, 4102, inputs.labels_SL)
    labels_SL[:, :50] = -100
    assert_matches_reference(inputs._replace(labels_SL=labels_SL), DTYPES[dtype])


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("case", ["ragged_inputs", "scaled_and_capped", "second_mask"])
def test_linear_logps_of_16_bit_inputs_keeps_fp32_logits(case: str, dtype: str) -> None:
    """Logits rounded to the inputs' dtype cost 0.02 nat per token; here only the inputs are rounded."""
    inputs = ADVERSARIAL[case]().cast(DTYPES[dtype])
    actual, _ = run(inputs)
    widened, _ = run(inputs.cast(torch.float32), "reference")
    wide, _ = run(inputs.cast(torch.float64), "reference")
    for name in OUTPUTS:
        if getattr(wide, name) is not None:
            assert_within_rule(getattr(actual, name), getattr(widened, name), getattr(wide, name))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("vocab_size", [1, 97, 257, 1000])
@pytest.mark.parametrize("num_tokens", [1, 17, 63])
@pytest.mark.parametrize("hidden_size", [1, 33, 48])
def test_linear_logps_on_odd_sizes(num_tokens: int, hidden_size: int, vocab_size: int) -> None:
    """Fault 10."""
    inputs = ragged_inputs(1, num_tokens, hidden_size, vocab_size, seed=num_tokens)
    inputs = inputs._replace(labels_SL=inputs.labels_SL.clamp(min=0))
    assert_matches_reference(inputs, torch.float32)


@given(
    num_sequences=st.integers(1, 5),
    length=st.integers(1, 17),
    hidden_size=st.sampled_from([1, 2, 7, 33, 48]),
    vocab_size=st.sampled_from([1, 2, 31, 32, 33, 63, 64, 65, 97, 257]),
    seed=st.integers(0, 2**20),
    capped=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_linear_logps_on_any_size(
    num_sequences: int, length: int, hidden_size: int, vocab_size: int, seed: int, capped: bool
) -> None:
    """Sizes around whole tiles of 8 rows and 32 columns, in fp64, where nothing but a wrong index can show."""
    inputs = ragged_inputs(num_sequences, length, hidden_size, vocab_size, seed).cast(torch.float64)
    if capped:
        bias_V = torch.linspace(-1.0, 1.0, vocab_size, dtype=torch.float64)
        inputs = inputs._replace(bias_V=bias_V, logit_scale=1.7, softcap=8.0)
    with tiles():
        actual = flatten(*run(inputs))
    for name, values in flatten(*run(inputs, "reference")).items():
        torch.testing.assert_close(actual[name], values)


def losses(inputs: HeadInputs, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple:
    result = linear_logps(
        hidden,
        weight,
        inputs.labels_SL,
        nll_labels=inputs.nll_labels_SL,
        bias=bias,
        logit_scale=inputs.logit_scale,
        softcap=inputs.softcap,
        stats=("token_logps",),
        backend="torch",
    )
    return tuple(values for values in (result.logps, result.nll, result.token_logps) if values is not None)


@pytest.mark.parametrize("case", ["ragged_inputs", "scaled_and_capped", "second_mask"])
def test_linear_logps_gradient_by_finite_differences(case: str) -> None:
    """Fault 15: every output, every input, fp64, across tile boundaries."""
    inputs = ADVERSARIAL[case]()
    small = HeadInputs(
        inputs.hidden_SLH[:, :3, :4],
        inputs.weight_VH[:11, :4],
        torch.where(inputs.labels_SL[:, :3] < 0, -100, inputs.labels_SL[:, :3] % 11),
        None if inputs.bias_V is None else inputs.bias_V[:11],
        None,
        inputs.logit_scale,
        inputs.softcap,
    ).cast(torch.float64)
    small.labels_SL[0, 1] = 10
    if inputs.nll_labels_SL is not None:
        small = small._replace(nll_labels_SL=torch.where(small.labels_SL < 0, 3, small.labels_SL))
    leaves = [
        None if leaf is None else leaf.clone().requires_grad_()
        for leaf in (small.hidden_SLH, small.weight_VH, small.bias_V)
    ]
    with tiles(block_rows=2, bwd_rows=4, columns=4):
        assert torch.autograd.gradcheck(lambda *tensors: losses(small, *tensors), leaves)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("needed", [("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ()])
def test_linear_logps_computes_needed_gradients_only(needed: tuple[str, ...]) -> None:
    """Fault 15: a frozen head or frozen hidden gets None, and the others get what they get in full."""
    inputs = ADVERSARIAL["scaled_and_capped"]()
    _, full = run(inputs)
    leaves = {"hidden": inputs.hidden_SLH, "weight": inputs.weight_VH, "bias": inputs.bias_V}
    leaves = {name: leaf.clone().requires_grad_(name in needed) for name, leaf in leaves.items()}
    options = {"logit_scale": inputs.logit_scale, "softcap": inputs.softcap, "stats": STATS}
    result = linear_logps(leaves["hidden"], leaves["weight"], inputs.labels_SL, bias=leaves["bias"], **options)
    assert result.logps.requires_grad == bool(needed)
    generator = torch.Generator().manual_seed(99)
    if needed:
        weights = [
            torch.randn(v.shape, generator=generator, dtype=torch.float64) for v in (result.logps, result.token_logps)
        ]
        scalar = (result.logps * weights[0].float()).sum() + (result.token_logps * weights[1].float()).sum()
        scalar.backward()
    for name, leaf in leaves.items():
        assert (leaf.grad is None) == (name not in needed)
        if name in needed:
            assert torch.equal(leaf.grad, full[name])


def test_rule_refuses_what_is_too_far_and_what_cannot_be_compared() -> None:
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    torch_result = torch.tensor([1.0, 2.0 + 2**-20])
    assert_within_rule(torch.tensor([1.0, 2.0 + 2**-19]), torch_result, exact)
    with pytest.raises(AssertionError, match="output error"):
        assert_within_rule(torch.tensor([1.0, 2.0 + 2**-17]), torch_result, exact)
    assert_within_rule(torch.tensor([1.0, 2.0 + 3 * 2**-20]), torch_result, exact, kind="gradient")
    with pytest.raises(AssertionError):
        assert_within_rule(torch.tensor([1.0, float("nan")]), torch_result, exact)
    with pytest.raises(AssertionError):
        assert_within_rule(torch.tensor([1.0, float("inf")]), torch_result, exact)
    with pytest.raises(ValueError, match="float64"):
        assert_within_rule(torch_result, torch_result, torch_result)
    with pytest.raises(ValueError, match="one shape"):
        assert_within_rule(torch_result[:1], torch_result, exact)
    with pytest.raises(ValueError, match="kind"):
        assert_within_rule(torch_result, torch_result, exact, kind="loose")


def test_max_error_of_special_values() -> None:
    nan, inf = float("nan"), float("inf")
    oracle_fp64 = torch.tensor([nan, -inf, inf, 1.0], dtype=torch.float64)
    assert max_error(torch.tensor([nan, -inf, inf, 1.5]), oracle_fp64) == 0.5
    for place, wrong in enumerate([0.0, nan, -inf, nan]):
        values = oracle_fp64.clone()
        values[place] = wrong
        assert max_error(values, oracle_fp64) == inf
    assert max_error(torch.empty(0), torch.empty(0, dtype=torch.float64)) == 0.0
