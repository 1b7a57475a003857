"""Packed rows in every layout of two ranks train like padded rows in one process."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastpref.testing.layout_parity import LAYOUTS, MODEL, TOLERANCES, ShortRun, difference, train
from fastpref.testing.tiny import tiny_pairs
from fastpref.testing.workers import RankPool
from fastpref.trainer import DPOConfig, DPOTrainer, TrainingArguments, initialize_megatron, load_models
from fastpref.trainer.platform import destroy

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
@pytest.mark.parametrize("name", ["DP2 sharded optimizer", "TP2", "TP2-SP recompute", "PP2", "PP2-VPP2"])
def test_packed_ranks_train_like_one_padded(
    rank_pool_2: RankPool, padded, tmp_path: Path, name: str, packing: str
) -> None:
    settings = {**LAYOUTS[name][1], **PACKED[packing]}
    logs = rank_pool_2.run(train, replace(RUN, settings=settings), str(tmp_path))
    found = difference(logs[0], padded[0], tmp_path, padded[1])
    assert found.within(TOLERANCES[torch.float32]), found
    assert logs[0][0]["perf/positions_per_pair"] < padded[0][0]["perf/positions_per_pair"]


def test_packed_gemma_trains_like_padded_gemma(tmp_path: Path) -> None:
    """Two rotary bases, one of them on layers with sliding windows."""
    gemma = {
        **MODEL,
        "model_type": "gemma3_text",
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 8,
    }
    expected = train(replace(RUN, policy=gemma), str(tmp_path / "padded"))
    for name, settings in PACKED.items():
        log = train(replace(RUN, policy=gemma, settings=settings), str(tmp_path / name))
        found = difference(log, expected, tmp_path / name, tmp_path / "padded")
        assert found.within(TOLERANCES[torch.float32]), found


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
