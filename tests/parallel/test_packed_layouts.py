"""Packed rows in every layout of two ranks train like padded rows in one process."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from checks.layout_parity.runs import EXPERTS, GEMMA, LAYOUTS, TOLERANCES, ShortRun, difference, train
from checks.tiny import pair_of, tiny_pairs
from fastpref.data import PackedCollator, PreferenceCollator
from fastpref.testing.workers import RankPool
from fastpref.trainer import DPOConfig, DPOTrainer, TrainingArguments, initialize_megatron, load_models
from fastpref.trainer.ranks.platform import destroy

POLICY = Path(__file__).resolve().parents[1] / "golden" / "policy_init"
PAIRS = tiny_pairs(22, seed=11)
PACKED = {
    "packed": {"packing": True, "pack_length": 48},
    "shared": {"packing": True, "prefix_sharing": True, "pack_length": 48},
}
RUN = ShortRun(loss=DPOConfig())


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], Path]:
    directory = tmp_path_factory.mktemp("padded")
    return train(RUN, str(directory)), directory


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize("name", ["DP2 sharded optimizer", "TP2", "TP2-SP recompute", "PP2", "PP2-VPP2", "CP2"])
def test_packed_ranks_train_like_one_padded(
    rank_pool_2: RankPool, padded, tmp_path: Path, name: str, packing: str
) -> None:
    settings = {**LAYOUTS[name][1], **PACKED[packing]}
    logs = rank_pool_2.run(train, replace(RUN, settings=settings), str(tmp_path))
    found = difference(logs[0], padded[0], tmp_path, padded[1])
    assert found.within(TOLERANCES[torch.float32]), found
    assert logs[0][0]["perf/positions_per_pair"] < padded[0][0]["perf/positions_per_pair"]


def test_packed_gemma_trains_like_padded_gemma(rank_pool_2: RankPool, tmp_path: Path) -> None:
    """Two rotary bases, one of them on layers with sliding windows, which reach over the ends of a rank's chunks."""
    # a larger scale of the scores than Gemma's makes attention sharp enough to tell masks apart
    policy = {**GEMMA, "query_pre_attn_scalar": 8}
    gemma = replace(RUN, policy=policy, loss=DPOConfig(pref_loss="orpo"))
    expected = train(gemma, str(tmp_path / "padded"))
    for name, settings in PACKED.items():
        log = train(replace(gemma, settings=settings), str(tmp_path / name))
        found = difference(log, expected, tmp_path / name, tmp_path / "padded")
        assert found.within(TOLERANCES[torch.float32]), found
    two = replace(gemma, settings={**LAYOUTS["CP2"][1], **PACKED["shared"]})
    (log, _) = rank_pool_2.run(train, two, str(tmp_path / "cp2"))
    found = difference(log, expected, tmp_path / "cp2", tmp_path / "padded")
    assert found.within(TOLERANCES[torch.float32]), found


def test_packed_experts_balance_over_context_ranks_as_in_one_process(rank_pool_2: RankPool, tmp_path: Path) -> None:
    """Each rank leaves out its own padding; rows are microbatches of their own, so that one process packs them, too."""
    run = replace(RUN, policy={**EXPERTS, "router_aux_loss_coef": 0.1}, settings=PACKED["shared"])
    expected = train(run, str(tmp_path / "one"))
    two = replace(run, settings={**LAYOUTS["CP2"][1], **PACKED["shared"]})
    log, _ = rank_pool_2.run(train, two, str(tmp_path / "two"))
    found = difference(log, expected, tmp_path / "two", tmp_path / "one")
    assert found.within(TOLERANCES[torch.float32]), found
    assert all(record["moe/load_balancing_loss"] > 1.0 for record in log[:-1])


def row_of_padding(output_dir: str, options: dict) -> list[dict]:
    """Two steps on one short pair in a row of 64 positions; returns the log."""
    args = TrainingArguments(
        output_dir=output_dir,
        max_steps=2,
        learning_rate=5e-3,
        logging_steps=1,
        report_to=(),
        disable_progress=True,
        save_on_end=False,
        packing=True,
        # the weights wait for a gradient on every rank
        overlap_grad_reduce=True,
        **options,
    )
    initialize_megatron(args)
    try:
        collator = PackedCollator(PreferenceCollator(0, pad_to_multiple_of=64), prefix_sharing=False)
        pairs = [pair_of(0, [1, 2, 3], [4, 5, 6, 7], [8, 9])]
        trainer = DPOTrainer(load_models(POLICY), DPOConfig(), None, args, train_dataset=pairs, data_collator=collator)
        trainer.train()
        return trainer.log_history
    finally:
        destroy()


def test_a_context_rank_with_padding_alone_takes_part(rank_pool_2: RankPool, tmp_path: Path) -> None:
    """The pair's 10 positions lie in the first of four chunks, and the second rank holds the two in the middle."""
    log, _ = rank_pool_2.run(row_of_padding, str(tmp_path / "two"), {"context_parallel_size": 2})
    for record, theirs in zip(log, row_of_padding(str(tmp_path / "one"), {}), strict=True):
        for name in ("loss", "grad_norm", "rewards/margins", "logps/chosen"):
            assert record[name] == pytest.approx(theirs[name], rel=2e-5, abs=2e-6), name


def short_step(dp: int, output_dir: str, options: dict) -> tuple[list[dict], list[list[float]]]:
    """5 pairs in batches of 4: the second step has one pair. Returns the log and the weights of its microbatches."""
    args = TrainingArguments(
        output_dir=output_dir,
        per_device_train_batch_size=4 // dp,
        learning_rate=5e-3,
        max_steps=2,
        logging_steps=1,
        report_to=(),
        disable_progress=True,
        save_on_end=False,
        **options,
    )
    initialize_megatron(args)
    try:
        trainer = DPOTrainer(load_models(POLICY), DPOConfig(pref_loss="orpo"), None, args, train_dataset=PAIRS[:5])
        trainer.train()
        return trainer.log_history, [batch.weights_B.tolist() for batch in trainer.feed.train_batches(1)]
    finally:
        destroy()


def test_a_rank_without_a_pair_runs_a_filler_at_weight_0(rank_pool_2: RankPool, tmp_path: Path) -> None:
    options = {"packing": True, "prefix_sharing": True}
    ranks = rank_pool_2.run(short_step, 2, str(tmp_path / "two"), options)
    expected, _ = short_step(1, str(tmp_path / "one"), {})
    assert sorted(weights for _, weights in ranks) == [[[0.0]], [[1.0]]]
    for record, theirs in zip(ranks[0][0], expected, strict=True):
        for name in ("loss", "grad_norm", "rewards/margins", "logps/chosen"):
            assert record[name] == pytest.approx(theirs[name], rel=2e-5, abs=2e-6), name
