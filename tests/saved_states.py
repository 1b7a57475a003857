"""Models with an optimizer that has moments, their checkpoints in both forms, and what is in them.

Nothing is trained: gradients are random numbers, the same on ranks that hold the same.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.utils import extract_nonpersistent, extract_sharded_base

from fastpref.run.plan.pipeline import plan_pipeline
from fastpref.trainer import LoraConfig, ModelOptions, TrainingArguments, add_lora, build_models, initialize_megatron
from fastpref.trainer.model.chunks import unwrap
from fastpref.trainer.model.lora import sharded_weights
from fastpref.trainer.ranks.platform import destroy
from fastpref.trainer.saves import content
from fastpref.trainer.saves.save import Save
from fastpref.trainer.step.optimizer import build_optimizer, build_scheduler, wrap_for_training


class Built(NamedTuple):
    models: list
    optimizer: Any
    scheduler: Any


@contextmanager
def built(config: dict, settings: Mapping[str, Any], lora: LoraConfig | None = None, seed: int = 0) -> Iterator[Built]:
    """`settings` are fields of `TrainingArguments`, and `head_layers`, the cost of the head in a pipeline."""
    fields = {"learning_rate": 1e-2, "max_steps": 4, "gradient_accumulation_steps": 2, **settings}
    head_layers = fields.pop("head_layers", 0.0)
    args = TrainingArguments(**fields)
    initialize_megatron(args)
    try:
        options = ModelOptions(
            params_dtype=args.params_dtype,
            sequence_parallel=args.sequence_parallel,
            transformer_impl=args.transformer_impl,
            pipeline_plan=plan_pipeline(config["num_hidden_layers"], args.layout, head_layers),
        )
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
