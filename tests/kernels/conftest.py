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


# Builds that multiply floats differently; the others differ in products of bytes alone.
FLOAT_BUILDS = ("avx512_bf16", "avx512", "avx2")


@pytest.fixture(params=native.BUILDS)
def screen_build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    yield from _with_build(request.param, monkeypatch)


@pytest.fixture(params=FLOAT_BUILDS)
def build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    yield from _with_build(request.param, monkeypatch)


def _with_build(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    use_build(monkeypatch, name)
    if not native.is_available():
        native._load.cache_clear()
        pytest.skip(f"build {name}: {native.unavailable_reason()}")
    yield name
    native._load.cache_clear()


@pytest.fixture
def reloaded() -> Iterator[None]:
    """For tests that change what loading the library meets."""
    native._load.cache_clear()
    yield
    native._load.cache_clear()
