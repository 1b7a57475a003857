"""Fixtures of the op's tests."""

import pytest

from fastpref.kernels import torch_tiles


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> torch_tiles.TileShape:
    """Tiles so small that a handful of rows and columns crosses many of them."""
    tiles = torch_tiles.TileShape(block_rows=8, bwd_rows=16, columns=32)
    monkeypatch.setattr(torch_tiles, "CPU_TILES", tiles)
    return tiles
