"""Every layout of ranks trains like one process: losses, log-probs, gradient norms and final parameters."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from checks.layout_parity.runs import (
    EXPERT_LAYOUTS,
    EXPERTS,
    GEMMA,
    LAYOUTS,
    MODEL,
    STEPS,
    TOLERANCES,
    WINDOWED,
    ShortRun,
    difference,
    train,
    untimed,
)
from checks.tiny import tiny_pairs
from fastpref.testing.workers import RankPool
from fastpref.trainer import DPOConfig, DPOTrainer, TrainingArguments, initialize_megatron, load_models
from fastpref.trainer.ranks.platform import destroy

POLICY = Path(__file__).resolve().parents[1] / "golden" / "policy_init"
REFERENCE = POLICY.parent / "reference_init"
PAIRS = tiny_pairs(22, seed=11)


LOSSES = {
    "dpo": DPOConfig(),
    "orpo": DPOConfig(pref_loss="orpo"),
    "ipo+sft": DPOConfig(pref_loss=("ipo", "sft"), loss_weights=(1.0, 0.2)),
}
TIED = {**MODEL, "tie_word_embeddings": True, "vocab_size": 67}
TOLERANCE = TOLERANCES[torch.float32]
Compare = Callable[..., list[list[dict]]]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Callable[[ShortRun], tuple[list[dict], Path]]:
    """Log and directory of a run in this process, kept for the module."""
    done: dict[str, tuple[list[dict], Path]] = {}

    def once(run: ShortRun) -> tuple[list[dict], Path]:
        if repr(run) not in done:
            directory = tmp_path_factory.mktemp("one")
            done[repr(run)] = train(run, str(directory)), directory
        return done[repr(run)]

    return once


@pytest.fixture
def trains_like_one(rank_pool_2: RankPool, rank_pool_4: RankPool, tmp_path: Path, one_process) -> Compare:
    """Runs a layout on worker ranks and requires what one process gets; returns the ranks' logs."""

    def check(ranks: int, settings: dict[str, Any], loss: str = "dpo", **run: Any) -> list[list[dict]]:
        pool = rank_pool_2 if ranks == 2 else rank_pool_4
        logs = pool.run(train, ShortRun(loss=LOSSES[loss], settings=settings, **run), str(tmp_path / "run"))
        run.pop("head_layers", None)
        expected, directory = one_process(ShortRun(loss=LOSSES[loss], **run))
        log = [dict(record) for record in logs[0]]
        if run.get("policy") == TIED and settings.get("tensor_model_parallel_size") == 2:
            # the row that pads the vocabulary to 68 has a gradient of zeros: one per hidden channel
            for record in log[:STEPS]:
                record["num_zeros_in_grad"] -= MODEL["hidden_size"]
        found = difference(log, expected, tmp_path / "run", directory)
        assert found.within(TOLERANCE), found
        return logs

    return check


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_trains_like_one_process(trains_like_one: Compare, name: str) -> None:
    logs = trains_like_one(*LAYOUTS[name])
    every_rank = [[untimed(record) for record in log] for log in logs]
    assert all(log == every_rank[0] for log in every_rank)


@pytest.mark.parametrize("name", ["TP2-SP", "PP2-VPP2", "CP2", "DP2 sharded optimizer"])
@pytest.mark.parametrize("loss", ["orpo", "ipo+sft"])
def test_other_losses_train_like_one_process(trains_like_one: Compare, name: str, loss: str) -> None:
    trains_like_one(*LAYOUTS[name], loss)


@pytest.mark.parametrize(
    "name", ["TP2", "TP2-SP", "PP2", "PP2-VPP2", "DP2 overlapped reduce", "DP2 overlapped reduce and gather"]
)
def test_tied_head_and_padded_vocabulary_train_like_one_process(trains_like_one: Compare, name: str) -> None:
    """The last stage and the first share one weight; 67 ids on two ranks leave one row that must never count; DDP waits
    for a gradient of every parameter, where the head's is in `main_grad` already and an embedding's is not."""
    trains_like_one(*LAYOUTS[name], policy=TIED)


@pytest.mark.parametrize(
    "name", ["TP2-SP recompute", "PP2-VPP2", "DP2 overlapped reduce and gather", "TP2 x PP2", "TP2-SP x PP2-VPP2"]
)
def test_gemma_trains_like_one_process(trains_like_one: Compare, name: str) -> None:
    """A scaled and tied embedding, norms behind every branch, two ropes."""
    trains_like_one(*LAYOUTS[name], policy=GEMMA)


@pytest.mark.parametrize("name", ["EP2 x CP2", "EP2 x PP2-VPP2"])
def test_expert_layout_trains_like_one_process(trains_like_one: Compare, name: str) -> None:
    """The rest of `EXPERT_LAYOUTS` is trained in `test_experts.py`, with a load-balancing loss."""
    trains_like_one(*EXPERT_LAYOUTS[name], policy=EXPERTS)


@pytest.mark.parametrize(
    "policy",
    [WINDOWED, GEMMA, TIED, {**EXPERTS, "router_aux_loss_coef": 0.01}],
    ids=["windowed", "gemma", "tied", "experts"],
)
def test_context_parallel_models_train_like_one_process(trains_like_one: Compare, policy: dict) -> None:
    """Windows of 4 positions end within a chunk and reach into the one before; experts balance over all of a row."""
    trains_like_one(*LAYOUTS["CP2"], policy=policy)


@pytest.mark.parametrize("head_layers", [1.0, 9.0], ids=["one-layer-on-the-last", "none-on-the-last"])
@pytest.mark.parametrize("name", ["PP2", "PP2-VPP2"])
def test_uneven_pipeline_trains_like_one_process(trains_like_one: Compare, name: str, head_layers: float) -> None:
    trains_like_one(*LAYOUTS[name], policy={**MODEL, "num_hidden_layers": 5}, head_layers=head_layers)


def test_active_head_trains_like_an_exact_one_and_reports_its_columns(
    rank_pool_2: RankPool, one_process, tmp_path: Path
) -> None:
    """The golden policy is nearly untrained: all but a few columns are active, on each of two shards."""
    run = ShortRun(loss=LOSSES["dpo"], policy=str(POLICY), reference=str(REFERENCE))
    exact_log, _ = one_process(run)
    active = {"head_backward": "active", "active_eps": 2**-10, "tensor_model_parallel_size": 2}
    logs = rank_pool_2.run(train, replace(run, settings=active), str(tmp_path))
    for ours, exact in zip(logs[0][:STEPS], exact_log, strict=False):
        assert 0.5 < ours["perf/active_vocab_fraction"] <= 1.0
        assert ours["perf/active_vocab_fallbacks"] == float(ours["perf/active_vocab_fraction"] == 1.0)
        assert 1.0 <= ours["perf/active_vocab_imbalance"] < 1.5
        assert 0.0 <= ours["perf/cold_mass"] <= 2**-10
        assert "perf/cold_mass" not in exact
        assert ours["grad_norm"] == pytest.approx(exact["grad_norm"], rel=2**-10)
        assert ours["perf/cold_mass"] == logs[1][ours["step"] - 1]["perf/cold_mass"]


def test_microbatch_size_does_not_change_the_run(one_process) -> None:
    run = ShortRun(loss=LOSSES["ipo+sft"])
    expected, expected_dir = one_process(run)
    log, directory = one_process(replace(run, pairs_per_microbatch=8))
    assert difference(log, expected, directory, expected_dir).within(TOLERANCE)


def test_aot_sorts_over_all_ranks(rank_pool_2: RankPool, tmp_path: Path) -> None:
    logs = rank_pool_2.run(train_aot, 2, str(tmp_path / "two"))
    expected = train_aot(1, str(tmp_path / "one"))
    for ours, theirs in zip(logs[0], expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-5)


def train_aot(dp: int, output_dir: str) -> list[dict]:
    args = TrainingArguments(
        output_dir=output_dir,
        per_device_train_batch_size=8 // dp,
        learning_rate=5e-3,
        max_steps=STEPS,
        logging_steps=1,
        report_to=(),
        disable_progress=True,
        save_on_end=False,
    )
    initialize_megatron(args)
    try:
        reference = load_models(REFERENCE)
        trainer = DPOTrainer(load_models(POLICY), DPOConfig(pref_loss="aot"), reference, args, train_dataset=PAIRS)
        trainer.train()
        return trainer.log_history
    finally:
        destroy()
