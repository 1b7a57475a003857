"""The kernels as a Hopper GPU would run them: in the interpreter, with its tiles, on emulated tensor cores.

And the same with an error planted. Dims: `M` rows, `N` columns, `K` summed over, of one step of a tile; else as in
`triton_oracle`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from triton_oracle import Problem, run_triton
from wgmma_accumulator import wgmma_product

from fastpref.kernels import tiles

TILE = tiles.TABLE["sm_90/16"][0]
Step = Callable[[Tensor, Tensor, Tensor, int, int], Tensor]
"""One step of a tile's product: (a [M, K], b [N, K], accumulator [M, N], number of the step, H) to accumulator."""


def right_step(a_MK: Tensor, b_NK: Tensor, acc_MN: Tensor, step: int, hidden_size: int) -> Tensor:
    return wgmma_product(a_MK, b_NK, acc_MN)


def lost_block(a_MK: Tensor, b_NK: Tensor, acc_MN: Tensor, step: int, hidden_size: int) -> Tensor:
    """16 of H, in the first step, are never added."""
    if step == 0:
        a_MK = a_MK.clone()
        a_MK[:, 16:32] = 0.0
    return wgmma_product(a_MK, b_NK, acc_MN)


def bf16_accumulator(a_MK: Tensor, b_NK: Tensor, acc_MN: Tensor, step: int, hidden_size: int) -> Tensor:
    """The sum is rounded to bf16 after every step."""
    return wgmma_product(a_MK, b_NK, acc_MN).bfloat16().float()


def garbage_beyond_h(a_MK: Tensor, b_NK: Tensor, acc_MN: Tensor, step: int, hidden_size: int) -> Tensor:
    """The last step reads what lies behind the rows: here, what other rows begin with."""
    width = a_MK.shape[1]
    inside = hidden_size - step * width
    if inside < width:
        a_MK, b_NK = a_MK.clone(), b_NK.clone()
        for operand in (a_MK, b_NK):
            operand[:, inside:] = operand[:, :1].roll(1, dims=0)
    return wgmma_product(a_MK, b_NK, acc_MN)


@contextmanager
def tensor_cores(hidden_size: int, step: Step = right_step) -> Iterator[None]:
    """Let the products of interpreted kernels be those of a Hopper GPU, cut as there."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    count = 0
    steps_per_tile = -(-hidden_size // TILE.hidden)

    def create_dot(self: Any, a: Any, b: Any, acc: Any, *rest: Any) -> Any:
        nonlocal count
        assert a.data.shape == (TILE.rows, TILE.hidden) and b.data.shape == (TILE.hidden, TILE.columns)
        operands = (torch.from_numpy(np.ascontiguousarray(values)) for values in (a.data, b.data.T, acc.data))
        done = step(*operands, count % steps_per_tile, hidden_size)
        count += 1
        return TensorHandle(done.numpy(), acc.dtype.scalar)

    table = {f"{tiles.INTERPRETER}/16": (TILE,)}
    with mock.patch.object(InterpreterBuilder, "create_dot", create_dot), mock.patch.dict(tiles.TABLE, table):
        yield
    assert count and count % steps_per_tile == 0, "no kernel multiplied, or not in whole tiles"


def other_order(x_RH: Tensor, weight_VH: Tensor) -> Tensor:
    """The yardstick's product: PyTorch's kernel on the device may sum H in another order than this project's."""
    return wgmma_product(x_RH.flip(1), weight_VH.flip(1))


def run(given: Problem, step: Step = right_step) -> dict[str, Tensor]:
    with tensor_cores(given.x_RH.shape[1], step):
        return run_triton(given).values


def zeros_beyond_v(given: Problem) -> dict[str, Tensor]:
    """The columns of the last tile that lie behind the vocabulary count, with what a tile computes of zeros."""
    extra = -given.head.weight_VH.shape[0] % TILE.columns
    return _fitted(run(_with_columns(given, lambda values: _pad_columns(values, extra))), given)


def dropped_tile(given: Problem) -> dict[str, Tensor]:
    """The last, ragged tile of columns is never visited."""
    whole = given.head.weight_VH.shape[0] // TILE.columns * TILE.columns
    return _fitted(run(_with_columns(given, lambda values: values[:whole])), given)


def shifted_labels(given: Problem) -> dict[str, Tensor]:
    """Every row takes the column behind its label."""
    return run(given._replace(labels_R=given.labels_R + 1))


class PlantedError(NamedTuple):
    """What kernels with an error make of a problem, and the results that must give it away."""

    run: Callable[[Problem], dict[str, Tensor]]
    reaches: tuple[str, ...]


ROWS = ("token_logps", "entropy")
ERRORS = {
    "a block of 16 of H lost": PlantedError(partial(run, step=lost_block), (*ROWS, "mass")),
    "accumulator rounded to bf16": PlantedError(partial(run, step=bf16_accumulator), (*ROWS, "mass")),
    "garbage beyond H": PlantedError(partial(run, step=garbage_beyond_h), (*ROWS, "mass")),
    "columns beyond V count": PlantedError(zeros_beyond_v, ROWS),
    "last tile dropped": PlantedError(dropped_tile, (*ROWS, "mass")),
    "labels off by one": PlantedError(shifted_labels, ("token_logps",)),
}


def _with_columns(given: Problem, change: Callable[[Tensor], Tensor]) -> Problem:
    head = given.head
    bias_V = None if head.bias_V is None else change(head.bias_V)
    return given._replace(head=head._replace(weight_VH=change(head.weight_VH), bias_V=bias_V))


def _pad_columns(values: Tensor, extra: int) -> Tensor:
    return torch.cat([values, values.new_zeros(extra, *values.shape[1:])])


def _fitted(values: dict[str, Tensor], given: Problem) -> dict[str, Tensor]:
    """Results per column, cut to or filled up with zeros to the columns that there are."""
    num_columns = given.head.weight_VH.shape[0]
    for name in ("mass", "d_logits"):
        kept = values[name][..., :num_columns]
        values[name] = torch.nn.functional.pad(kept, (0, num_columns - kept.shape[-1]))
    return values
