"""How wide the blocks of a backward pass are where products want a multiple of columns."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from head_oracle import assert_results_within_rule, flatten, peaked_inputs, run, tiles
from plan_oracle import active_columns, coefficients, differentiate, formula, relative_error

from fastpref.kernels import active, plans, schedule, torch_tiles
from fastpref.kernels.tiles import CACHE_COLUMNS


@contextmanager
def layouts(chunk_rows: int = active.CHUNK_ROWS) -> Iterator[list[schedule.Schedule]]:
    """Collect how backward passes are laid out where products have a multiple of 16 columns, as on a GPU."""
    seen: list[schedule.Schedule] = []

    def laid_out(*arguments) -> schedule.Schedule:
        seen.append(schedule.schedule(*arguments))
        return seen[-1]

    with (
        tiles(multiple=16),
        mock.patch.object(active, "CHUNK_ROWS", chunk_rows),
        mock.patch.object(schedule, "CHUNK_ROWS", chunk_rows),
        mock.patch.object(plans, "schedule", laid_out),
    ):
        yield seen


@pytest.mark.parametrize("chunk_rows", [16, 70])
def test_active_visits_a_multiple_of_columns(chunk_rows: int) -> None:
    """What is visited beside the active columns gets its gradient and is no longer cold."""
    inputs, c_R = peaked_inputs(num_rows=70), coefficients(70)
    with layouts(chunk_rows) as seen:
        is_active_CV, _ = active_columns(inputs, 2**-6)
        found = differentiate(inputs, c_R, backward="active", active_eps=2**-6)
    (layout,) = seen
    assert is_active_CV.any(dim=0).sum() % 16 and layout.is_active_CV[is_active_CV].all()
    widths = [
        block.width if part.picked is None else len(part.picked) for block, parts in layout.work for part in parts
    ]
    assert widths and not any(width % 16 for width in widths)
    expected = formula(inputs, c_R.double(), layout.is_active_CV, chunk_rows)
    for name, gradient in found.items():
        assert relative_error(gradient, expected[name]) < 1000 * torch.finfo(torch.float32).eps


def test_recompute_leaves_the_odd_columns_to_the_last_block() -> None:
    inputs = peaked_inputs()
    with layouts() as seen:
        assert_results_within_rule(flatten(*run(inputs, backward="recompute")), inputs)
    assert [block.width for block, _ in seen[0].work] == [32] * 18 + [16, 8]


def test_blocks_on_a_device_are_as_wide_as_its_kernels_like() -> None:
    """Where a block's width is no multiple of 16 the gradient's kernel stores element by element, and spills."""
    device = torch_tiles.DEVICE_TILES
    assert device.multiple % 16 == 0 and device.columns % device.multiple == 0
    assert device.multiple % CACHE_COLUMNS == 0
