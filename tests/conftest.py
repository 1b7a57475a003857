"""Settings and fixtures of the whole suite: one thread, no network, and worker ranks that start once a session."""

import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before torch and the Hugging Face libraries are imported anywhere: they read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest

from fastpref.testing.workers import RankPool

STAND_IN = Path(__file__).resolve().parent / "te_stub" / "transformer_engine_torch"
LOOPBACK = ("127.", "::1", "localhost", "0.0.0.0")


def refuse_network(event: str, args: tuple[Any, ...]) -> None:
    """Audit hook: Python code of a test may talk to this machine only."""
    if event in ("socket.connect", "socket.sendto"):
        address = args[-1]
        host = address[0] if isinstance(address, tuple) else None
    elif event == "socket.getaddrinfo":
        host = args[0]
    else:
        return
    if isinstance(host, bytes):
        host = host.decode()
    if isinstance(host, str) and host and not host.startswith(LOOPBACK):
        raise PermissionError(f"tests must not use the network, but {event} was called for {host!r}")


sys.addaudithook(refuse_network)


def pytest_collection_finish() -> None:
    """What is imported by now stays: tearing Megatron down collects garbage, which need not be looked for there."""
    gc.freeze()


def pytest_unconfigure() -> None:
    """Libraries that count what they leak at the end of a process find nothing more than without these hooks."""
    gc.unfreeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--megatron-version", help="run nothing unless this version of Megatron-Core is the one imported")
    parser.addoption(
        "--te-version", help="run nothing unless this version of Transformer Engine runs, over tests/te_stub"
    )
    parser.addoption("--triton-version", help="run nothing unless this version of Triton is the one imported")


def hear_signals() -> None:
    """Undo what a shell does to a suite in the background: a run in the tests must hear the signals that it is sent."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)


def pytest_configure(config: pytest.Config) -> None:
    hear_signals()
    engine, megatron = config.getoption("te_version"), config.getoption("megatron_version")
    if engine is not None:
        require_transformer_engine(engine)
    if megatron is not None:
        require_megatron(megatron)
    if config.getoption("triton_version") is not None:
        require_triton(config.getoption("triton_version"))


def require_triton(wanted: str) -> None:
    import triton

    if triton.__version__ != wanted:
        found = f"{triton.__version__} in {triton.__path__[0]}"
        raise pytest.UsageError(f"--triton-version: the tests must run on {wanted}, got {found}; set PYTHONPATH")


def require_megatron(wanted: str) -> None:
    import megatron.core

    # inside a git repository, as an environment in a checkout is, it adds "+" and that repository's commit
    if megatron.core.__version__.partition("+")[0] != wanted:
        found = f"{megatron.core.__version__} in {megatron.core.__path__[0]}"
        raise pytest.UsageError(f"--megatron-version: the tests must run on {wanted}, got {found}; set PYTHONPATH")


def require_transformer_engine(wanted: str) -> None:
    """Its Python code of this version over the stand-in, and models made of its layers where nothing else is said."""
    from fastpref.trainer.ranks import transformer_engine as engine

    found, stand_in = sys.modules.get("transformer_engine"), sys.modules.get("transformer_engine_torch")
    problem = None
    if found is None:
        problem = f"none ({engine.import_failure or 'not installed'})"
    elif found.__version__ != wanted:
        problem = f"{found.__version__} in {found.__path__[0]}"
    elif stand_in is None or Path(str(stand_in.__file__)).parent != STAND_IN:
        problem = f"the extension {getattr(stand_in, '__file__', None)}, not the stand-in of {STAND_IN}"
    elif engine.layer_implementation(None) != "transformer_engine":
        problem = "models made of other layers"
    if problem is not None:
        raise pytest.UsageError(f"--te-version: the tests must run on {wanted}, got {problem}; set PYTHONPATH")


@pytest.fixture(scope="session")
def rank_pool_2() -> Iterator[RankPool]:
    """Two worker ranks; nothing starts before the first `run`."""
    with RankPool(2, timeout_s=120.0) as pool:
        yield pool


@pytest.fixture(scope="session")
def rank_pool_4() -> Iterator[RankPool]:
    """Four worker ranks; nothing starts before the first `run`."""
    with RankPool(4, timeout_s=120.0) as pool:
        yield pool
