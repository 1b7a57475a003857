"""What the tiled backend allocates, and that it uses nothing it has not written."""

from unittest import mock

import pytest
import torch
from head_oracle import tiles
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastpref.kernels import torch_tiles
from fastpref.kernels.engine import Head, RowScalars
from fastpref.kernels.outputs import FIELDS
from fastpref.kernels.partials import finish_rows
from fastpref.kernels.plans import Kept, Wanted, backward_rows
from fastpref.kernels.schedule import live_rows
from fastpref.testing.adversarial import ragged_inputs


class LargestResult(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> object:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return result


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("capped", [False, True])
def test_tiled_backend_never_makes_the_logits(capped: bool, dtype: torch.dtype) -> None:
    """The largest tensor is the weight (or its gradient), here a sixth of the logits."""
    num_rows, vocab_size, hidden_size = 96, 512, 16
    x_RH = torch.randn(num_rows, hidden_size).to(dtype)
    head = Head(torch.randn(vocab_size, hidden_size).to(dtype), None, 1.0, 5.0 if capped else None)
    labels_R = torch.randint(0, vocab_size, (num_rows,))
    with LargestResult() as watch:
        done = torch_tiles.forward_rows(x_RH, head, labels_R, fields=tuple(FIELDS), bound_R=None, with_cache=False)
        results = finish_rows(done.partials, torch.float32)
        scalars = RowScalars(torch.ones(num_rows), results.row_max, results.row_sum)
        backward_rows(torch_tiles, live_rows(x_RH, labels_R, scalars), head, Kept(), Wanted(True, True, True))
    assert watch.numel == vocab_size * hidden_size < num_rows * vocab_size
    with LargestResult() as watch:
        x_RH @ head.weight_VH.t()
    assert watch.numel == num_rows * vocab_size


def test_frozen_weight_needs_no_memory_for_its_gradient() -> None:
    inputs = ragged_inputs()
    x_RH, labels_R = inputs.hidden_SLH.flatten(0, 1), inputs.labels_SL.flatten().clamp(min=0)
    head = Head(inputs.weight_VH, None, 1.0, None)
    ones_R = torch.ones(36)
    with tiles(), LargestResult() as watch:
        rows = live_rows(x_RH, labels_R, RowScalars(ones_R, ones_R, ones_R))
        gradients = backward_rows(torch_tiles, rows, head, Kept(), Wanted(True, False, False))
    assert gradients.weight_VH is None
    assert gradients.bias_V is None
    assert watch.numel < inputs.weight_VH.numel()


def test_few_rows_copy_no_more_of_the_weight() -> None:
    """A tile of two rows has room for every column, their weights have not: a second copy of the head's was made."""
    x_RH, weight_VH, ones_R = torch.randn(2, 32), torch.randn(600, 32), torch.ones(2)
    kept = Kept(is_active_V=torch.arange(600) < 400, num_active=torch.tensor([400]), weight_sum_H=torch.zeros(32))
    shape = torch_tiles.TileShape(block_rows=8, bwd_rows=16, columns=32, bwd_bytes=64 * 32 * 4)
    with tiles(), mock.patch.object(torch_tiles, "CPU_TILES", shape), LargestResult() as watch:
        rows = live_rows(x_RH, torch.tensor([3, 5]), RowScalars(ones_R, ones_R, ones_R))
        backward_rows(torch_tiles, rows, Head(weight_VH, None, 1.0, None), kept, Wanted(True, False, False))
    assert watch.numel <= 64 * 32
