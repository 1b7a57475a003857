"""Weights in and out at the speed of one disk: one rank of those with the same shard reads, and nobody times out."""

from collections.abc import Callable
from pathlib import Path

import hf_oracle
import pytest
from megatron_runs import Layout
from safetensors.torch import load_file
from shared_weight_ranks import count_reads, fail_to_read, fail_to_write, load_slowly, resume_slowly, write_slowly

from checks.layout_parity.runs import EXPERTS, MODEL
from fastpref.testing.workers import RankPool
from fastpref.trainer import LoraConfig

# --- who reads


def sizes(path: Path) -> dict[str, int]:
    return {name: tensor.numel() for name, tensor in hf_oracle.read_tensors(path).items()}


@pytest.mark.parametrize(
    ("variant", "layout", "readers"),
    [
        ("llama", Layout(), 1),
        ("llama", Layout(tp=2), 2),
        ("llama", Layout(pp=2), 2),
        ("qwen3-moe", Layout(ep=2), 2),
        ("qwen3-moe", Layout(tp=2, sp=True, ep=2), 2),
    ],
    ids=str,
)
def test_of_the_ranks_with_the_same_shard_one_reads(
    rank_pool_4: RankPool, tmp_path: Path, variant: str, layout: Layout, readers: int
) -> None:
    path = hf_oracle.save(hf_oracle.make_model(variant), tmp_path / "model")
    read = rank_pool_4.run(count_reads, str(path), str(tmp_path / "out"), layout, None)
    hf_oracle.assert_same_bits(hf_oracle.read_tensors(tmp_path / "out"), hf_oracle.read_tensors(path))
    assert sum(count > 0 for count in read) == readers
    total = sum(sizes(path).values())
    if layout.pp * layout.tp == 1:
        assert sum(read) == total
    else:  # norms and routers are on every tensor-parallel rank, a tied embedding on two stages
        assert total <= sum(read) < 1.6 * total


def test_one_replica_reads_the_adapters(rank_pool_4: RankPool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft, which writes the adapters, is not installed")
    model = hf_oracle.make_model("llama")
    path = hf_oracle.save(model, tmp_path / "model")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    wrapped.save_pretrained(tmp_path / "adapter")
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=("q_proj", "down_proj"), path=str(tmp_path / "adapter"))
    read = rank_pool_4.run(count_reads, str(path), str(tmp_path / "out"), Layout(), lora)
    saved, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "out"))
    assert read == [sum(tensor.numel() for tensor in saved.values()), 0, 0, 0]
    hf_oracle.assert_same_bits(again, saved)


# --- how long it takes


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(pp=2), Layout()], ids=str)
@pytest.mark.parametrize("task", [load_slowly, write_slowly])
def test_a_disk_slower_than_the_timeout(
    rank_pool_2: RankPool, tmp_path: Path, task: Callable[[str, str, Layout], None], layout: Layout
) -> None:
    path = hf_oracle.save(hf_oracle.make_model("llama"), tmp_path / "model")
    rank_pool_2.run(task, str(path), str(tmp_path / "out"), layout)
    hf_oracle.assert_same_bits(hf_oracle.read_tensors(tmp_path / "out"), hf_oracle.read_tensors(path))


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (EXPERTS, {"expert_model_parallel_size": 2, "use_distributed_optimizer": True}),
        (MODEL, {"tensor_model_parallel_size": 2, "bf16": True}),
    ],
    ids=["sharded experts", "plain TP2"],
)
def test_a_disk_slower_than_the_timeout_under_a_checkpoint(
    rank_pool_2: RankPool, tmp_path: Path, config: dict, settings: dict
) -> None:
    rank_pool_2.run(resume_slowly, config, settings, str(tmp_path))


# --- what goes wrong


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(ep=1)], ids=str)
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), RuntimeError("the file ends early")], ids=repr)
def test_what_one_rank_cannot_read_fails_on_all(
    rank_pool_4: RankPool, tmp_path: Path, layout: Layout, error: Exception
) -> None:
    path = hf_oracle.save(hf_oracle.make_model("llama"), tmp_path / "model")
    said = rank_pool_4.run(fail_to_read, str(path), layout, error, 0)
    assert all("reading weights failed: rank 0: " in text or text == f"RuntimeError: {error}" for text in said), said
    assert all(str(error.args[-1]) in text for text in said)


def test_a_disk_that_fills_in_the_middle_and_then_does_not(rank_pool_4: RankPool, tmp_path: Path) -> None:
    path = hf_oracle.save(hf_oracle.make_model("llama"), tmp_path / "model")
    for said in rank_pool_4.run(fail_to_write, str(path), str(tmp_path / "out"), Layout(tp=2, pp=2)):
        assert said.startswith("[Errno 28] writing weights failed (rank 0: ")
    hf_oracle.assert_same_bits(hf_oracle.read_tensors(tmp_path / "out"), hf_oracle.read_tensors(path))
