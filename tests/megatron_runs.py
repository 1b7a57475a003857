"""What the worker ranks of the model tests do: load, run both passes on Megatron's schedule, export.

Kept apart from the tests, so that a worker does not import transformers.
"""

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import (
    gather_from_tensor_model_parallel_region,
    param_is_not_tensor_parallel_duplicate,
)

from fastpref.checkpoint.hf import ModelDirectory
from fastpref.errors import ConfigError
from fastpref.trainer import LoraConfig, TrainingArguments, add_lora, save_adapter
from fastpref.trainer.model.build import ModelOptions, build_models, load_models, save_hf
from fastpref.trainer.model.lora import lora_of
from fastpref.trainer.model.moe import forget_routing
from fastpref.trainer.ranks import platform
from fastpref.trainer.step.optimizer import wrap_for_training


class Problem(NamedTuple):
    """Two microbatches of one sequence each, and the weights of a linear loss on their logits."""

    input_ids_SL: torch.Tensor
    weights_SLV: torch.Tensor


class Layout(NamedTuple):
    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    sp: bool = False
    ep: int = 1


@contextmanager
def parallel(layout: Layout) -> Iterator[None]:
    platform.initialize_distributed()
    platform.initialize_model_parallel(layout.tp, layout.pp, layout.vpp, ep=layout.ep)
    try:
        yield
    finally:
        platform.destroy()


def answer(path: str, out: str, layout: Layout, problem: Problem, options: ModelOptions) -> torch.Tensor | None:
    """Run the model of `path`; its gradients are exported to `out` as if they were weights.

    Returns:
        The logits [S, L, V] on ranks of the last pipeline stage, None elsewhere.
    """
    with parallel(layout):
        chunks = load_models(path, options)
        logits = _forward_backward_into_parameters(chunks, problem)
        save_hf(chunks, out, path)
    return logits


def answer_lora(
    path: str, lora: LoraConfig, out: str, layout: Layout, problem: Problem, options: ModelOptions
) -> torch.Tensor | None:
    """As `answer`, for the adapters of `lora.path` on the model of `path`; `out` becomes an adapter directory."""
    with parallel(layout):
        chunks = load_models(path, options)
        add_lora(chunks, path, lora, seed=0)
        logits = _forward_backward_into_parameters(chunks, problem)
        save_adapter(chunks, out)
    return logits


def _forward_backward_into_parameters(chunks: list, problem: Problem) -> torch.Tensor | None:
    """The logits of the last stage; trained parameters become their gradients."""
    chunks[0].config.finalize_model_grads_func = finalize_model_grads
    models = wrap_for_training(chunks, TrainingArguments())
    logits = _forward_backward(models, problem)
    for model in models:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.copy_(parameter.main_grad)
    return torch.cat(logits)[..., : problem.weights_SLV.size(-1)] if logits else None


def reexport_lora(path: str, lora: LoraConfig, out: str, layout: Layout) -> str:
    """Write the adapters and the merged model to `out`; returns the checksum of the frozen weights."""
    with parallel(layout):
        chunks = load_models(path)
        add_lora(chunks, path, lora, seed=7)
        save_adapter(chunks, f"{out}/adapter", path)
        save_hf(chunks, f"{out}/merged", path)
        return lora_of(chunks).base_checksum


def _forward_backward(models: list, problem: Problem) -> list[torch.Tensor]:
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
    forget_routing(models)
    return logits


def reexport(path: str, out: str, layout: Layout, options: ModelOptions, max_shard_bytes: int) -> None:
    with parallel(layout):
        save_hf(load_models(path, options), out, path, path, max_shard_bytes=max_shard_bytes)


def export_random(config: dict, out: str, layout: Layout, seed: int) -> None:
    with parallel(layout):
        save_hf(build_models(config, seed=seed), out, config)


def names_read(path: str, layout: Layout) -> set[str]:
    """The tensors that loading reads on this rank."""
    names = set()
    read = ModelDirectory.read

    def remember(self, name, *args):
        names.add(name)
        return read(self, name, *args)

    ModelDirectory.read = remember
    try:
        with parallel(layout):
            load_models(path)
    finally:
        ModelDirectory.read = read
    return names


def load_error(path: str, layout: Layout) -> str:
    """The message of the error that loading raises on this rank."""
    with parallel(layout):
        try:
            load_models(Path(path))
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return "no error"


def lora_error(path: str, lora: LoraConfig, layout: Layout) -> str:
    """The message of the error that adding adapters raises on this rank."""
    with parallel(layout):
        try:
            add_lora(load_models(path), path, lora, seed=0)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return "no error"


def save_error(path: str, out: str, layout: Layout, max_file_bytes: int | None = None) -> str:
    """The message of the error that exporting raises on this rank, when no file may pass `max_file_bytes`."""
    with parallel(layout):
        models = load_models(path)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes or soft, hard))
        try:
            save_hf(models, out, path)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, handler)
    return "no error"


def build_error(config: dict, layout: Layout) -> str:
    """The message of the error that building raises on this rank."""
    with parallel(layout):
        try:
            build_models(config, seed=0)
        except ConfigError as error:
            return f"ConfigError: {error}"
    return "no error"


def last_vocab_row(config: dict) -> tuple[int, int, float]:
    """Padded vocabulary, real vocabulary, and the largest value in this rank's last row, for two ranks."""
    with parallel(Layout(tp=2)):
        (model,) = build_models(config, seed=1)
        rows = model.embedding.word_embeddings.weight
        assert rows.size(0) * 2 == model.vocab_size
        return model.vocab_size, model.real_vocab_size, rows[-1].abs().max().item()


def counted_parameters(config: dict, layout: Layout, lora: LoraConfig | None = None) -> int:
    """Number of values that Megatron's gradient norm takes from this tensor-parallel rank."""
    with parallel(layout):
        (model,) = build_models(config, ModelOptions(sequence_parallel=layout.sp), seed=0)
        if lora is not None:
            add_lora([model], config, lora, seed=0)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return sum(p.numel() for p in trained if param_is_not_tensor_parallel_duplicate(p))
