"""Every rank holds, writes and reads its share of a checkpoint; all shares are what Megatron would have saved whole."""

import itertools
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from saved_states import built, load_and_save, same, save_in_both_ways, stored, take_steps
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from checks.layout_parity.runs import EXPERTS, LAYOUTS, MODEL
from fastpref.errors import CheckpointError
from fastpref.testing.workers import RankPool
from fastpref.trainer import LoraConfig
from fastpref.trainer.model.chunks import unwrap
from fastpref.trainer.saves import content
from fastpref.trainer.saves.shards import Shards
from fastpref.trainer.saves.stored import StoredReader

# A vocabulary that two tensor-parallel ranks pad.
TIED = {**MODEL, "num_hidden_layers": 4, "vocab_size": 63, "tie_word_embeddings": True}
SHARDED = {"use_distributed_optimizer": True}
BF16 = {"bf16": True}
EP2 = {"expert_model_parallel_size": 2}
TP2, VPP2 = LAYOUTS["TP2"][1], LAYOUTS["PP2-VPP2"][1]
# the last of two stages has no layer, and with adapters nothing to train
HEAD_ALONE = {**LAYOUTS["PP2"][1], "head_layers": 50.0}
LORA = LoraConfig(r=4, target_modules=["q_proj", "o_proj", "gate_proj", "up_proj"])


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
    "adapters to a head alone": (MODEL, LORA, (2, {**TP2, **BF16}), (4, {**HEAD_ALONE, **BF16})),
    "sharded adapters to a head alone": (MODEL, LORA, (2, {**SHARDED, **BF16}), (2, {**HEAD_ALONE, **SHARDED, **BF16})),
    "adapters from a head alone": (MODEL, LORA, (4, {**HEAD_ALONE, **SHARDED}), (1, SHARDED)),
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


def refused(path: str, config: dict, settings: dict) -> str:
    with built(config, settings) as run:
        try:
            content.load_all(Path(path), run.models, run.optimizer)
        except CheckpointError as error:
            return str(error)
    return ""


def exportable(path: str, config: dict, settings: dict) -> bool:
    """Whether the weights can be read, of which the first stage's are compared."""
    with built(config, settings) as run:
        chunk = unwrap(run.models[0])
        content.load_chunks(Path(path), [chunk])
        expected = stored(Path(path))["embedding.word_embeddings.weight"]
        return torch.equal(chunk.embedding.word_embeddings.weight[: len(expected)], expected)


@pytest.mark.parametrize("precision", [{}, BF16], ids=["fp32", "bf16"])
def test_state_that_was_gathered_into_the_wrong_place_is_refused(
    rank_pool_2: RankPool, rank_pool_4: RankPool, tmp_path: Path, precision: dict
) -> None:
    """Tied embeddings have a gradient bucket of their own in a pipeline, and Megatron counts the padding before it."""
    settings = {**LAYOUTS["PP2"][1], **SHARDED, **precision}
    rank_pool_4.run(save_in_both_ways, TIED, settings, None, str(tmp_path))
    ours = stored(tmp_path / "step-1")
    for name in [name for name in ours if precision and "optimizer" not in name]:
        assert torch.equal(ours[f"optimizer.state.param.{name}"].bfloat16(), ours[name]), name
    other = {**TP2, **SHARDED, **precision}
    rank_pool_2.run(load_and_save, TIED, other, None, str(tmp_path / "step-1"), str(tmp_path / "again"))
    assert same(stored(tmp_path / "again" / "step-1"), ours)
    for found in rank_pool_2.run(refused, str(tmp_path / "whole"), TIED, other):
        assert "optimizer state is not in its place" in found and "fastpref export" in found
    assert exportable(str(tmp_path / "whole"), TIED, precision)


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
    counted, read_data = [], StoredReader.read_data

    def count(self: StoredReader, plan: Any, planner: Any) -> Any:
        places = {item.storage_index: self.storage_data[item.storage_index] for item in plan.items}
        counted.append(sum(place.length for place in places.values()))
        return read_data(self, plan, planner)

    StoredReader.read_data = count
    try:
        with built(MODEL, settings, seed=9) as run:
            content.load_all(Path(path), run.models, run.optimizer)
    finally:
        StoredReader.read_data = read_data
    return sum(counted)


@pytest.mark.parametrize("settings", [{**SHARDED, **BF16}, BF16], ids=["sharded", "plain"])
def test_ranks_share_the_files_that_they_read(rank_pool_4: RankPool, tmp_path: Path, settings: dict) -> None:
    rank_pool_4.run(save_in_both_ways, MODEL, settings, None, str(tmp_path))
    size = sum(file.stat().st_size for file in (tmp_path / "step-1").glob("*.distcp"))
    found = rank_pool_4.run(read_bytes, settings, str(tmp_path / "step-1"))
    assert sum(found) <= size and max(found) < 0.3 * size
    files = sorted((tmp_path / "step-1").glob("*.distcp"))
    assert len({file.name.split("_")[2] for file in files}) == 4  # every rank wrote


def test_another_model_is_refused_by_name(rank_pool_2: RankPool, tmp_path: Path) -> None:
    rank_pool_2.run(save_in_both_ways, MODEL, {}, None, str(tmp_path))
    path = str(tmp_path / "step-1")
    wide, deep = {**MODEL, "intermediate_size": 48}, {**MODEL, "model_type": "gemma3_text"}
    for found in rank_pool_2.run(refused, path, wide, {}):
        assert "mlp.linear_fc1.weight is [4, 128, 32] in it, not [4, 96, 32]" in found
    for found in rank_pool_2.run(refused, path, deep, {}):
        assert "rank 0, 1: it does not hold this model; missing: decoder.layers" in found, found


DAMAGE: dict[str, tuple[str, Any, str]] = {
    "a file that is gone": ("__0_0.distcp", None, "its files cannot be read: FileNotFoundError: "),
    "a file of zeros": ("__1_0.distcp", bytes(9999), "its files cannot be read: "),
    "an empty index": (".metadata", b"", "its index cannot be read: EOFError: "),
    "another index": (".metadata", pickle.dumps({"a": 1}), "its index cannot be read: "),
    "an empty state": ("common.pt", b"", "common.pt cannot be read"),
    "another state": ("common.pt", [1], "common.pt does not hold the state of an optimizer and its schedule"),
    "half a state": ("common.pt", {"optimizer": None, "scheduler": {}}, "common.pt does not hold the state"),
}


def test_files_that_are_none_are_refused_by_name(rank_pool_2: RankPool, tmp_path: Path) -> None:
    """Whatever the manifest says of them."""
    rank_pool_2.run(save_in_both_ways, MODEL, SHARDED, None, str(tmp_path))
    for name, (file, content_of, told) in DAMAGE.items():
        path = tmp_path / name
        shutil.copytree(tmp_path / "step-1", path)
        (path / file).unlink()
        if isinstance(content_of, bytes):
            (path / file).write_bytes(content_of)
        elif content_of is not None:
            torch.save(content_of, path / file)
        for found in rank_pool_2.run(refused, str(path), MODEL, SHARDED):
            assert told in found and "\n" not in found, (name, found)


def without(chunk: ChunkStorageMetadata) -> list[ChunkStorageMetadata]:
    return []


def short(chunk: ChunkStorageMetadata) -> list[ChunkStorageMetadata]:
    return [replace(chunk, sizes=torch.Size([*chunk.sizes[:-1], chunk.sizes[-1] - 1]))]


def elsewhere(chunk: ChunkStorageMetadata) -> list[ChunkStorageMetadata]:
    return [replace(chunk, offsets=torch.Size([*chunk.offsets[:-1], chunk.offsets[-1] + 1]))]


def overlapping(chunk: ChunkStorageMetadata) -> list[ChunkStorageMetadata]:
    """As many numbers as before, some of them twice and some not at all."""
    half = chunk.sizes[-1] // 2
    sizes = torch.Size([*chunk.sizes[:-1], half])
    second = torch.Size([*chunk.offsets[:-1], chunk.offsets[-1] + half - 1])
    return [replace(chunk, sizes=sizes), replace(chunk, offsets=second, sizes=sizes)]


def test_an_index_that_lacks_a_piece_is_refused_by_name(rank_pool_2: RankPool, tmp_path: Path) -> None:
    """Whatever the manifest says of it: what no piece holds would stay the new model's."""
    rank_pool_2.run(save_in_both_ways, MODEL, SHARDED, None, str(tmp_path))
    path = tmp_path / "step-1"
    whole = (path / ".metadata").read_bytes()
    assert rank_pool_2.run(refused, str(path), MODEL, SHARDED) == ["", ""]
    for name in ("decoder.final_layernorm.weight", "decoder.layers.mlp.linear_fc2.weight"):
        for key, forge in itertools.product(
            [name, f"optimizer.state.exp_avg.{name}"], [without, short, elsewhere, overlapping]
        ):
            index = dcp.FileSystemReader(path).read_metadata()
            chunks = index.state_dict_metadata[key].chunks
            chunks += forge(chunks.pop())
            (path / ".metadata").write_bytes(pickle.dumps(index))
            for found in rank_pool_2.run(refused, str(path), MODEL, SHARDED):
                assert f"the pieces that its index lists do not make up {key}" in found, (found, forge)
            (path / ".metadata").write_bytes(whole)
