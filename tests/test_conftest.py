"""The guards of `conftest.py` guard."""

import os
import re
import socket
from pathlib import Path
from types import SimpleNamespace

import megatron.core
import pytest

FOUND = megatron.core.__version__


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
    plugin = pytestconfig.pluginmanager.get_plugin(str(Path(__file__).with_name("conftest.py")))
    config = SimpleNamespace(getoption={"megatron_version": wanted}.__getitem__)
    if wanted != "0.0.1":
        plugin.pytest_configure(config)
        return
    with pytest.raises(pytest.UsageError, match=rf"must run on 0\.0\.1, got {re.escape(FOUND)} in .*core"):
        plugin.pytest_configure(config)
