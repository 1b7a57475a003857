"""Checkpoints of several ranks: continued bit for bit in the same layout, and within fp32 noise in another."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from checks.layout_parity.runs import GEMMA, LAYOUTS, MODEL, TOLERANCES, ShortRun, exported, train, untimed
from fastpref.errors import CheckpointError
from fastpref.losses import DPOConfig
from fastpref.testing.workers import RankPool
from fastpref.trainer import TrainingArguments, build_models, initialize_megatron
from fastpref.trainer.ranks.platform import destroy
from fastpref.trainer.saves.state import load_weights

CHECKPOINT = "checkpoints/step-2"


def short_run(name: str | None, model: dict = MODEL, **settings) -> ShortRun:
    """A run in one of `LAYOUTS`, five layers deep so that stages differ; None is one process."""
    layout = {} if name is None else LAYOUTS[name][1]
    policy = {**model, "num_hidden_layers": 5}
    return ShortRun(loss=DPOConfig(), settings={**layout, **settings}, policy=policy)


def numbers(log: list[dict]) -> list[dict]:
    return [untimed(record) for record in log]


@pytest.mark.parametrize(
    "name", ["DP2 sharded optimizer", "DP2 overlapped reduce and gather", "TP2", "PP2", "PP2-VPP2"]
)
def test_resume_in_the_same_layout_is_bitwise(rank_pool_2: RankPool, tmp_path: Path, name: str) -> None:
    whole = rank_pool_2.run(train, short_run(name, save_steps=2), str(tmp_path / "run"))[0]
    checkpoint = str(tmp_path / "run" / CHECKPOINT)
    again = short_run(name, resume_from_checkpoint=checkpoint)
    resumed = rank_pool_2.run(train, again, str(tmp_path / "again"))[0]
    assert numbers(resumed) == numbers(whole)[2:]
    first, second = exported(tmp_path / "run" / "hf"), exported(tmp_path / "again" / "hf")
    assert all((first[name] == second[name]).all() for name in first) and set(first) == set(second)


@pytest.mark.parametrize(
    ("model", "before", "after", "head_layers"),
    [
        (MODEL, "DP2 overlapped reduce and gather", None, 0.0),
        (MODEL, "TP2", "PP2-VPP2", 0.0),
        (MODEL, "PP2-VPP2", "TP2", 0.0),
        (MODEL, "PP2", "PP2-VPP2", 9.0),
        (GEMMA, "TP2-SP", "PP2-VPP2", 0.0),
    ],
)
def test_resume_in_another_layout(
    rank_pool_2: RankPool, tmp_path: Path, model: dict, before: str, after: str | None, head_layers: float
) -> None:
    whole = rank_pool_2.run(train, short_run(before, model, save_steps=2), str(tmp_path / "run"))[0]
    checkpoint = str(tmp_path / "run" / CHECKPOINT)
    sharded = {} if after is not None else {"use_distributed_optimizer": True}
    again = replace(short_run(after, model, resume_from_checkpoint=checkpoint, **sharded), head_layers=head_layers)
    if after is None:
        resumed = train(again, str(tmp_path / "again"))
    else:
        resumed = rank_pool_2.run(train, again, str(tmp_path / "again"))[0]
    tolerance = TOLERANCES[torch.float32].metric
    for ours, theirs in zip(numbers(resumed), numbers(whole)[2:], strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance, abs=tolerance)
    state = json.loads((tmp_path / "run" / CHECKPOINT / "state.json").read_text())
    assert state["step"] == 2 and state["layout"]["world_size"] == 2


def test_resume_refuses_the_other_optimizer(tmp_path: Path) -> None:
    train(short_run(None, save_steps=2), str(tmp_path / "run"))
    settings = {"resume_from_checkpoint": str(tmp_path / "run" / CHECKPOINT), "use_distributed_optimizer": True}
    with pytest.raises(CheckpointError, match="use_distributed_optimizer: saved False, now True"):
        train(short_run(None, **settings), str(tmp_path / "again"))


def saved_weights(checkpoint: str) -> list[torch.Tensor]:
    """The weights of a checkpoint of `short_run`, read by one process."""
    initialize_megatron(TrainingArguments())
    try:
        models = build_models(short_run(None).policy, seed=1)
        load_weights(Path(checkpoint), models)
        return list(models[0].parameters())
    finally:
        destroy()


def test_checkpoint_holds_weights_that_were_not_gathered_yet(rank_pool_2: RankPool, tmp_path: Path) -> None:
    """With `overlap_param_gather` each rank has updated only its own part when the step is over."""
    saved = []
    for name in ("DP2 sharded optimizer", "DP2 overlapped reduce and gather"):
        directory = tmp_path / str(len(saved))
        rank_pool_2.run(train, short_run(name, save_steps=2), str(directory))
        saved.append(saved_weights(str(directory / CHECKPOINT)))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*saved, strict=True))
