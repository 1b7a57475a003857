"""What launchers' variables may be, and what is refused by name before anybody waits."""

import pytest

from fastpref.errors import ConfigError
from fastpref.trainer.ranks.launcher import launched_ranks

GOOD = {"WORLD_SIZE": "512", "RANK": "511", "LOCAL_RANK": "7", "MASTER_ADDR": "node-a", "MASTER_PORT": "29500"}


def launched(monkeypatch: pytest.MonkeyPatch, **changes: str | None) -> int | None:
    for name, value in (GOOD | changes).items():
        monkeypatch.setenv(name, value or "")
        if value is None:
            monkeypatch.delenv(name)
    return launched_ranks()


def test_what_launchers_set_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launched(monkeypatch) == 512
    assert launched(monkeypatch, LOCAL_RANK=None, MASTER_ADDR="fe80::1") == 512
    assert launched(monkeypatch, WORLD_SIZE="1", RANK="0", MASTER_PORT="0") == 1
    assert launched(monkeypatch, **dict.fromkeys(GOOD)) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("WORLD_SIZE", value) for value in ("", "0", "-1", "two", "2.0", "1e3", "9" * 5000)],
        *[("RANK", value) for value in ("", "512", "-1", "first")],
        *[("LOCAL_RANK", value) for value in ("", "-1", "cuda:0")],
        *[("MASTER_PORT", value) for value in ("", "0", "http", "65536", "-1")],
        *[("MASTER_ADDR", value) for value in ("", "  ")],
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"the environment variable {name} must") as error:
        launched(monkeypatch, **{name: value})
    assert str(error.value).count("variable") == 1


def test_all_that_is_wrong_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"(?s)WORLD_SIZE.*RANK.*MASTER_PORT"):
        launched(monkeypatch, WORLD_SIZE="", RANK="x", MASTER_PORT="http")
