"""What the worker ranks of the model tests do: load, run both passes on Megatron's schedule, export."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import hf_oracle
import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from fastpref.trainer import platform
from fastpref.trainer.model import ModelOptions, build_models, load_models, save_hf


class Layout(NamedTuple):
    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    sp: bool = False


@contextmanager
def parallel(layout: Layout) -> Iterator[None]:
    platform.initialize_distributed()
    platform.initialize_model_parallel(layout.tp, layout.pp, layout.vpp)
    try:
        yield
    finally:
        platform.destroy()


def answer(
    path: str, out: str, layout: Layout, problem: hf_oracle.Problem, options: ModelOptions
) -> torch.Tensor | None:
    """Run the model of `path`; its gradients are exported to `out` as if they were weights.

    Returns:
        The logits [S, L, V] on ranks of the last pipeline stage, None elsewhere.
    """
    with parallel(layout):
        chunks = load_models(path, options)
        config = chunks[0].config
        config.finalize_model_grads_func = finalize_model_grads
        models = [DistributedDataParallel(config, DistributedDataParallelConfig(), chunk) for chunk in chunks]
        logits = _forward_backward(models, problem)
        for model in models:
            for parameter in model.parameters():
                parameter.data.copy_(parameter.main_grad)
        save_hf(models, out, path)
    return torch.cat(logits)[..., : problem.weights_SLV.size(-1)] if logits else None


def _forward_backward(models: list, problem: hf_oracle.Problem) -> list[torch.Tensor]:
    logits = []
    length = problem.input_ids_SL.size(1)

    def forward_step(batches, model):
        index = next(batches)
        positions = torch.arange(length)[None]
        output = model(problem.input_ids_SL[index : index + 1], positions, None)

        def loss_func(output):
            full = gather_from_tensor_model_parallel_region(output)
            logits.append(full.detach())
            real = full[..., : problem.weights_SLV.size(-1)]
            return (real * problem.weights_SLV[index : index + 1]).sum(), {}

        return output, loss_func

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(range(2)) for _ in models],
        model=models,
        num_microbatches=2,
        seq_length=length,
        micro_batch_size=1,
        forward_only=False,
    )
    return logits


def reexport(path: str, out: str, layout: Layout, options: ModelOptions, max_shard_bytes: int) -> None:
    with parallel(layout):
        save_hf(load_models(path, options), out, path, path, max_shard_bytes=max_shard_bytes)


def export_random(config: dict, out: str, layout: Layout, seed: int) -> None:
    with parallel(layout):
        save_hf(build_models(config, seed=seed), out, config)


def load_error(path: str, layout: Layout) -> str:
    """The message of the error that loading raises on this rank."""
    with parallel(layout):
        try:
            load_models(Path(path))
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return "no error"


def save_error(path: str, out: str, layout: Layout) -> str:
    """The message of the error that exporting raises on this rank."""
    with parallel(layout):
        models = load_models(path)
        try:
            save_hf(models, out, path)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return "no error"
