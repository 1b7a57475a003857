"""Fixtures of the op's tests."""

from collections.abc import Iterator

import pytest
from head_oracle import tiles


@pytest.fixture
def small_tiles() -> Iterator[None]:
    with tiles():
        yield
