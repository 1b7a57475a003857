"""Forward and gradient of the tiled backend against the fp64 reference; the reference against the formula."""

import pytest
import torch
from head_oracle import OUTPUTS, assert_matches_reference, flatten, oracle, run, tiles
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpref.testing.adversarial import ADVERSARIAL, ragged_inputs
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
