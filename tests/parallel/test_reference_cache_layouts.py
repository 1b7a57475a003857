"""A cache of reference log-probs does not depend on the layout that wrote it, nor on the one that reads it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from checks.tiny import TINY_LLAMA, tiny_pairs
from fastpref.data import PreferenceDataset
from fastpref.run.config.layout import ParallelLayout as Layout
from fastpref.testing.workers import RankPool
from fastpref.trainer import (
    DPOConfig,
    DPOTrainer,
    ModelOptions,
    ReferenceCache,
    TrainingArguments,
    build_models,
    initialize_megatron,
    load_models,
    score_reference,
)
from fastpref.trainer.ranks.platform import destroy
from fastpref.trainer.reference import scoring

POLICY = Path(__file__).resolve().parents[1] / "golden" / "policy_init"
REFERENCE = POLICY.parent / "reference_init"
PAIRS = tiny_pairs(22, seed=11)
CONFIG = DPOConfig(ld_alpha=0.5)
LAYOUTS = {"dp2": Layout(), "tp2": Layout(tp=2), "tp2-sp": Layout(tp=2, sequence_parallel=True), "pp2": Layout(pp=2)}
TIMES = ("perf/", "memory/")
SHARP = TINY_LLAMA | {"initializer_range": 0.2}
"""Random weights at which log-probs are far from even, so that roundings show."""


def arguments(layout: Layout, output_dir: str = "unused", dp: int = 1) -> TrainingArguments:
    return TrainingArguments(
        output_dir=output_dir,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4 // dp,
        learning_rate=5e-3,
        adam_epsilon=1e-5,
        max_steps=3,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        context_parallel_size=layout.cp,
        sequence_parallel=layout.sequence_parallel,
        logging_steps=1,
        report_to=(),
        disable_progress=True,
        save_on_end=False,
    )


def score(layout: Layout, path: str, cut_after: int = 99) -> list[range]:
    """Score on this rank, up to `cut_after` shards; returns the pairs of those that were scored."""
    args, scored, score_shard = arguments(layout), [], scoring._score_shard

    def cut(reference, dataset, pairs, *rest):
        if len(scored) == cut_after:
            raise InterruptedError
        scored.append(pairs)
        return score_shard(reference, dataset, pairs, *rest)

    scoring._score_shard = cut
    initialize_megatron(args)
    try:
        models = load_models(REFERENCE, ModelOptions(sequence_parallel=layout.sequence_parallel))
        score_reference(models, [PreferenceDataset(PAIRS)], path, args, identity={"weights": "golden"}, shard_pairs=8)
    except InterruptedError:
        pass
    finally:
        scoring._score_shard = score_shard
        destroy()
    return scored


def train(layout: Layout, path: str | None, output_dir: str, dp: int = 1) -> list[dict]:
    """Train on this rank from the cache `path`, or with the reference in memory."""
    args = arguments(layout, output_dir, dp)
    initialize_megatron(args)
    try:
        build = ModelOptions(sequence_parallel=layout.sequence_parallel)
        reference = load_models(REFERENCE, build) if path is None else ReferenceCache(path)
        data = PreferenceDataset(PAIRS)
        trainer = DPOTrainer(load_models(POLICY, build), CONFIG, reference, args, train_dataset=data, eval_dataset=data)
        trainer.train()
        return trainer.log_history
    finally:
        destroy()


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    """A cache that one process wrote, and the log of one process with the reference in memory."""
    folder = tmp_path_factory.mktemp("single")
    assert score(Layout(), str(folder / "cache")) == [range(0, 8), range(8, 16), range(16, 22)]
    return folder / "cache", train(Layout(), None, str(folder / "run"))


def assert_same_log(ours: list[dict], theirs: list[dict]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        for name, value in other.items():
            if not name.startswith(TIMES):
                assert mine[name] == pytest.approx(value, rel=2e-5, abs=2e-6), f"step {mine['step']}: {name}"


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_ranks_read_and_write_what_one_process_does(rank_pool_2: RankPool, single, tmp_path, name: str) -> None:
    cache, log = single
    layout, path = LAYOUTS[name], str(tmp_path / "cache")
    dp = 2 if layout == Layout() else 1
    for ours in rank_pool_2.run(train, layout, str(cache), str(tmp_path / "run"), dp):
        assert_same_log(ours, log)

    rank_pool_2.run(score, layout, path)
    data = PreferenceDataset(PAIRS)
    torch.testing.assert_close(ReferenceCache(path).read(data), ReferenceCache(cache).read(data), rtol=1e-6, atol=1e-5)
    assert_same_log(train(Layout(), path, str(tmp_path / "one")), log)


def test_cut_pass_of_two_ranks_is_finished_by_one(rank_pool_2: RankPool, single, tmp_path) -> None:
    path, data = str(tmp_path / "cache"), PreferenceDataset(PAIRS)
    assert rank_pool_2.run(score, Layout(tp=2), path, 2) == [[range(0, 8), range(8, 16)]] * 2
    assert score(Layout(), path) == [range(16, 22)]
    torch.testing.assert_close(
        ReferenceCache(path).read(data), ReferenceCache(single[0]).read(data), rtol=1e-6, atol=1e-5
    )


def first_logs(layout: Layout, path: str, output_dir: str, settings: dict) -> list[dict[str, float]]:
    """Metrics before and at the first step of runs that start at their reference: a cache, then a copy in memory."""
    args = replace(arguments(layout, output_dir), max_steps=1, eval_on_start=True, **settings)
    initialize_megatron(args)
    logs = []
    try:
        options, data = ModelOptions(sequence_parallel=layout.sequence_parallel), PreferenceDataset(PAIRS)
        for name, reference in (("cached", ReferenceCache(path, starts_at_policy=True)), ("live", None)):
            args = replace(args, output_dir=f"{output_dir}-{name}")
            models = build_models(SHARP, options, seed=0)
            trainer = DPOTrainer(models, DPOConfig(), reference, args, train_dataset=data, eval_dataset=data)
            trainer.train()
            logs.append(trainer.log_history[0] | trainer.log_history[1])
    finally:
        destroy()
    return logs


SHARED = {"packing": True, "prefix_sharing": True}
TIED = [(name, "shared", SHARED) for name in (*LAYOUTS, "cp2")] + [(name, "padded", {}) for name in ("dp2", "tp2")]


@pytest.fixture(scope="module")
def cache_of_one_process(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("reference") / "cache")
    initialize_megatron(arguments(Layout()))
    models = build_models(SHARP, seed=0)
    score_reference(models, [PreferenceDataset(PAIRS)], path, arguments(Layout()), identity={})
    destroy()
    return path


@pytest.mark.parametrize(("name", "form", "settings"), TIED, ids=[f"{name}-{form}" for name, form, _ in TIED])
def test_every_layout_ties_a_policy_with_its_reference(
    rank_pool_2: RankPool, cache_of_one_process: str, tmp_path, name: str, form: str, settings: dict
) -> None:
    """With a cache that one process wrote, and with a copy in memory, whose margins are exactly 0."""
    layout = (LAYOUTS | {"cp2": Layout(cp=2)})[name]
    for cached, live in rank_pool_2.run(first_logs, layout, cache_of_one_process, str(tmp_path / form), settings):
        for log in (cached, live):
            assert log["rewards/accuracies"] == log["eval_rewards/accuracies"] == 0.5
        for metric in ("rewards/margins", "kl/chosen", "kl/rejected"):
            assert live[metric] == live[f"eval_{metric}"] == 0.0, metric


def refused(path: str) -> str:
    """Error of this rank when the cache is read."""
    try:
        train(Layout(), path, "unused", 2)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_damage_is_an_error_on_every_rank(rank_pool_2: RankPool, tmp_path) -> None:
    score(Layout(), str(tmp_path / "cache"))
    shard = tmp_path / "cache" / "0-000001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    for text in rank_pool_2.run(refused, str(tmp_path / "cache")):
        assert text.startswith("CheckpointError: reading the reference cache failed: rank 0, 1: ")
        assert "0-000001.safetensors has SHA-256" in text
