"""Fault 33: a run continues in another layout; another model, batch, seed or loss is refused with both values."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_runs import PAIRS, finish, same_parameters

from checks.layout_parity.runs import LAYOUTS, TOLERANCES, ShortRun, train, untimed
from fastpref.checkpoint.directory import STATE_FILE
from fastpref.checkpoint.manifest import MANIFEST_FILE, file_names, record_files, write_manifest
from fastpref.errors import CheckpointError, ConfigError
from fastpref.run.architecture.rope import Rope
from fastpref.run.config.arguments import CHANGEABLE
from fastpref.testing.workers import RankPool
from fastpref.trainer import DPOConfig, TrainingArguments

TOLERANCE = TOLERANCES[torch.float32].metric


def assert_continues(resumed: list[dict], whole: list[dict]) -> None:
    for ours, theirs in zip(map(untimed, resumed), map(untimed, whole), strict=True):
        assert ours == pytest.approx(theirs, rel=TOLERANCE, abs=TOLERANCE)


def checkpoint(tmp_path: Path, step: int = 2) -> str:
    return str(tmp_path / "run" / "checkpoints" / f"step-{step}")


@pytest.mark.parametrize(("before", "after"), [("TP2", None), ("DP2 sharded optimizer", "PP2")])
def test_resume_in_another_world_or_layout(
    rank_pool_2: RankPool, tmp_path: Path, before: str, after: str | None
) -> None:
    first = ShortRun(loss=DPOConfig(), settings={**LAYOUTS[before][1], "save_steps": 2})
    whole = rank_pool_2.run(train, first, str(tmp_path / "run"))[0]
    kept = {name: True for name in first.settings if name == "use_distributed_optimizer"}
    layout = {} if after is None else LAYOUTS[after][1]
    again = replace(first, settings={**layout, **kept, "resume_from_checkpoint": checkpoint(tmp_path)})
    out = str(tmp_path / "again")
    resumed = train(again, out) if after is None else rank_pool_2.run(train, again, out)[0]
    assert_continues(resumed, whole[2:])


@pytest.mark.parametrize("size", [1, 4])
def test_resume_with_other_microbatches_of_the_same_batch(quiet_args, tmp_path, size: int) -> None:
    whole = finish(quiet_args(save_steps=2))
    split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
    resumed = finish(quiet_args(resume_from_checkpoint=checkpoint(tmp_path), **split))
    assert_continues(resumed.log_history, whole.log_history[2:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 7}, "seed: saved 42, now 7"),
        ({"shuffle": False}, "shuffle: saved True, now False"),
        ({"drop_last": True}, "drop_last: saved False, now True"),
        ({"per_device_train_batch_size": 1}, "global_batch_pairs: saved 4, now 2"),
        ({"use_distributed_optimizer": True}, "use_distributed_optimizer: saved False, now True"),
        ({"packing": True}, "packing: saved False, now True"),
    ],
)
def test_resume_refuses_what_would_lose_pairs_or_misread_the_file(
    quiet_args, tmp_path, change: dict, message: str
) -> None:
    finish(quiet_args(save_steps=2))
    everything = {"resume_allow_changes": CHANGEABLE}
    for allowed in ({}, everything):
        with pytest.raises(CheckpointError, match=message) as caught:
            finish(quiet_args(resume_from_checkpoint=checkpoint(tmp_path), **change, **allowed))
        assert "Use the saved settings or start a new run" in str(caught.value)
        assert "resume_allow_changes" not in str(caught.value)


def test_resume_refuses_other_data_and_another_model(quiet_args, tmp_path) -> None:
    finish(quiet_args(save_steps=2))
    args = quiet_args(resume_from_checkpoint=checkpoint(tmp_path), resume_allow_changes=("total_steps",))
    with pytest.raises(CheckpointError, match="num_train_pairs: saved 14, now 13"):
        finish(args, pairs=PAIRS[:13])
    # tensors of the same shapes, which would load without a word
    with pytest.raises(CheckpointError, match=r"model\.layernorm_epsilon: saved 1e-05, now 0\.001"):
        finish(args, layernorm_epsilon=1e-3)


@pytest.mark.parametrize("command", ["train", "eval"])
def test_command_refuses_weights_of_a_model_that_uses_them_otherwise(project: Path, run_cli, command: str) -> None:
    assert run_cli("train", "run.yaml", "training.max_steps=1").exit_code == 0
    again = ("training.max_steps=1", "training.resume_from_checkpoint=latest")
    result = run_cli(command, "run.yaml", *again, "model.config.rope_theta=5000.0")
    assert result.exit_code == 4, result.output
    assert "model.rope.theta: saved 10000.0, now 5000.0. " in result.stderr


# Settings that the oldest checkpoints do not know, by the entry of the fingerprint that lacks them.
UNKNOWN = {"prefix_sharing": None, "loss.label_smoothing": None, "model.rope": "kind", "lora": "use_rslora"}


def as_older(path: Path) -> None:
    """Make a checkpoint one of a version that did not have these settings yet."""
    state = json.loads((path / STATE_FILE).read_text())
    saved = state["fingerprint"]
    for name, inner in UNKNOWN.items():
        if inner is None:
            del saved[name]
    saved["model.rope"] = saved["model.rope"][: Rope._fields.index(UNKNOWN["model.rope"])]
    adapters = json.loads(saved["lora"])
    del adapters[UNKNOWN["lora"]]
    saved["lora"] = json.dumps(adapters, sort_keys=True)
    (path / STATE_FILE).write_text(json.dumps(state))
    (path / MANIFEST_FILE).unlink()
    write_manifest(path, record_files(path, file_names(path)))


def test_resume_takes_a_setting_that_the_checkpoint_does_not_know_for_its_default(project: Path, run_cli) -> None:
    """A new setting, at what runs before it did, once kept every older checkpoint from being continued."""
    run = ("train", "run.yaml", "training.packing=true", "lora.r=2")
    assert run_cli(*run, "training.save_steps=1").exit_code == 0
    as_older(project / "out" / "checkpoints" / "step-1")
    again = (*run, "training.resume_from_checkpoint=out/checkpoints/step-1")
    result = run_cli(*again)
    assert result.exit_code == 0, result.output
    assert run_cli("export", *run[1:], "--checkpoint", "out/checkpoints/step-1", "--output", "model").exit_code == 0
    changes = {
        "training.prefix_sharing=true": "prefix_sharing: saved False, now True. ",
        "loss.label_smoothing=0.1": "loss.label_smoothing: saved 0.0, now 0.1. ",
        "lora.use_rslora=true": "lora.use_rslora: saved False, now True. ",
        "model.config.rope_scaling={type: linear, factor: 2}": "model.rope.kind: saved 'default', now 'linear'. ",
    }
    for change, message in changes.items():
        result = run_cli(*again, change)
        assert result.exit_code == 4, result.output
        assert message in " ".join(result.stderr.split()), change
        result = run_cli("eval", *again[1:], change)
        is_of_weights = change.startswith(("lora.", "model."))
        assert (message in " ".join(result.stderr.split())) == is_of_weights


def test_resume_says_which_changes_can_be_allowed(quiet_args, tmp_path) -> None:
    finish(quiet_args(save_steps=2))
    changed = {"learning_rate": 2e-2, "weight_decay": 0.1, "resume_from_checkpoint": checkpoint(tmp_path)}
    with pytest.raises(CheckpointError) as caught:
        finish(quiet_args(**changed, resume_allow_changes=("weight_decay",)), DPOConfig(beta=0.3))
    assert "learning_rate: saved 0.01, now 0.02; loss.beta: saved 0.1, now 0.3. " in str(caught.value)
    assert str(caught.value).endswith("set resume_allow_changes: [learning_rate, loss, weight_decay]")
    assert "weight_decay: saved" not in str(caught.value)


def test_resume_changes_the_passes_of_the_head_on_purpose_only(quiet_args, tmp_path) -> None:
    finish(quiet_args(save_steps=2))
    changed = {"head_forward": "screened", "resume_from_checkpoint": checkpoint(tmp_path)}
    with pytest.raises(CheckpointError) as caught:
        finish(quiet_args(**changed))
    assert "head_forward: saved 'exact', now 'screened'. " in str(caught.value)
    assert str(caught.value).endswith("set resume_allow_changes: [head_forward]")
    allowed = {**changed, "resume_allow_changes": ("head_forward",), "output_dir": str(tmp_path / "again")}
    assert finish(quiet_args(**allowed)).log_history[0]["step"] == 3


def test_resume_with_allowed_changes_follows_the_new_settings(quiet_args, tmp_path) -> None:
    options = {"lr_scheduler_type": "linear", "max_steps": 6}
    finish(quiet_args(save_steps=2, **options))
    new = {"learning_rate": 4e-2, "min_lr": 1e-2, "adam_beta2": 0.9, "adam_epsilon": 1e-6, "weight_decay": 0.1}
    allowed = {"resume_from_checkpoint": checkpoint(tmp_path), "resume_allow_changes": (*new, "loss")}
    config = DPOConfig(beta=0.5)
    with pytest.raises(CheckpointError, match=r"steps after 2 that were saved with other settings \(step-4, step-6\)"):
        finish(quiet_args(**options | new | allowed), config)
    resumed = finish(quiet_args(output_dir=str(tmp_path / "changed"), **options | new | allowed), config)
    whole = finish(quiet_args(output_dir=str(tmp_path / "new"), **options | new), config)
    rates = [record["lr"] for record in whole.log_history if "lr" in record]
    assert [record["lr"] for record in resumed.log_history if "lr" in record] == rates[2:]
    assert rates[2] == pytest.approx(4e-2 - (4e-2 - 1e-2) * 2 / 6)
    for group in resumed.optimizer.param_groups:
        assert (group["betas"], group["eps"]) == ((0.9, 0.9), 1e-6)
    decays = {group["weight_decay"] for group in resumed.optimizer.param_groups}
    assert decays == {group["weight_decay"] for group in whole.optimizer.param_groups} == {0.1, 0.0}


def test_longer_run_continues_where_the_shorter_one_ended(quiet_args, tmp_path) -> None:
    """At a constant rate nothing else depends on the length: bitwise the run that was long from the start."""
    constant = {"lr_scheduler_type": "constant"}
    finish(quiet_args(max_steps=2, save_steps=2, **constant))
    longer = {"resume_from_checkpoint": checkpoint(tmp_path), "resume_allow_changes": ("total_steps",)}
    resumed = finish(quiet_args(max_steps=5, **constant, **longer))
    whole = finish(quiet_args(output_dir=str(tmp_path / "long"), max_steps=5, **constant))
    assert same_parameters(resumed, whole)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resume_from_checkpoint": "latest", "resume_allow_changes": ("seed",)}, "must name only .* got 'seed'"),
        ({"resume_allow_changes": ("loss",)}, r"resume_allow_changes \(loss\) is for a run that goes on"),
    ],
)
def test_allowed_changes_are_checked(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainingArguments(**settings)
