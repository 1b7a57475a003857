"""A run that is cut and resumed ends where the uninterrupted run ends, bit for bit."""

import json

import pytest
from tiny_runs import finish, same_parameters

from fastpref.checkpoint.directory import read_state
from fastpref.errors import CheckpointError
from fastpref.trainer import DPOConfig
from fastpref.trainer.saves.state import load


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_distributed_optimizer": True}, {"packing": True, "prefix_sharing": True}],
    ids=["plain", "distributed-optimizer", "packed"],
)
@pytest.mark.parametrize("cut", [1, 5], ids=["first-epoch", "second-epoch"])
def test_resume_equals_the_uninterrupted_run(quiet_args, tmp_path, cut: int, settings: dict) -> None:
    options = {"num_train_epochs": 2, "warmup_steps": 2, **settings}
    whole = finish(quiet_args(output_dir=str(tmp_path / "whole"), **options))
    again = {"output_dir": str(tmp_path / "cut"), **options}
    finish(quiet_args(save_steps=cut, **again))  # saves along the way, with the full schedule
    resumed = finish(quiet_args(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoints" / f"step-{cut}"), **again))
    assert same_parameters(whole, resumed)
    # the alarm compares two windows, of which a resumed run has seen only the second
    timing = ("perf/", "memory/", "alarm/")
    expected = [{k: v for k, v in record.items() if not k.startswith(timing)} for record in whole.log_history]
    actual = [{k: v for k, v in record.items() if not k.startswith(timing)} for record in resumed.log_history]
    assert actual == expected[cut:]
    records = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [*range(1, 9), 8]  # no step is missing or repeated


def test_resume_latest_takes_the_newest_finished_checkpoint(quiet_args, tmp_path) -> None:
    whole = finish(quiet_args(save_steps=1, save_total_limit=2))
    root = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in root.iterdir()) == ["step-3", "step-4"]
    (root / "step-9.tmp-cafe").mkdir()
    (root / "step-7").mkdir()  # no manifest: not a finished checkpoint
    resumed = finish(quiet_args(resume_from_checkpoint="latest"))
    assert same_parameters(whole, resumed)


def test_resume_keeps_the_running_mean_of_bco(quiet_args, tmp_path) -> None:
    config = DPOConfig(pref_loss="bco_pair", bco_delta="running_mean")
    whole = finish(quiet_args(save_steps=2), config)
    path = tmp_path / "run" / "checkpoints" / "step-2"
    resumed = finish(quiet_args(resume_from_checkpoint=str(path)), config)
    assert whole.engine.schedule.bco_delta == resumed.engine.schedule.bco_delta != 0.0
    assert same_parameters(whole, resumed)


def test_a_trainer_that_has_gone_on_can_go_back(quiet_args, tmp_path) -> None:
    trainer = finish(quiet_args(save_steps=2, warmup_steps=3))
    path, chunks, schedule = tmp_path / "run" / "checkpoints" / "step-2", trainer.models_wrapped, trainer.lr_scheduler
    assert schedule.num_steps == 4
    for _ in range(2):
        load(path, chunks, trainer.optimizer, schedule, read_state(path)["fingerprint"])
        assert schedule.num_steps == 2
    assert trainer.optimizer.param_groups[0]["lr"] == trainer.log_history[2]["lr"]


def test_new_run_refuses_a_directory_with_checkpoints(quiet_args, tmp_path) -> None:
    finish(quiet_args(save_steps=2))
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(CheckpointError, match="set resume_from_checkpoint: latest to continue it"):
        finish(quiet_args(learning_rate=0.5))
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_resume_without_a_checkpoint_names_the_directory(quiet_args, tmp_path) -> None:
    with pytest.raises(CheckpointError, match="no finished checkpoint under"):
        finish(quiet_args(resume_from_checkpoint="latest"))
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json is missing"):
        finish(quiet_args(resume_from_checkpoint=str(tmp_path)))
