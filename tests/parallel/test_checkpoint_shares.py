"""Every rank holds, writes and reads its share of a checkpoint; all shares are what Megatron would have saved whole."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.utils import extract_nonpersistent, extract_sharded_base

from checks.layout_parity.runs import EXPERTS, LAYOUTS, MODEL
from fastpref.errors import CheckpointError
from fastpref.testing.workers import RankPool
from fastpref.trainer import LoraConfig, ModelOptions, TrainingArguments, add_lora, build_models, initialize_megatron
from fastpref.trainer.model.chunks import unwrap
from fastpref.trainer.model.lora import sharded_weights
from fastpref.trainer.ranks.platform import destroy
from fastpref.trainer.saves import content
from fastpref.trainer.saves.save import Save
from fastpref.trainer.saves.shards import Shards
from fastpref.trainer.step.optimizer import build_optimizer, build_scheduler, wrap_for_training

# A vocabulary that two tensor-parallel ranks pad.
TIED = {**MODEL, "num_hidden_layers": 4, "vocab_size": 63, "tie_word_embeddings": True}
SHARDED = {"use_distributed_optimizer": True}
BF16 = {"bf16": True}
EP2 = {"expert_model_parallel_size": 2}
TP2, VPP2 = LAYOUTS["TP2"][1], LAYOUTS["PP2-VPP2"][1]
LORA = LoraConfig(r=4, target_modules=["q_proj", "o_proj", "gate_proj", "up_proj"])


class Built(NamedTuple):
    models: list
    optimizer: Any
    scheduler: Any


@contextmanager
def built(config: dict, settings: Mapping[str, Any], lora: LoraConfig | None = None, seed: int = 0) -> Iterator[Built]:
    args = TrainingArguments(learning_rate=1e-2, max_steps=4, gradient_accumulation_steps=2, **settings)
    initialize_megatron(args)
    try:
        options = ModelOptions(params_dtype=args.params_dtype, sequence_parallel=args.sequence_parallel)
        chunks = build_models(config, options, seed=seed)
        if lora is not None:
            add_lora(chunks, config, lora, seed=seed)
        models = wrap_for_training(chunks, args)
        optimizer = build_optimizer(models, args)
        yield Built(models, optimizer, build_scheduler(optimizer, args, 4))
    finally:
        destroy()


def take_steps(run: Built, number: int) -> None:
    """Updates by random gradients, the same on ranks that hold the same."""
    for step in range(number):
        generator = torch.Generator().manual_seed(step)
        for model in run.models:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
        run.optimizer.step()
    run.scheduler.step(number)


def save(run: Built, root: str) -> None:
    Save(Path(root), *run, {"step": 1}, copies=True, keep=None, timeout_s=60.0).finish()


def save_in_both_ways(config: dict, settings: dict, lora: LoraConfig | None, root: str) -> None:
    """Two updates; then `step-1` as it is now, and `whole` as Megatron gathers it, in the form of older versions."""
    with built(config, settings, lora) as run:
        take_steps(run, 2)
        save(run, root)
        metadata = {
            "distrib_optim_sharding_type": "fully_reshardable",
            "chained_optim_avoid_prefix": True,
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        }
        payload = {f"model{i}": sharded_weights(unwrap(model), metadata) for i, model in enumerate(run.models)}
        payload["optimizer"] = run.optimizer.sharded_state_dict(payload, is_loading=False, metadata=metadata)
        small = extract_sharded_base(extract_nonpersistent(payload)[1])[1]
        if torch.distributed.get_rank() == 0:
            Path(root, "whole").mkdir()
        torch.distributed.barrier()
        dist_checkpointing.save(payload, f"{root}/whole")
        if torch.distributed.get_rank() == 0:
            torch.save({**small, "scheduler": run.scheduler.state_dict()}, f"{root}/whole/common.pt")
        torch.distributed.barrier()


def load_and_save(config: dict, settings: dict, lora: LoraConfig | None, path: str, root: str) -> list[Any]:
    """Continue at once from a checkpoint, in another model; returns the positions of schedule and optimizers."""
    with built(config, settings, lora, seed=0 if lora else 9) as run:
        small = content.load_all(Path(path), run.models, run.optimizer)
        run.scheduler.load_state_dict(small["scheduler"])
        save(run, root)
        again = content.load_all(Path(root, "step-1"), run.models, run.optimizer)
        return [run.scheduler.num_steps, steps_of(small["optimizer"]), steps_of(again["optimizer"])]


def steps_of(node: Any) -> set[float]:
    """Every number of updates that the optimizer's settings tell."""
    if isinstance(node, dict):
        own = {float(value) for key, value in node.items() if key in ("step", "common_step")}
        return own.union(*map(steps_of, node.values()))
    return set().union(*map(steps_of, node)) if isinstance(node, list) else set()


def stored(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole, read without Megatron."""
    reader = dcp.FileSystemReader(path)
    entries = reader.read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries.items()
        if hasattr(entry, "size")
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """Whether tensors are equal in every number, but for rows that pad a vocabulary."""
    assert set(ours) == set(theirs) and len(ours) > 4
    for name, tensor in ours.items():
        rows = min(len(tensor), len(theirs[name]))
        assert torch.equal(tensor[:rows], theirs[name][:rows]), name
        assert bool(tensor.any()), name
    return True


CASES = {
    "fp32": (TIED, None, (4, SHARDED), (4, {**VPP2, **SHARDED})),
    "bf16": (TIED, None, (4, {**SHARDED, **BF16}), (4, {**TP2, **SHARDED, **BF16})),
    "bf16 to one rank": (TIED, None, (4, {**TP2, **SHARDED, **BF16}), (1, {**SHARDED, **BF16})),
    "CP2": (MODEL, None, (4, {**SHARDED, **BF16, "context_parallel_size": 2}), (2, {**TP2, **SHARDED, **BF16})),
    "plain fp32": (TIED, None, (2, {}), (2, VPP2)),
    "plain bf16": (TIED, None, (4, {**TP2, **BF16}), (2, BF16)),
    "experts": (EXPERTS, None, (4, {**EP2, **SHARDED, **BF16}), (2, {**SHARDED, **BF16})),
    "experts to one rank": (EXPERTS, None, (4, {**EP2, **TP2, "sequence_parallel": True, **SHARDED}), (1, SHARDED)),
    "plain experts": (EXPERTS, None, (2, {**EP2, **BF16}), (2, BF16)),
    "adapters": (MODEL, LORA, (4, {**SHARDED, **BF16}), (2, {**TP2, **SHARDED, **BF16})),
    "plain adapters": (MODEL, LORA, (2, {}), (2, TP2)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_state_is_the_same_in_any_layout(
    rank_pool_2: RankPool, rank_pool_4: RankPool, tmp_path: Path, name: str
) -> None:
    config, lora, (ranks, settings), (other_ranks, other_settings) = CASES[name]
    pools = {2: rank_pool_2.run, 4: rank_pool_4.run, 1: lambda function, *arguments: [function(*arguments)]}
    pools[ranks](save_in_both_ways, config, settings, lora, str(tmp_path))
    ours, theirs = stored(tmp_path / "step-1"), stored(tmp_path / "whole")
    if SHARDED.items() <= settings.items() and not BF16.items() <= settings.items():
        # an fp32 weight is its own master copy, which older versions stored twice
        theirs = {key: tensor for key, tensor in theirs.items() if not key.startswith("optimizer.state.param.")}
    assert same(ours, theirs)
    for form in ("step-1", "whole"):
        arguments = (config, other_settings, lora, str(tmp_path / form), str(tmp_path / f"from-{form}"))
        assert pools[other_ranks](load_and_save, *arguments) == [[2, {2.0}, {2.0}]] * other_ranks
        assert same(stored(tmp_path / f"from-{form}" / "step-1"), ours)


def held_bytes(settings: dict) -> tuple[int, int, int]:
    """What a save beside training holds on this rank, what its list says, and the trained numbers of the model.

    The ranks come one after the other, so that one which waited for another would hang.
    """
    with built(MODEL, settings) as run:
        take_steps(run, 1)
        found = (0, 0, 0)
        for rank in range(torch.distributed.get_world_size()):
            if rank == torch.distributed.get_rank():
                shards = Shards(*content.parts_to_save(run.models, run.optimizer))
                shards.to_host(copies=True)
                memories = {part.data.untyped_storage() for part in shards._parts}
                numel = sum(parameter.numel() for parameter in run.models[0].parameters())
                found = sum(memory.nbytes() for memory in memories), shards.num_bytes, numel
            torch.distributed.barrier()
        return found


@pytest.mark.parametrize(
    ("settings", "bytes_per_number"),
    [({**SHARDED, **BF16}, 14), (SHARDED, 12), (BF16, 14), ({}, 12)],
    ids=["bf16", "fp32", "plain-bf16", "plain-fp32"],
)
def test_a_save_holds_its_share_of_weights_and_optimizer(
    rank_pool_2: RankPool, rank_pool_4: RankPool, settings: dict, bytes_per_number: int
) -> None:
    for size, run in {1: lambda *args: [args[0](*args[1:])], 2: rank_pool_2.run, 4: rank_pool_4.run}.items():
        found = run(held_bytes, settings)
        whole = bytes_per_number * found[0][2]
        assert sum(held for held, _, _ in found) == whole
        # the optimizer pads its buffers by up to 64 numbers a rank and a parameter's beginning
        assert max(held for held, _, _ in found) <= whole / size * 1.05
        assert all(held == listed for held, listed, _ in found)


def read_bytes(settings: dict, path: str) -> int:
    """Bytes of files that this rank reads to continue from a checkpoint."""
    counted, read_data = [], dcp.FileSystemReader.read_data

    def count(self: dcp.FileSystemReader, plan: Any, planner: Any) -> Any:
        places = {item.storage_index: self.storage_data[item.storage_index] for item in plan.items}
        counted.append(sum(place.length for place in places.values()))
        return read_data(self, plan, planner)

    dcp.FileSystemReader.read_data = count
    try:
        with built(MODEL, settings, seed=9) as run:
            content.load_all(Path(path), run.models, run.optimizer)
    finally:
        dcp.FileSystemReader.read_data = read_data
    return sum(counted)


@pytest.mark.parametrize("settings", [{**SHARDED, **BF16}, BF16], ids=["sharded", "plain"])
def test_ranks_share_the_files_that_they_read(rank_pool_4: RankPool, tmp_path: Path, settings: dict) -> None:
    rank_pool_4.run(save_in_both_ways, MODEL, settings, None, str(tmp_path))
    size = sum(file.stat().st_size for file in (tmp_path / "step-1").glob("*.distcp"))
    found = rank_pool_4.run(read_bytes, settings, str(tmp_path / "step-1"))
    assert sum(found) <= size and max(found) < 0.3 * size
    files = sorted((tmp_path / "step-1").glob("*.distcp"))
    assert len({file.name.split("_")[2] for file in files}) == 4  # every rank wrote


def refused(path: str, config: dict) -> str:
    with built(config, {}) as run:
        try:
            content.load_all(Path(path), run.models, run.optimizer)
        except CheckpointError as error:
            return str(error)
    return ""


def test_another_model_is_refused_by_name(rank_pool_2: RankPool, tmp_path: Path) -> None:
    rank_pool_2.run(save_in_both_ways, MODEL, {}, None, str(tmp_path))
    path = str(tmp_path / "step-1")
    wide, deep = {**MODEL, "intermediate_size": 48}, {**MODEL, "model_type": "gemma3_text"}
    for found in rank_pool_2.run(refused, path, wide):
        assert "mlp.linear_fc1.weight is [4, 128, 32] in it, not [4, 96, 32]" in found
    for found in rank_pool_2.run(refused, path, deep):
        assert "rank 0, 1: it does not hold this model; missing: decoder.layers" in found, found
