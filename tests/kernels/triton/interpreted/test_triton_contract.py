"""The contract of `linear_logps`, word by word, on the Triton engine: the tests of the other backends once more."""

import pytest
from test_every_output import (  # noqa: F401 - collected here
    test_a_bad_label_spoils_its_token_and_sequence_only,
    test_a_second_run_gives_the_same_bits,
    test_a_sequence_without_labels,
    test_an_input_changed_in_place_before_backward,
    test_any_strides,
    test_bounds_of_either_width,
    test_debug_names_the_label,
    test_labels_that_disagree,
    test_no_tokens_at_all,
    test_outputs_in_fp32_or_fp64,
    test_rows_in_any_order_and_twice,
    test_stride_zero,
    test_which_outputs_are_differentiable,
)


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> str:
    """The name of the backend, in the place of those that the tests run on elsewhere."""
    if "float64" in request.node.name:
        pytest.skip("Triton's kernels compute in fp32")
    return "triton"
