"""`state.json` of a checkpoint: what no save writes there is refused by name, before anything is made of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from fastpref.checkpoint.directory import read_state
from fastpref.errors import CheckpointError
from fastpref.run.plan.fingerprint import require_same
from fastpref.run.plan.resumption import check_position

STATE: dict[str, Any] = {"step": 3, "fingerprint": {"seed": 1}, "text": None, "bco_delta": 0.5, "bco_count": 2}
FORGED = {
    "step": [None, [], "3", -1, True, 1.5],
    "fingerprint": [None, [], "x", 1, [[1]]],
    "text": ["x", 1, True, [[1]]],
    "bco_delta": [None, "x", True, float("nan"), [1]],
    "bco_count": [None, "x", True, float("inf"), {}],
}


def read(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    path.mkdir(exist_ok=True)
    (path / "state.json").write_text(json.dumps(state))
    check_position(path, 9)
    return read_state(path)


def test_entries_of_other_kinds_are_refused(tmp_path: Path) -> None:
    assert read(tmp_path / "step-3", STATE) == STATE
    without_step = {name: value for name, value in STATE.items() if name != "step"}
    for state in [without_step, *({**STATE, name: value} for name in FORGED for value in FORGED[name])]:
        with pytest.raises(CheckpointError, match=r"step-3/state\.json (must|cannot be read)"):
            read(tmp_path / "step-3", state)


def test_a_checkpoint_under_the_name_of_another_is_refused(tmp_path: Path) -> None:
    """The run would go on from step 3, and never save the step whose name is taken."""
    assert read(tmp_path / "best", STATE) == STATE
    with pytest.raises(CheckpointError, match=r"step-9 holds step 3, not that of its name; name it .*/step-3$"):
        read(tmp_path / "step-9", STATE)


@pytest.mark.parametrize("name", ["model.rope", "lora"])
@pytest.mark.parametrize("value", ["x", "{"])
def test_settings_in_no_known_form_are_refused(name: str, value: str) -> None:
    with pytest.raises(CheckpointError, match=r"step-3 holds settings that cannot be read: "):
        require_same(Path("step-3"), {name: value}, {name: "{}"})
