"""Whether the tuner notices a Gluon kernel that is wrong, hangs or is not there, and what tables may ask for."""

import dataclasses
import json
import math
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest
import test_gluon_values
import torch
from emulator import TILE, Deadlock

from fastpref.errors import ConfigError
from fastpref.kernels import apart, forward_kernel, tile_trial, tuning
from fastpref.kernels.apart import run_apart
from fastpref.kernels.tiles import CANDIDATES, GLUON_CHOICES, OVERRIDE_VARIABLE, TABLE, Tile, load_table, save_table

HOPPER = TABLE["sm_90/16"][0]
CANDIDATE = dataclasses.replace(HOPPER, kernel="gluon")


@pytest.fixture
def small_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that the emulation gets through in a moment; the last with several tiles for each program."""
    monkeypatch.setattr(tile_trial, "sizes", lambda tile: [(1, 8, 1), (33, 24, 65), (70, 40, 130)])
    monkeypatch.setattr(tile_trial, "SEEDS", 1)
    monkeypatch.setattr(tile_trial, "REPEATS", 2)


@pytest.mark.usefixtures("emulated", "small_trial")
def test_trial_finds_nothing_wrong_with_the_kernel() -> None:
    assert tile_trial.disagreement(TILE, torch.bfloat16, "cpu") is None


@pytest.mark.usefixtures("small_trial")
@pytest.mark.parametrize("error", test_gluon_values.ERRORS)
def test_trial_finds_planted_errors(error: str, emulated: dict[str, Any]) -> None:
    """A wrong number is said; what would be a wild write or a hang on a device is one in the emulation."""
    name, edit = test_gluon_values.ERRORS[error]
    emulated["edits"] = {name: edit}
    try:
        assert tile_trial.disagreement(TILE, torch.bfloat16, "cpu") is not None
    except (AssertionError, AttributeError) as found:
        assert isinstance(found, Deadlock) or "of a tensor of" in str(found) or "running" in str(found)


@pytest.mark.usefixtures("small_trial")
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (("unit = gl.exp2(excess)", "unit = gl.exp2(excess) * (1 + (bound_ptr is not None) / 1e5)"), "without masses"),
        (("(p * to_exponent[:, None])", "(p * to_exponent[:, None] * 1.02)"), "cached exponentials"),
        (("slices[i] - shift[:, None]", "slices[i] * 0.99 - shift[:, None]"), "moment differs"),
    ],
)  # fmt: skip
def test_trial_says_what_is_wrong(edit: tuple[str, str], message: str, emulated: dict[str, Any]) -> None:
    emulated["edits"] = {"reduce_tile": edit}
    found = tile_trial.disagreement(TILE, torch.bfloat16, "cpu")
    assert found is not None and message in found and "(R, H, V = " in found


def test_sizes_of_the_trial_are_ragged_and_more_than_programs() -> None:
    num_rows, hidden_size, vocab_size = tile_trial.sizes(CANDIDATE)[-1]
    num_tiles = -(-num_rows // 128) * -(-vocab_size // 256)
    assert num_tiles > 132 and num_tiles % 132 and num_rows % 128 and vocab_size % 256 and hidden_size % 64


def test_run_apart_returns_what_the_function_returns() -> None:
    assert run_apart(math.factorial, 5, seconds=100) == 120


def test_run_apart_kills_what_hangs() -> None:
    begin, others = time.monotonic(), set(multiprocessing.active_children())
    with pytest.raises(TimeoutError, match=r"did not end within 0\.5 seconds and was killed"):
        run_apart(time.sleep, 1000, seconds=0.5)
    assert time.monotonic() - begin < 60 and set(multiprocessing.active_children()) <= others


def test_run_apart_says_how_its_process_died() -> None:
    with pytest.raises(RuntimeError, match="died with exit code 7"):
        run_apart(os._exit, 7, seconds=100)


def test_run_apart_says_what_was_raised() -> None:
    ours, theirs = multiprocessing.Pipe(duplex=False)
    apart._answer(theirs, math.sqrt, (-1.0,))
    has_result, message = ours.recv()
    assert not has_result and message.startswith("ValueError: ")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A device of which only the answers of the processes apart are known."""
    answers: dict[str, Any] = {"trial": None, "measured": (2.0, None), "calls": []}

    def answer(function: Any, device: int, tile: Tile, *arguments: Any, seconds: float) -> Any:
        kind = "trial" if function is tuning._try_on else "measured"
        answers["calls"].append(kind)
        if isinstance(answers[kind], Exception):
            raise answers[kind]
        return answers[kind]

    tuning._trial_error.cache_clear()
    monkeypatch.setattr(tuning, "run_apart", answer)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tuning, "_measure_here", lambda tile, dtype, hidden: tuning.Measurement(tile, 3.0, None))
    return answers


def test_measure_times_the_gluon_kernel_after_one_trial(device: dict[str, Any]) -> None:
    for hidden_size in (1024, 4096):
        found = tuning.measure(CANDIDATE, torch.bfloat16, hidden_size)
        assert (found.milliseconds, found.error) == (2.0, None)
    assert device["calls"] == ["trial", "measured", "measured"]
    assert tuning.measure(HOPPER, torch.bfloat16, 4096).milliseconds == 3.0 and len(device["calls"]) == 3


@pytest.mark.parametrize("problem", [TimeoutError("it did not end"), RuntimeError("it died"), "sum differs"])
@pytest.mark.parametrize("when", ["trial", "measured"])
def test_measure_refuses_a_gluon_kernel_that_fails(when: str, problem: Any, device: dict[str, Any]) -> None:
    device[when] = (2.0, problem) if when == "measured" and isinstance(problem, str) else problem
    found = tuning.measure(CANDIDATE, torch.bfloat16, 4096)
    assert found.error is not None and str(problem) in found.error
    triton = tuning.Measurement(HOPPER, 9.0, None)
    assert tuning.fastest("sm_90/16", 4096, [found, triton]) == HOPPER


def test_measure_without_gluon_says_so(device: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward_kernel, "unavailable_reason", lambda: "Triton 3.4.0 has no Gluon")
    found = tuning.measure(CANDIDATE, torch.bfloat16, 4096)
    assert found.error == "Triton 3.4.0 has no Gluon" and not device["calls"]


def test_unavailable_reason_names_the_version_and_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    assert forward_kernel.unavailable_reason() is None
    monkeypatch.setitem(sys.modules, "fastpref.kernels.gluon_forward", None)
    monkeypatch.delattr("fastpref.kernels.gluon_forward", raising=False)
    reason = forward_kernel.unavailable_reason.__wrapped__()
    assert reason is not None and "has no Gluon that the kernel can use" in reason and "3.6 or newer" in reason


def test_shipped_tables_use_triton_and_candidates_of_hopper_have_gluon() -> None:
    assert all(tile.kernel == "triton" for tiles in TABLE.values() for tile in tiles)
    assert {key for key, tiles in CANDIDATES.items() if any(tile.kernel == "gluon" for tile in tiles)} == {"sm_90/16"}
    for tile in CANDIDATES["sm_90/16"]:
        if tile.kernel == "gluon":
            assert all(getattr(tile, field) in choices for field, choices in GLUON_CHOICES.items())


def test_a_tuned_table_switches_it_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the file does: what the tuner writes is read back, and the engine's table names the kernel."""
    from fastpref.kernels.tiles import select_tile

    assert select_tile("sm_90", torch.bfloat16, 4096).kernel == "triton"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    times = {"gluon": 1.0, "triton": 2.0}
    monkeypatch.setattr(tuning, "measure", lambda tile, *_: tuning.Measurement(tile, times[tile.kernel], None))
    path = str(tmp_path / "tiles.json")
    tuning.tune(path, (4096,), widths=(16,), report=lambda *_: None)
    monkeypatch.setenv(OVERRIDE_VARIABLE, path)
    assert select_tile("sm_90", torch.bfloat16, 4096) == CANDIDATE
    assert select_tile("sm_90", torch.float32, 4096).kernel == "triton"
    assert json.loads(Path(path).read_text())["sm_90/16"][0]["kernel"] == "gluon"


@pytest.mark.parametrize(
    ("key", "changes", "message"),
    [
        ("sm_90/32", {}, r"kernel of sm_90/32 must be triton: the Gluon kernel is for sm_90/16; set it to"),
        ("sm_100/16", {}, r"kernel of sm_100/16 must be triton"),
        ("sm_80/16", {}, r"kernel of sm_80/16 must be triton"),
        ("interpreter/16", {}, r"kernel of interpreter/16 must be triton"),
        ("sm_90/16", {"rows": 256}, r"rows of sm_90/16 must be 128 with the Gluon kernel, got 256; change it, or set"),
        ("sm_90/16", {"hidden": 128}, r"hidden of sm_90/16 must be 64 with the Gluon kernel"),
        ("sm_90/16", {"stages": 1}, r"stages of sm_90/16 must be 2 or 3"),
        ("sm_90/16", {"warps": 4}, r"warps of sm_90/16 must be 8"),
        ("sm_90/16", {"kernel": "cuda"}, r"kernel of sm_90/16 must be one of triton, gluon, got 'cuda'"),
    ],
)
def test_tables_that_the_kernel_cannot_serve_are_refused(
    key: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = str(tmp_path / "tiles.json")
    save_table(path, {key: (dataclasses.replace(CANDIDATE, **changes),)})
    with pytest.raises(ConfigError, match=message):
        load_table(path)


def test_a_table_without_the_field_is_of_triton(tmp_path: Path) -> None:
    entry = {name: value for name, value in dataclasses.asdict(HOPPER).items() if name != "kernel"}
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps({"sm_90/16": [entry]}), encoding="utf-8")
    assert load_table(str(path)) == {"sm_90/16": (HOPPER,)}


def test_info_says_how_it_is_switched_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastpref.cli.kernel_commands import _gluon_status

    assert _gluon_status().startswith("off until `fastpref kernels tune` finds it right and fastest")
    path = str(tmp_path / "tiles.json")
    save_table(path, {"sm_90/16": (CANDIDATE,)})
    monkeypatch.setenv(OVERRIDE_VARIABLE, path)
    assert _gluon_status() == f"named in {path}"
    monkeypatch.setattr(forward_kernel, "unavailable_reason", lambda: "Triton 3.4.0 has no Gluon")
    assert _gluon_status() == "Triton 3.4.0 has no Gluon"
