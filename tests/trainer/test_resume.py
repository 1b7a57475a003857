"""A run that is cut and resumed ends where the uninterrupted run ends, bit for bit."""

import json

import pytest
import torch

from fastpref.errors import CheckpointError
from fastpref.testing.tiny import stock_model, tiny_pairs
from fastpref.trainer import DPOConfig, DPOTrainer

PAIRS = tiny_pairs(14, seed=2)


def finish(args, config: DPOConfig | None = None, pairs=PAIRS) -> DPOTrainer:
    trainer = DPOTrainer(stock_model(0), config or DPOConfig(), None, args, train_dataset=pairs, eval_dataset=pairs[:3])
    trainer.train()
    return trainer


def same_parameters(a: DPOTrainer, b: DPOTrainer) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.model[0].parameters(), b.model[0].parameters(), strict=True))


@pytest.mark.parametrize("distributed", [False, True], ids=["plain", "distributed-optimizer"])
@pytest.mark.parametrize("cut", [1, 5], ids=["first-epoch", "second-epoch"])
def test_resume_equals_the_uninterrupted_run(quiet_args, tmp_path, cut: int, distributed: bool) -> None:
    options = {"num_train_epochs": 2, "warmup_steps": 2, "use_distributed_optimizer": distributed}
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
    assert whole.schedule.bco_delta == resumed.schedule.bco_delta != 0.0
    assert same_parameters(whole, resumed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 7}, "seed: saved 42, now 7"),
        ({"learning_rate": 2e-2}, "learning_rate: saved 0.01, now 0.02"),
        ({"per_device_train_batch_size": 1}, "global_batch_pairs: saved 4, now 2"),
    ],
)
def test_resume_refuses_another_run(quiet_args, tmp_path, change: dict, message: str) -> None:
    finish(quiet_args(save_steps=2))
    path = str(tmp_path / "run" / "checkpoints" / "step-2")
    with pytest.raises(CheckpointError, match=message):
        finish(quiet_args(resume_from_checkpoint=path, **change))
    with pytest.raises(CheckpointError, match="loss_sha256"):
        finish(quiet_args(resume_from_checkpoint=path), DPOConfig(beta=0.3))


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
