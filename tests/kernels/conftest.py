"""Fixtures of the op's tests."""

from collections.abc import Iterator

import pytest
from head_oracle import tiles
from native_problems import use_build

from fastpref.kernels import native


@pytest.fixture
def small_tiles() -> Iterator[None]:
    with tiles():
        yield


@pytest.fixture(params=native.BUILDS)
def build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    use_build(monkeypatch, request.param)
    if not native.is_available():
        native._load.cache_clear()
        pytest.skip(f"build {request.param}: {native.unavailable_reason()}")
    yield request.param
    native._load.cache_clear()


@pytest.fixture
def reloaded() -> Iterator[None]:
    """For tests that change what loading the library meets."""
    native._load.cache_clear()
    yield
    native._load.cache_clear()
