"""How wide the blocks of a backward pass are where products want a multiple of columns."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from head_oracle import assert_results_within_rule, flatten, peaked_inputs, run, tiles
from plan_oracle import active_columns, coefficients, differentiate, formula, relative_error

from fastpref.kernels import plans, torch_tiles
from fastpref.kernels.schedule import Columns
from fastpref.kernels.tiles import CACHE_COLUMNS


@contextmanager
def layouts() -> Iterator[list[tuple[Columns, list[slice]]]]:
    """Collect what backward passes visit where products have a multiple of 16 columns, as on a GPU."""
    seen: list[tuple[Columns, list[slice]]] = []

    class Seen(plans._Backward):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            seen.append((self.columns, self.blocks))

    with tiles(multiple=16), mock.patch.object(plans, "_Backward", Seen):
        yield seen


def test_active_visits_a_multiple_of_columns() -> None:
    """What is visited beside the active columns gets its gradient and is no longer cold."""
    inputs, c_R = peaked_inputs(num_rows=70), coefficients(70)
    with layouts() as seen:
        is_active_V, _ = active_columns(inputs, 2**-6)
        found = differentiate(inputs, c_R, backward="active", active_eps=2**-6)
    ((columns, blocks),) = seen
    num_active = int(is_active_V.sum())
    assert num_active % 16 and columns.number == num_active + -num_active % 16
    assert columns.ids_A[:num_active].tolist() == is_active_V.nonzero().squeeze(1).tolist()
    assert len(set(columns.ids_A.tolist())) == columns.number
    assert blocks and not any((block.stop - block.start) % 16 for block in blocks)
    is_visited_V = torch.zeros(600, dtype=torch.bool).index_fill_(0, columns.ids_A, True)
    expected = formula(inputs, c_R.double(), is_visited_V)
    for name, gradient in found.items():
        assert relative_error(gradient, expected[name]) < 1000 * torch.finfo(torch.float32).eps


def test_recompute_leaves_the_odd_columns_to_the_last_block() -> None:
    inputs = peaked_inputs()
    with layouts() as seen:
        assert_results_within_rule(flatten(*run(inputs, backward="recompute")), inputs)
    assert [block.stop - block.start for block in seen[0][1]] == [32] * 18 + [16, 8]


@pytest.mark.parametrize("num_rows", [1, 1000, 8192, 16384, 65536, 10**6])
@pytest.mark.parametrize("hidden_size", [1, 4096, 16384])
@pytest.mark.parametrize("item_bytes", [2, 4])
def test_a_backward_tile_on_a_device_keeps_to_its_memory(num_rows: int, hidden_size: int, item_bytes: int) -> None:
    """So do the block of the weight and, twice as large in 16 bits, that of its gradient."""
    device = torch_tiles.DEVICE_TILES
    height, width = device.backward(num_rows, hidden_size, item_bytes)
    assert height == min(num_rows, device.bwd_rows) and width >= device.columns and not width % device.multiple
    assert height * width * item_bytes <= max(device.bwd_bytes, device.bwd_rows * device.columns * item_bytes)
    assert hidden_size * width * item_bytes <= max(device.bwd_bytes, hidden_size * device.columns * item_bytes)


def test_a_usual_backward_tile_on_a_device() -> None:
    device = torch_tiles.DEVICE_TILES
    assert device.backward(8192, 4096, 2) == (8192, 16384)
    assert device.backward(512, 4096, 2) == (512, 32768)


def test_blocks_on_a_device_are_as_wide_as_its_kernels_like() -> None:
    """Where a block's width is no multiple of 16 the gradient's kernel stores element by element, and spills."""
    device = torch_tiles.DEVICE_TILES
    assert device.multiple % 16 == 0 and device.columns % device.multiple == 0
    assert device.multiple % CACHE_COLUMNS == 0
