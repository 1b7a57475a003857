"""The tile table, its override by a file, and the parts of tuning that need no device."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastpref.errors import ConfigError
from fastpref.kernels import tuning
from fastpref.kernels.tiles import (
    CACHE_COLUMNS,
    CANDIDATES,
    INTERPRETER,
    OVERRIDE_VARIABLE,
    TABLE,
    Tile,
    architecture_of,
    load_table,
    save_table,
    select_tile,
)

HOPPER = TABLE["sm_90/16"][0]


def write(path: Path, content: object) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("capability", "architecture"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_86"),
        ((8, 9), "sm_86"),
        ((9, 0), "sm_90"),
        ((10, 3), "sm_100"),
        ((12, 0), "sm_86"),
    ],
)
def test_architecture_of(capability: tuple[int, int], architecture: str) -> None:
    assert architecture_of(capability) == architecture


def test_architecture_of_an_old_gpu_names_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"8\.0 or newer, got 7\.5; use backend='torch'"):
        architecture_of((7, 5))


def test_every_tile_holds_whole_groups_of_the_cache_and_whole_slices() -> None:
    for tile in (tile for tiles in (*TABLE.values(), *CANDIDATES.values()) for tile in tiles):
        assert tile.columns % CACHE_COLUMNS == 0 and tile.columns % tile.slices == 0


def test_every_architecture_has_every_width() -> None:
    for architecture in ("sm_80", "sm_86", "sm_90", "sm_100", INTERPRETER):
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.int8):
            assert isinstance(select_tile(architecture, dtype, 1), Tile)


def test_select_tile_takes_the_last_entry_that_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = dataclasses.replace(HOPPER, columns=128), dataclasses.replace(HOPPER, min_hidden=2048)
    save_table(str(tmp_path / "tiles.json"), {"sm_90/16": (small, large)})
    monkeypatch.setenv(OVERRIDE_VARIABLE, str(tmp_path / "tiles.json"))
    assert select_tile("sm_90", torch.bfloat16, 2047) == small
    assert select_tile("sm_90", torch.float16, 2048) == large
    # Entries that the file does not have stay.
    assert select_tile("sm_90", torch.float32, 64) == TABLE["sm_90/32"][0]
    assert select_tile("sm_80", torch.bfloat16, 64) == TABLE["sm_80/16"][0]


ENTRY = dataclasses.asdict(HOPPER)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "must name a tile table in JSON"),
        ([], "must name a tile table in JSON"),
        ({"sm_90/16": [{"rows": 128}]}, "must name a tile table in JSON"),
        ({"sm_90/16": [ENTRY | {"speed": 3}]}, "must name a tile table in JSON"),
        ({"sm_91/16": [ENTRY]}, "'sm_91/16' must be one of sm_90/8, sm_90/16"),
        ({"sm_90/16": []}, r"min_hidden of sm_90/16 must start at 0 and rise, got \[\]"),
        ({"sm_90/16": [ENTRY | {"min_hidden": 64}]}, r"must start at 0 and rise, got \[64\]"),
        ({"sm_90/16": [ENTRY, ENTRY]}, r"must start at 0 and rise, got \[0, 0\]"),
        ({"sm_90/16": [ENTRY | {"columns": 192}]}, "columns of sm_90/16 must be one of 64, 128, 256, got 192"),
        ({"sm_90/16": [ENTRY | {"warps": True}]}, "warps of sm_90/16 must be one of .*, got True"),
        ({"sm_90/8": [ENTRY | {"hidden": 16}]}, "hidden of sm_90/8 must be at least 32, got 16"),
    ],
)
def test_select_tile_refuses_a_bad_file(
    content: object, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(OVERRIDE_VARIABLE, write(tmp_path / "tiles.json", content))
    with pytest.raises(ConfigError, match=message):
        select_tile("sm_90", torch.bfloat16, 4096)


def test_select_tile_refuses_a_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OVERRIDE_VARIABLE, str(tmp_path / "none.json"))
    with pytest.raises(ConfigError, match=r"none\.json must name a tile table"):
        select_tile("sm_90", torch.bfloat16, 4096)


def measured(columns: int, milliseconds: float, error: str | None = None) -> tuning.Measurement:
    return tuning.Measurement(dataclasses.replace(HOPPER, columns=columns), milliseconds, error)


def test_fastest_skips_wrong_results() -> None:
    found = [measured(256, 3.0), measured(128, 1.0, "differs"), measured(64, 2.0)]
    assert tuning.fastest("sm_90/16", 4096, found).columns == 64


def test_fastest_of_nothing_right_says_so() -> None:
    with pytest.raises(RuntimeError, match="no tile of sm_90/16 gave a right result at H=4096: 128x64: differs"):
        tuning.fastest("sm_90/16", 4096, [measured(64, 2.0, "differs")])


def test_entries_merges_equal_neighbours() -> None:
    """A bound only where the winner changes; the first entry serves every smaller H."""
    wide, narrow = dataclasses.replace(HOPPER, columns=256), dataclasses.replace(HOPPER, columns=128)
    found = tuning.entries({4096: wide, 1024: narrow, 2048: narrow})
    assert found == (narrow, dataclasses.replace(wide, min_hidden=4096))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_tune_without_a_gpu_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tuning measures on a GPU, and PyTorch sees none"):
        tuning.tune(str(tmp_path / "tiles.json"))
    assert not list(tmp_path.iterdir())


def test_tune_begins_no_further_size_after_its_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, reported = iter([0.0, 1.0, 9.0, 11.0]), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(tuning, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(tuning, "measure", lambda tile, dtype, hidden: tuning.Measurement(tile, tile.stages, None))
    table = tuning.tune(
        str(tmp_path / "tiles.json"),
        (4096, 2048, 1024),
        widths=(16,),
        seconds=10.0,
        report=lambda key, hidden_size, found: reported.append((key, hidden_size, len(found))),
    )
    candidates = CANDIDATES["sm_90/16"]
    assert reported == [("sm_90/16", 4096, len(candidates)), ("sm_90/16", 2048, len(candidates))]
    assert table == {"sm_90/16": (next(tile for tile in candidates if tile.stages == 3),)}
    assert load_table(str(tmp_path / "tiles.json")) == table


def test_tune_without_time_keeps_the_table_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It wrote an empty one over it."""
    path = str(tmp_path / "tiles.json")
    save_table(path, {"sm_90/16": (HOPPER,)})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert tuning.tune(path, seconds=0.0) == {}
    assert json.loads(Path(path).read_text(encoding="utf-8")).keys() == {"sm_90/16"}
