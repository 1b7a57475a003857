"""Adapters train alike in every layout, against the model without them; they are saved, resumed and resharded alone."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing import load_tensors_metadata
from safetensors.torch import load_file, save_file
from test_layouts import PAIRS, POLICY, REFERENCE
from test_resume_layouts import numbers

from checks.layout_parity.runs import LAYOUTS, STEPS
from fastpref.errors import CheckpointError
from fastpref.testing.workers import RankPool
from fastpref.trainer import (
    DPOConfig,
    DPOTrainer,
    LoraConfig,
    ModelOptions,
    TrainingArguments,
    add_lora,
    initialize_megatron,
    load_models,
    save_adapter,
)
from fastpref.trainer.ranks.platform import destroy

LORA = LoraConfig(r=4, lora_alpha=16.0)
ONE: dict = {}
SHARDED = "DP2 sharded optimizer"


def train_lora(settings: dict, lora: LoraConfig, output_dir: str, reference: str | None = None) -> list[dict]:
    """Three steps of 8 pairs on this rank; returns the log and writes `adapter`. The global batch never changes."""
    world_size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    dp = TrainingArguments(**settings, gradient_accumulation_steps=4).layout.data_parallel_size(world_size)
    args = TrainingArguments(
        **settings,
        output_dir=output_dir,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4 // dp,
        learning_rate=5e-3,
        # far above the rounding of the gradients, which Adam would otherwise blow up to full-sized updates
        adam_epsilon=1e-4,
        max_steps=STEPS,
        logging_steps=1,
        report_to=(),
        disable_progress=True,
        save_on_end=False,
        log_token_stats=True,
    )
    initialize_megatron(args)
    try:
        build = ModelOptions(sequence_parallel=args.sequence_parallel, recompute_granularity=args.recompute_granularity)
        policy = load_models(POLICY, build)
        add_lora(policy, POLICY, lora, seed=3)
        other = None if reference is None else load_models(reference, build)
        trainer = DPOTrainer(policy, DPOConfig(), other, args, train_dataset=PAIRS, eval_dataset=PAIRS[:7])
        trainer.train()
        save_adapter(trainer.model, output_dir + "/adapter")
        return trainer.log_history
    finally:
        destroy()


def adapter(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter" / "adapter_model.safetensors")


def assert_same_adapters(ours: dict, theirs: dict, start: dict) -> None:
    assert set(ours) == set(theirs) == set(start)
    for name, tensor in theirs.items():
        update = (tensor - start[name]).norm()
        assert update > 0 and (ours[name] - tensor).norm() <= 1e-3 * update, name


def assert_same_log(log: list[dict], expected: list[dict]) -> None:
    assert len(log) == len(expected)
    for ours, theirs in zip(numbers(log), numbers(expected), strict=True):
        # fp32 sums in another order; log-ratios near zero carry the absolute noise of sums near 30
        assert ours == pytest.approx(theirs, rel=2e-5, abs=2e-6)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> LoraConfig:
    """An adapter whose B is not zero, so that all gradients are full-sized from the first step."""
    directory = tmp_path_factory.mktemp("start")
    initialize_megatron(TrainingArguments())
    models = load_models(POLICY)
    add_lora(models, POLICY, LORA, seed=3)
    save_adapter(models, directory / "adapter")
    destroy()
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: tensor.normal_(std=0.1, generator=generator) if "lora_B" in name else tensor
        for name, tensor in adapter(directory).items()
    }
    save_file(tensors, directory / "adapter" / "adapter_model.safetensors")
    return replace(LORA, path=str(directory / "adapter"))


@pytest.fixture(scope="module")
def single(start: LoraConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], Path]:
    directory = tmp_path_factory.mktemp("single")
    return train_lora(ONE, start, str(directory)), directory


@pytest.mark.parametrize("name", ["TP2", "TP2-SP", "PP2", SHARDED, "DP2 overlapped reduce and gather"])
def test_lora_on_two_ranks_trains_like_one(
    rank_pool_2: RankPool, start: LoraConfig, single, tmp_path: Path, name: str
) -> None:
    expected, directory = single
    logs = rank_pool_2.run(train_lora, LAYOUTS[name][1], start, str(tmp_path))
    assert_same_log(logs[0], expected)
    assert_same_adapters(adapter(tmp_path), adapter(directory), adapter(Path(start.path).parent))


@pytest.mark.parametrize("form", [(), ("packing",), ("packing", "prefix_sharing")], ids="-".join)
def test_lora_on_halves_of_sequences_trains_like_one(
    rank_pool_2: RankPool, start: LoraConfig, single, tmp_path: Path, form: tuple[str, ...]
) -> None:
    expected, directory = single
    settings = {**LAYOUTS["CP2"][1], **dict.fromkeys(form, True)}
    logs = rank_pool_2.run(train_lora, settings, start, str(tmp_path))
    assert_same_log(logs[0], expected)
    assert_same_adapters(adapter(tmp_path), adapter(directory), adapter(Path(start.path).parent))


def test_lora_starts_at_its_reference_and_recomputes(single, tmp_path: Path) -> None:
    """Fresh adapters: the first loss is log 2, and gradients reach every adapter through recomputed layers."""
    log = train_lora(ONE, LORA, str(tmp_path / "plain"))
    assert log[0]["loss"] == pytest.approx(math.log(2.0), abs=1e-6)
    assert log[1]["loss"] < log[0]["loss"]
    again = train_lora({"recompute_granularity": "full"}, LORA, str(tmp_path / "full"))
    assert_same_log(again, log)


def test_lora_reference_is_the_frozen_model(start: LoraConfig, single, tmp_path: Path) -> None:
    """Adapters off and a second copy of the base give the same run; another model gives another."""
    expected, directory = single
    copied = train_lora(ONE, start, str(tmp_path / "copy"), reference=str(POLICY))
    assert numbers(copied) == numbers(expected)
    ours, theirs = adapter(tmp_path / "copy"), adapter(directory)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    other = train_lora(ONE, start, str(tmp_path / "other"), reference=str(REFERENCE))
    assert other[0]["loss"] != expected[0]["loss"]


def test_lora_dropout_is_part_of_the_step(start: LoraConfig, single, tmp_path: Path) -> None:
    """Masks follow seed and step, also where layers are recomputed; evaluation and reference draw none."""
    dropped = replace(start, lora_dropout=0.3)
    log = train_lora({"eval_on_start": True}, dropped, str(tmp_path / "one"))
    again = train_lora({"recompute_granularity": "full"}, dropped, str(tmp_path / "two"))
    assert log[1]["loss"] != single[0][0]["loss"]
    assert_same_log(again[:STEPS], log[1 : STEPS + 1])
    undropped = train_lora({"eval_on_start": True}, start, str(tmp_path / "none"))
    assert numbers(undropped)[0] == numbers(log)[0]


@pytest.mark.parametrize(("before", "after"), [("TP2", "TP2"), ("TP2", "PP2"), (SHARDED, None)])
def test_lora_resumes_in_any_layout(
    rank_pool_2: RankPool, start: LoraConfig, tmp_path: Path, before: str, after: str | None
) -> None:
    run = ({**LAYOUTS[before][1], "save_steps": 2}, start, str(tmp_path / "run"))
    whole = rank_pool_2.run(train_lora, *run)[0]
    step = tmp_path / "run" / "checkpoints" / "step-2"
    settings = {**LAYOUTS[after or before][1], "resume_from_checkpoint": str(step)}
    again = (settings, start, str(tmp_path / "again"))
    resumed = train_lora(*again) if after is None else rank_pool_2.run(train_lora, *again)[0]
    if after == before:
        assert numbers(resumed) == numbers(whole)[2:]
    assert_same_log(resumed, whole[2:])
    assert_same_adapters(adapter(tmp_path / "again"), adapter(tmp_path / "run"), adapter(Path(start.path).parent))
    saved = load_tensors_metadata(str(step))
    assert saved and all(".adapter.lora_" in name for name in saved)  # neither frozen weights nor moments of them


def test_lora_refuses_a_checkpoint_of_another_base_or_rank(tmp_path: Path, monkeypatch) -> None:
    train_lora({"save_steps": 2}, LORA, str(tmp_path / "run"))
    resume = {"resume_from_checkpoint": str(tmp_path / "run" / "checkpoints" / "step-2")}
    with pytest.raises(CheckpointError, match=r"another run: lora\.r: saved 4, now 2\."):
        train_lora(resume, replace(LORA, r=2), str(tmp_path / "rank"))
    monkeypatch.setattr("test_lora_layouts.POLICY", REFERENCE)
    with pytest.raises(CheckpointError, match="lora_base_checksum: saved"):
        train_lora(resume, LORA, str(tmp_path / "base"))
