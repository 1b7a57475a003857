"""Fault 9: no sequence, no token, one id, one hidden channel."""

import pytest
import torch
from head_oracle import run

from fastpref.testing.adversarial import HeadInputs


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)], ids=str)
def test_linear_logps_without_tokens(engine: str, shape: tuple[int, int]) -> None:
    labels_SL = torch.zeros(shape, dtype=torch.int64)
    result, gradients = run(HeadInputs(torch.randn(*shape, 4), torch.randn(7, 4), labels_SL), engine)
    assert result.logps.tolist() == [0.0] * shape[0]
    assert result.counts.tolist() == [0] * shape[0]
    assert result.token_logps.shape == (0,)
    assert not gradients["weight"].any()
    assert gradients["hidden"].shape == (*shape, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_logps_with_one_id_and_one_channel(engine: str, dtype: torch.dtype) -> None:
    """The only outcome has probability 1, exactly."""
    inputs = HeadInputs(torch.randn(2, 3, 1), torch.randn(1, 1), torch.zeros(2, 3, dtype=torch.int64)).cast(dtype)
    result, gradients = run(inputs, engine)
    assert result.logps.tolist() == [0.0, 0.0]
    assert result.entropy.tolist() == [0.0, 0.0]
    assert result.hits.tolist() == [3.0, 3.0]
    assert not any(gradient.any() for gradient in gradients.values())
