"""Host memory of a save beside training, by rank of data parallelism: stretches that ranks own beside whole tensors.

bf16 weights and AdamW in a distributed optimizer. `gathered` is Megatron's fully reshardable listing and a copy of what
the rank writes, which is how checkpoints were saved before; no file is written.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.measure import Row, return_memory, status_mib
from fastpref.testing.workers import RankPool

SIZES = (1, 2, 4)
MODEL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 512,
}
WAYS = ("gathered", "owned")


def measure_save_memory(size: int, way: str, config: dict[str, Any]) -> list[Row]:
    """Bytes of host memory that a save takes on each rank: after the copy, and at the most.

    Args:
        size: ranks of data parallelism, one process each.
        way: one of `WAYS`.
        config: a `config.json`.
    """
    with RankPool(size, timeout_s=600.0) as pool:
        return pool.run(_measure, way, config)


def _measure(way: str, config: dict[str, Any]) -> Row:
    from fastpref.trainer import ModelOptions, TrainingArguments, build_models, initialize_megatron
    from fastpref.trainer.ranks import platform
    from fastpref.trainer.step.optimizer import build_optimizer, wrap_for_training

    args = TrainingArguments(bf16=True, use_distributed_optimizer=True)
    initialize_megatron(args)
    try:
        models = wrap_for_training(build_models(config, ModelOptions(params_dtype=torch.bfloat16), seed=0), args)
        optimizer = build_optimizer(models, args)
        optimizer.step()  # after which there are moments
        take: Callable[[Any, Any], Any] = {"gathered": _gathered, "owned": _owned}[way]
        take(models, optimizer)  # what is imported and cached once
        return_memory()
        torch.distributed.barrier()
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = status_mib("VmRSS")
        held = take(models, optimizer)
        peak = status_mib("VmHWM") - before
        return_memory()
        row = {"held_mib": status_mib("VmRSS") - before, "peak_mib": peak, "writes_mib": held[0] / 2**20}
        parameters = sum(parameter.numel() for parameter in models[0].parameters())
        torch.distributed.barrier()
        return {name: round(value, 3) for name, value in row.items()} | {"parameters": parameters}
    finally:
        platform.destroy()


def _owned(models: Any, optimizer: Any) -> tuple[int, Any]:
    from fastpref.trainer.saves import content
    from fastpref.trainer.saves.shards import Shards

    shards = Shards(*content.parts_to_save(models, optimizer))
    shards.to_host(copies=True)
    return shards.num_bytes, shards


def _gathered(models: Any, optimizer: Any) -> tuple[int, Any]:
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
    from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess

    from fastpref.trainer.model.chunks import unwrap

    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    payload = {f"model{i}": unwrap(model).sharded_state_dict(metadata=metadata) for i, model in enumerate(models)}
    payload["optimizer"] = optimizer.sharded_state_dict(payload, is_loading=False, metadata=metadata)
    sharded, _ = save_preprocess(payload, validate_access_integrity=False)
    written = 0
    for shard in nested_values(sharded):
        if isinstance(shard, ShardedTensor) and is_main_replica(shard.replica_id):
            shard.data = shard.data.detach().clone(memory_format=torch.contiguous_format)
            written += shard.data.nbytes
    return written, sharded


def table(rows: list[Row]) -> str:
    """Markdown: bytes a parameter, of the rank that takes most."""
    head = "| save | ranks | held, B a parameter | at most, B a parameter | written, B a parameter |"
    lines = [head, "|---|---:|---:|---:|---:|"]
    for row in rows:
        number = row["ranks"][0]["parameters"] / 2**20
        cells = [max(rank[name] for rank in row["ranks"]) / number for name in ("held_mib", "peak_mib", "writes_mib")]
        lines.append(f"| {row['way']} | {len(row['ranks'])} | {' | '.join(f'{cell:.1f}' for cell in cells)} |")
    return "\n".join(lines)
