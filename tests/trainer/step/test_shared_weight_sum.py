"""The sum over the rows of the head's weight, which the microbatches of a step share."""

from collections.abc import Iterator
from functools import partial
from unittest import mock

import pytest
import torch
from tiny_runs import finish, same_parameters
from torch import Tensor

from fastpref import linear_logps, sum_weight
from fastpref.trainer.model import head
from fastpref.trainer.model.weight_forms import WeightForms

OPTIONS = {"head_backward": "active", "active_eps": 0.9, "gradient_accumulation_steps": 2, "max_steps": 3}


@pytest.fixture
def sums() -> Iterator[list[Tensor]]:
    """Copies of the weights that were summed, while every call compares the sum it got with its weight."""
    summed: list[Tensor] = []

    def seen(weight_VH: Tensor) -> Tensor:
        summed.append(weight_VH.detach().clone())
        return sum_weight(weight_VH)

    with (
        mock.patch.object(head, "sum_weight", seen),
        mock.patch.object(head, "linear_logps", partial(linear_logps, debug=True)),
    ):
        yield summed


def test_a_step_sums_its_weight_once(quiet_args, sums: list[Tensor]) -> None:
    trainer = finish(quiet_args(**OPTIONS))
    assert len(sums) == 3
    assert not torch.equal(sums[1], sums[2])
    assert not any(head.head_of(model).forms._made for model in trainer.model)


def test_a_shared_sum_changes_no_bit(quiet_args, sums: list[Tensor]) -> None:
    shared = finish(quiet_args(**OPTIONS))
    with mock.patch.object(WeightForms, "get", lambda self, compute, weight_VH, num_rows: None):
        own = finish(quiet_args(**OPTIONS))
    assert len(sums) == 3 and same_parameters(shared, own)


def test_a_sum_that_outlives_its_step_is_found(quiet_args, sums: list[Tensor]) -> None:
    """The planted error: Megatron's optimizer writes through `.data`, which no version counter shows."""
    with (
        mock.patch.object(WeightForms, "forget", lambda self: None),
        pytest.raises(ValueError, match="weight_sum is not the sum of this weight's rows"),
    ):
        finish(quiet_args(**OPTIONS))
