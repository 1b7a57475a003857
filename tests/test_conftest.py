"""The guards of `conftest.py` guard."""

import os
import re
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import megatron.core
import pytest

from fastpref.trainer.ranks import transformer_engine

FOUND = megatron.core.__version__
CONFTEST = str(Path(__file__).with_name("conftest.py"))


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "example.org", b"example.org"])
def test_network_is_refused(host: str | bytes) -> None:
    with pytest.raises(PermissionError, match="tests must not use the network"):
        socket.create_connection((host, 9), timeout=1)


def test_datagrams_are_refused() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender, pytest.raises(PermissionError):
        sender.sendto(b"x", ("192.0.2.1", 9))


def test_this_machine_can_be_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), timeout=5):
        server.accept()[0].close()


def test_hub_is_offline() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize("wanted", [None, FOUND.partition("+")[0], "0.0.1"])
def test_megatron_version_is_required(pytestconfig: pytest.Config, wanted: str | None) -> None:
    plugin = pytestconfig.pluginmanager.get_plugin(CONFTEST)
    config = SimpleNamespace(
        getoption={"megatron_version": wanted, "te_version": None, "triton_version": None}.__getitem__
    )
    if wanted != "0.0.1":
        plugin.pytest_configure(config)
        return
    with pytest.raises(pytest.UsageError, match=rf"must run on 0\.0\.1, got {re.escape(FOUND)} in .*core"):
        plugin.pytest_configure(config)


ENGINE, STAND_IN = "transformer_engine", "transformer_engine_torch"
HERE = str(Path(__file__).parent / "te_stub" / STAND_IN / "__init__.py")


@pytest.mark.parametrize(
    ("version", "extension", "layers", "message"),
    [
        ("2.9.0", HERE, ENGINE, None),
        (None, None, "local", r"must run on 2\.9\.0, got none \(a reason\)"),
        ("2.8.0", HERE, ENGINE, r"got 2\.8\.0 in somewhere"),
        ("2.9.0", "/elsewhere/transformer_engine_torch.so", ENGINE, "the extension /elsewhere.*, not the stand-in of"),
        ("2.9.0", HERE, "local", "got models made of other layers"),
    ],
    ids=["right", "absent", "another", "real-extension", "unused"],
)
def test_transformer_engine_is_required(
    pytestconfig: pytest.Config, monkeypatch, version: str, extension: str, layers: str, message: str | None
) -> None:
    engine = SimpleNamespace(__version__=version, __path__=["somewhere"])
    monkeypatch.setitem(sys.modules, ENGINE, engine if version else None)
    monkeypatch.setitem(sys.modules, STAND_IN, SimpleNamespace(__file__=extension))
    monkeypatch.setattr(transformer_engine, "import_failure", "a reason")
    monkeypatch.setattr(transformer_engine, "layer_implementation", lambda wanted: layers)
    plugin = pytestconfig.pluginmanager.get_plugin(CONFTEST)
    config = SimpleNamespace(
        getoption={"megatron_version": None, "te_version": "2.9.0", "triton_version": None}.__getitem__
    )
    if message is None:
        plugin.pytest_configure(config)
        return
    with pytest.raises(pytest.UsageError, match=message):
        plugin.pytest_configure(config)
