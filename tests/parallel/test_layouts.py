"""Every layout of ranks trains like one process: losses, log-probs, gradient norms and final parameters."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fastpref.testing.tiny import tiny_pairs
from fastpref.testing.workers import RankPool
from fastpref.trainer import (
    DPOConfig,
    DPOTrainer,
    ModelOptions,
    TrainingArguments,
    build_models,
    initialize_megatron,
    load_models,
    save_hf,
)
from fastpref.trainer.platform import destroy

POLICY = Path(__file__).resolve().parents[1] / "golden" / "policy_init"
REFERENCE = POLICY.parent / "reference_init"
PAIRS = tiny_pairs(22, seed=11)
STEPS = 3


@dataclass(frozen=True)
class Layout:
    tp: int = 1
    pp: int = 1
    sp: bool = False
    distributed_optimizer: bool = False


def train(
    layout: Layout,
    dp: int,
    loss: DPOConfig,
    output_dir: str,
    pairs_per_microbatch: int = 2,
    config: dict | None = None,
    options: dict | None = None,
) -> list[dict]:
    """Three steps of 8 pairs on this rank; returns the log. The global batch is the same for every layout.

    Trains the recorded policy against its reference, or random weights of `config` against themselves; `options` are
    further `TrainingArguments`.
    """
    args = TrainingArguments(
        **(options or {}),
        output_dir=output_dir,
        per_device_train_batch_size=pairs_per_microbatch,
        gradient_accumulation_steps=8 // pairs_per_microbatch // dp,
        learning_rate=5e-3,
        # far above the rounding of the gradients, which Adam would otherwise blow up to full-sized updates
        adam_epsilon=1e-5,
        max_steps=STEPS,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        sequence_parallel=layout.sp,
        use_distributed_optimizer=layout.distributed_optimizer,
        logging_steps=1,
        report_to=(),
        disable_progress=True,
        save_on_end=False,
        log_token_stats=True,
        log_num_zeros_in_grad=True,
    )
    initialize_megatron(args)
    try:
        build = ModelOptions(sequence_parallel=layout.sp)
        policy = load_models(POLICY, build) if config is None else build_models(config, build, seed=5)
        reference = load_models(REFERENCE, build) if config is None and loss.use_ref_model else None
        trainer = DPOTrainer(policy, loss, reference, args, train_dataset=PAIRS, eval_dataset=PAIRS[:7])
        if config is not None:
            save_hf(trainer.model, output_dir + "/start", config)
        trainer.train()
        save_hf(trainer.model, output_dir + "/hf", POLICY if config is None else config)
        return trainer.log_history
    finally:
        destroy()


def exported(directory: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same_run(
    log: list[dict], expected: list[dict], directory: Path, expected_directory: Path, initial: Path = POLICY
) -> None:
    assert len(log) == len(expected) == STEPS + 1
    for ours, theirs in zip(log, expected, strict=True):
        assert set(ours) == set(theirs)
        for name, value in theirs.items():
            if not name.startswith(("perf/", "memory/")):
                # fp32 sums in another order; log-ratios near zero carry the absolute noise of sums near 30
                assert ours[name] == pytest.approx(value, rel=2e-5, abs=2e-6), f"step {ours['step']}: {name}"
    ours, theirs, start = exported(directory / "hf"), exported(expected_directory / "hf"), exported(initial)
    assert set(ours) == set(theirs) == set(start)
    for name, tensor in theirs.items():
        update = (tensor - start[name]).norm()
        assert update > 0 and (ours[name] - tensor).norm() <= 1e-3 * update, name


LOSSES = {
    "dpo": DPOConfig(),
    "orpo": DPOConfig(pref_loss="orpo"),
    "ipo+sft": DPOConfig(pref_loss=("ipo", "sft"), loss_weights=(1.0, 0.2)),
}
LAYOUTS = {
    "dp2": (Layout(), 2),
    "dp2-distributed-optimizer": (Layout(distributed_optimizer=True), 2),
    "tp2": (Layout(tp=2), 1),
    "tp2-sp": (Layout(tp=2, sp=True), 1),
    "pp2": (Layout(pp=2), 1),
}


@pytest.fixture(scope="module", params=LOSSES)
def single(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    directory = tmp_path_factory.mktemp("single")
    config = LOSSES[request.param]
    return config, train(Layout(), 1, config, str(directory)), directory


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_ranks_train_like_one(rank_pool_2: RankPool, single, tmp_path: Path, name: str) -> None:
    config, expected, directory = single
    layout, dp = LAYOUTS[name]
    logs = rank_pool_2.run(train, layout, dp, config, str(tmp_path))
    assert_same_run(logs[0], expected, tmp_path, directory)
    timing = ("perf/", "memory/")
    keep = [[{k: v for k, v in r.items() if not k.startswith(timing)} for r in log] for log in logs]
    assert keep[0] == keep[1]  # every rank sees the same metrics


@pytest.mark.parametrize("layout", [Layout(tp=2, pp=2), Layout(tp=2, sp=True)], ids=["tp2-pp2", "tp2-sp-dp2"])
def test_four_ranks_train_like_one(rank_pool_4: RankPool, tmp_path: Path, layout: Layout) -> None:
    expected = train(Layout(), 1, LOSSES["dpo"], str(tmp_path / "single"))
    dp = 4 // (layout.tp * layout.pp)
    logs = rank_pool_4.run(train, layout, dp, LOSSES["dpo"], str(tmp_path / "four"))
    assert_same_run(logs[0], expected, tmp_path / "four", tmp_path / "single")


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(tp=2, sp=True), Layout(pp=2)], ids=["tp2", "tp2-sp", "pp2"])
def test_tied_head_and_padded_vocabulary_train_like_one(rank_pool_2: RankPool, tmp_path: Path, layout: Layout) -> None:
    """The last stage and the first share one weight; 67 ids on two ranks leave one row that must never count."""
    config = json.loads((POLICY / "config.json").read_text())
    config |= {"tie_word_embeddings": True, "vocab_size": 67, "initializer_range": 0.2}
    arguments = (LOSSES["dpo"], str(tmp_path / "two"), 2, config)
    expected = train(Layout(), 1, LOSSES["dpo"], str(tmp_path / "one"), 2, config)
    logs = rank_pool_2.run(train, layout, 1, *arguments)
    if layout.tp == 2:  # the row that pads the vocabulary to 68 has a gradient of zeros: one per hidden channel
        for record in logs[0]:
            if "num_zeros_in_grad" in record:
                record["num_zeros_in_grad"] -= config["hidden_size"]
    assert_same_run(logs[0], expected, tmp_path / "two", tmp_path / "one", tmp_path / "one" / "start")


@pytest.mark.parametrize("layout", [Layout(), Layout(pp=2)], ids=["dp2", "pp2"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_overlapped_gradient_reduction_trains_like_one(
    rank_pool_2: RankPool, tmp_path: Path, tied: bool, layout: Layout
) -> None:
    """DDP waits for a gradient of every parameter; the head's is in `main_grad` already, an embedding's is not."""
    config = json.loads((POLICY / "config.json").read_text()) | {"tie_word_embeddings": tied, "initializer_range": 0.2}
    expected = train(Layout(), 1, LOSSES["dpo"], str(tmp_path / "one"), 2, config)
    options = {"overlap_grad_reduce": True}
    dp = 2 // layout.pp
    logs = rank_pool_2.run(train, layout, dp, LOSSES["dpo"], str(tmp_path / "two"), 2, config, options)
    assert_same_run(logs[0], expected, tmp_path / "two", tmp_path / "one", tmp_path / "one" / "start")


def test_active_head_trains_like_an_exact_one_and_reports_its_columns(rank_pool_2: RankPool, tmp_path: Path) -> None:
    """The golden policy is nearly untrained: all but a few columns are active, on each of two shards."""
    expected = train(Layout(), 1, LOSSES["dpo"], str(tmp_path / "exact"))
    options = {"head_backward": "active", "active_eps": 2**-10}
    logs = rank_pool_2.run(train, Layout(tp=2), 1, LOSSES["dpo"], str(tmp_path / "active"), 2, None, options)
    for ours, exact in zip(logs[0][:STEPS], expected, strict=False):
        assert 0.5 < ours["perf/active_vocab_fraction"] <= 1.0
        assert ours["perf/active_vocab_fallbacks"] == float(ours["perf/active_vocab_fraction"] == 1.0)
        assert 1.0 <= ours["perf/active_vocab_imbalance"] < 1.5
        assert 0.0 <= ours["perf/cold_mass"] <= 2**-10
        assert "perf/cold_mass" not in exact
        assert ours["grad_norm"] == pytest.approx(exact["grad_norm"], rel=2**-10)
        assert ours["perf/cold_mass"] == logs[1][ours["step"] - 1]["perf/cold_mass"]


def test_microbatch_size_does_not_change_the_run(tmp_path: Path) -> None:
    config = LOSSES["ipo+sft"]
    expected = train(Layout(), 1, config, str(tmp_path / "two"))
    log = train(Layout(), 1, config, str(tmp_path / "eight"), 8)
    assert_same_run(log, expected, tmp_path / "eight", tmp_path / "two")


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
