"""LoRA on Megatron-Core linear layers: frozen weights, and a trained low-rank product beside each.

Design decisions:
- The linear layers stay the modules that Megatron or Transformer Engine built; an adapter is a child module that adds
  to the layer's output in a forward hook. Weight names, tensor parallelism and fused norms keep working.
- A fused layer (query-key-value, gate-up) has one adapter that computes what separate ones would, in two products: the
  A of its targets are stacked, and each row of B reads only the r channels of its own target.
- Ranks exchange the r channels between A and B, never the hidden ones; under sequence parallelism A of a
  column-parallel layer and B of a row-parallel one see a share of the sequence.
- The model with its adapters off is the reference, so that none has to be kept beside it.

Dims: L positions (of this rank), S sequences, I inputs, O outputs of this rank's layer, r rank, n targets, N = n * r.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.module import param_is_not_shared
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from fastpref.checkpoint.headers import TensorSpec
from fastpref.checkpoint.hf import AdapterWriter
from fastpref.errors import CheckpointError, ConfigError
from fastpref.run.architecture import adapters as files
from fastpref.run.architecture.adapter_files import AdapterFiles
from fastpref.run.architecture.adapters import ADAPTER, AdaptedLinear
from fastpref.run.architecture.architecture import Architecture
from fastpref.run.architecture.layouts import GateUp, Layout
from fastpref.run.architecture.lora_config import LoraConfig
from fastpref.run.architecture.names import is_expert
from fastpref.run.plan.fingerprint import LORA_BASE, lora_fingerprint
from fastpref.trainer.model.chunks import unwrap
from fastpref.trainer.model.reading import TensorSource, fill
from fastpref.trainer.model.weights import parameters_of
from fastpref.trainer.model.writing import write_tensors
from fastpref.trainer.ranks.agreement import agree, together


class AdapterSwitch:
    """Whether the adapters of a chunk are off, for the pass that is under way; `answering` turns it."""

    is_off = False


class LoraAdapter(torch.nn.Module):
    """The low-rank term of one linear layer, fused ones included.

    Equals: `scaling * cat(B_t A_t dropout(x) for t in targets)`, rows in the order of the layer's weight.

    Attributes:
        lora_A: [N, I], or this rank's columns where the layer is row-parallel.
        lora_B: [O, r]; rows of projections that are no targets stay zero.
        reads_On1: for fused layers, which target's channels a row of B reads.

    Args:
        linear: the layer; its weight must not require a gradient.
        adapted: its targets and layout.
        lora: rank, scaling and dropout.
        switch: of the chunk; off leaves the layer's output as it is.
        sequence_parallel: whether a rank holds a share of the sequence between layers.
    """

    reads_On1: Tensor | None

    def __init__(
        self,
        linear: torch.nn.Module,
        adapted: AdaptedLinear,
        lora: LoraConfig,
        switch: AdapterSwitch,
        sequence_parallel: bool,
    ) -> None:
        super().__init__()
        weight_OI = linear.weight
        assert isinstance(weight_OI, Tensor)
        self.scaling, self.dropout, self.switch = lora.scaling, lora.lora_dropout, switch
        self.adapted, self.sequence_parallel = adapted, sequence_parallel
        self.tp_group = parallel_state.get_tensor_model_parallel_group()
        num_channels = len(adapted.targets) * lora.r
        self.lora_A = torch.nn.Parameter(weight_OI.new_empty(num_channels, weight_OI.size(1)))
        self.lora_B = torch.nn.Parameter(weight_OI.new_empty(weight_OI.size(0), lora.r))
        split, copied = (self.lora_A, self.lora_B) if adapted.is_row_parallel else (self.lora_B, self.lora_A)
        set_tensor_model_parallel_attributes(split, is_parallel=True, dim=int(adapted.is_row_parallel), stride=1)
        set_tensor_model_parallel_attributes(copied, is_parallel=False, dim=-1, stride=1)
        # Each rank sees a share of the sequence, so that Megatron must add up the gradients of the copies.
        setattr(copied, "sequence_parallel", sequence_parallel)  # noqa: B010  (no attribute that typing knows)
        reads_On1 = None
        if len(adapted.base.shapes) > 1:
            rows_O = adapted.row_targets(self.tp_group.rank(), self.tp_group.size())
            targets_n = torch.arange(len(adapted.targets), dtype=torch.int64, device="cpu")
            reads_On1 = (rows_O[:, None] == targets_n)[..., None].to(weight_OI.device)
        self.register_buffer("reads_On1", reads_On1, persistent=False)

    def forward(self, input_LSI: Tensor) -> tuple[Tensor, Tensor]:
        """Returns both factors of the term: channels [L, S, N] of the whole sequence or share, and B spread to [O, N].

        Args:
            input_LSI: what the layer's weight is applied to.
        """
        channels_LSN = F.linear(self._dropped(input_LSI), self.lora_A)
        group = self.tp_group
        if self.adapted.is_row_parallel and self.sequence_parallel:
            channels_LSN = tensor_parallel.reduce_scatter_to_sequence_parallel_region(channels_LSN, group=group)
        elif self.adapted.is_row_parallel:
            channels_LSN = tensor_parallel.reduce_from_tensor_model_parallel_region(channels_LSN, group=group)
        elif self.sequence_parallel:
            channels_LSN = tensor_parallel.gather_from_sequence_parallel_region(channels_LSN, group=group)
        else:
            channels_LSN = tensor_parallel.copy_to_tensor_model_parallel_region(channels_LSN, group=group)
        return channels_LSN, self.spread_B()

    def spread_B(self) -> Tensor:
        """B with the channels of every target beside each other, zero where a row does not read them: [O, N]."""
        if self.reads_On1 is None:
            return self.lora_B
        return (self.lora_B[:, None] * self.reads_On1).flatten(1)

    def delta_weight(self) -> Tensor:
        """The term as a matrix, fp32 [O, I] of this rank."""
        return self.scaling * (self.spread_B().detach().float() @ self.lora_A.detach().float())

    def add_to(self, linear: torch.nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, Any]) -> Any:
        """Forward hook of the layer: adds the term to its output."""
        if self.switch.is_off:
            return output
        channels_LSN, weight_ON = self(_normed(linear, args[0]))
        out_LSO, bias = output
        sum_TO = torch.addmm(out_LSO.flatten(0, 1), channels_LSN.flatten(0, 1), weight_ON.t(), alpha=self.scaling)
        return sum_TO.view_as(out_LSO), bias

    def _dropped(self, input_LSI: Tensor) -> Tensor:
        if not (self.training and self.dropout):
            return input_LSI
        # Ranks with different inputs draw different masks; ranks with the same input must draw the same one.
        differs = self.tp_group.size() > 1 and (self.adapted.is_row_parallel or self.sequence_parallel)
        with tensor_parallel.get_cuda_rng_tracker().fork() if differs else nullcontext():
            return F.dropout(input_LSI, self.dropout)


@dataclass(frozen=True)
class AppliedLora:
    """What `add_lora` did to a model chunk."""

    config: LoraConfig
    """The settings."""
    arch: Architecture
    """The model."""
    base_checksum: str
    """Identifies the frozen weights, in any layout."""
    switch: AdapterSwitch
    """Of the chunk's adapters."""

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Settings and frozen weights that a checkpoint of adapters belongs to."""
        return {**lora_fingerprint(self.config), LORA_BASE: self.base_checksum}


def add_lora(
    models: Sequence[torch.nn.Module],
    hf_config: Architecture | Mapping[str, Any] | str | Path,
    lora: LoraConfig,
    *,
    seed: int,
) -> None:
    """Freeze a model and put adapters beside its linear layers, in place; every rank of the job calls it.

    Args:
        models: this rank's chunks, before anything wraps them for training.
        hf_config: the model's `config.json`, a directory that holds it, or what was read from it.
        lora: rank, targets and start of the adapters.
        seed: decides A where `lora.path` is None; the same in every parallel layout.

    Raises:
        ConfigError: the model has adapters already, or a target or layer cannot be adapted.
        CheckpointError: `lora.path` is unusable or does not fit.
    """
    chunks = [unwrap(model) for model in models]
    if lora_of(chunks) is not None:
        raise ConfigError("the model has adapters already; build a new one")
    arch = Architecture.of(hf_config)
    adapted = files.adapted_linears(arch, lora)
    source = _source(arch, lora, seed)
    checksum = _checksum(chunks)
    parameters: dict[str, Tensor] = {}
    layouts: dict[str, Layout] = {}
    for chunk in chunks:
        chunk.lora = AppliedLora(lora, arch, checksum, AdapterSwitch())
        chunk.requires_grad_(False)
        for name, linear in _linears(chunk).items():
            if name in adapted:
                adapter = LoraAdapter(linear, adapted[name], lora, chunk.lora.switch, chunk.config.sequence_parallel)
                linear.add_module(ADAPTER, adapter)
                linear.register_forward_hook(adapter.add_to)
                mine = {f"{name}.{ADAPTER}.{key}": key for key, _ in adapter.named_parameters()}
                parameters |= {full: adapter.get_parameter(key) for full, key in mine.items()}
                layouts |= {full: adapter.adapted.layouts[key] for full, key in mine.items()}
        if chunk.pre_process and chunk.config.recompute_granularity == "full":
            # Recomputed layers have gradients only if their input has one, and frozen embeddings give none.
            chunk.embedding.register_forward_hook(_require_grad)
    agree(together(lambda: fill(parameters, layouts, source), "reading adapters"))


def lora_of(models: Sequence[torch.nn.Module]) -> AppliedLora | None:
    """What `add_lora` did to these chunks; None where it was not called."""
    return getattr(unwrap(models[0]), "lora", None)


def adapters_of(chunk: torch.nn.Module) -> dict[str, LoraAdapter]:
    """The adapters of a model chunk, by the names of their linear layers in the whole model."""
    adapters = {name: getattr(linear, ADAPTER, None) for name, linear in _linears(unwrap(chunk)).items()}
    return {name: adapter for name, adapter in adapters.items() if isinstance(adapter, LoraAdapter)}


def save_adapter(
    models: Sequence[torch.nn.Module],
    out_dir: str | Path,
    base: str | None = None,
    tokenizer_dir: str | Path | None = None,
    *,
    replaced: Mapping[str, bytes | None] | None = None,
) -> None:
    """Write the adapters as a directory that `peft.PeftModel.from_pretrained` loads.

    Args:
        models: this rank's chunks with adapters, bare or inside Megatron's wrappers.
        out_dir: the new directory; it must not exist, or be empty.
        base: name or path of the model that the adapters belong to, noted in `adapter_config.json`.
        tokenizer_dir: where to copy tokenizer files and `generation_config.json` from.
        replaced: contents of files by name, in place of copies out of `tokenizer_dir`; None leaves a file out.

    Raises:
        ConfigError: the model has no adapters.
        CheckpointError: `out_dir` is not empty, or rank 0 could not write it.
        OSError: rank 0's disk is full.
    """
    applied = lora_of(models)
    if applied is None:
        raise ConfigError("the model has no adapters; save_hf writes whole models")
    table = files.adapter_table(applied.arch, applied.config)
    chunks = [unwrap(model) for model in models]
    mine = {name: parameter for name, parameter in parameters_of(chunks).items() if name in table}
    # a pipeline stage that holds the head alone has no adapter
    dtype = next(chunks[0].parameters()).dtype
    specs = [
        TensorSpec(name, dtype, shape) for name, shape in files.adapter_shapes(applied.arch, applied.config).items()
    ]
    config, size = files.peft_config(applied.config, base), sum(spec.num_bytes for spec in specs)
    write_tensors(mine, table, dtype, lambda: AdapterWriter(out_dir, specs, config, tokenizer_dir, size, replaced))


class MergedParameters(Mapping[str, Tensor]):
    """`parameters_of` chunks, with adapters added into the weights they stand beside; one weight at a time.

    Args:
        chunks: bare chunks, with or without adapters.
    """

    def __init__(self, chunks: Sequence[GPTModel]) -> None:
        self._parameters = {
            name: parameter for name, parameter in parameters_of(chunks).items() if f".{ADAPTER}." not in name
        }
        self._adapters = {f"{name}.weight": adapter for chunk in chunks for name, adapter in adapters_of(chunk).items()}

    def __getitem__(self, name: str) -> Tensor:
        """The parameter, in fp32 where something was added."""
        parameter, adapter = self._parameters[name], self._adapters.get(name)
        return parameter if adapter is None else parameter.detach().float() + adapter.delta_weight()

    def __iter__(self) -> Iterator[str]:
        """Names in the order of the model."""
        return iter(self._parameters)

    def __len__(self) -> int:
        """Number of parameters."""
        return len(self._parameters)


def sharded_weights(chunk: GPTModel, metadata: dict[str, Any] | None = None) -> ShardedStateDict:
    """What a checkpoint holds of a chunk: all weights, or the adapters alone where there are some."""
    if lora_of([chunk]) is None:
        return chunk.sharded_state_dict(metadata=metadata)
    sharded: ShardedStateDict = {}
    for name, adapter in adapters_of(chunk).items():
        prefix = f"{name}.{ADAPTER}."
        split = {"lora_A": 1} if adapter.adapted.is_row_parallel else {"lora_B": 0}
        tensors = make_sharded_tensors_for_checkpoint(
            adapter.state_dict(keep_vars=True),
            prefix,
            split,
            tp_group=adapter.tp_group,
            dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        )
        if isinstance(adapter.adapted.base, GateUp):
            # Gate and up rows of a rank are two separate pieces of the whole.
            tensors[f"{prefix}lora_B"] = apply_swiglu_sharded_factory(tensors[f"{prefix}lora_B"], ())
        sharded |= tensors
    return sharded


def _source(arch: Architecture, lora: LoraConfig, seed: int) -> TensorSource:
    """Where the adapters begin; refused on every rank together."""
    if lora.path is None:
        return files.InitialAdapters(files.adapter_shapes(arch, lora), seed)
    source, problems = None, []
    try:
        source = AdapterFiles(lora.path, arch, lora)
    except (OSError, CheckpointError) as error:
        problems.append(str(error))
    agree(problems)
    assert source is not None
    return source


def _linears(chunk: GPTModel) -> dict[str, torch.nn.Module]:
    """Modules with a weight matrix in the layers of a chunk, by their name in the whole model."""
    return {
        f"decoder.layers.{layer.layer_number - 1}.{name}": module
        for layer in chunk.decoder.layers
        for name, module in layer.named_modules()
        if isinstance(getattr(module, "weight", None), Tensor) and module.weight.ndim == 2
    }


def _normed(linear: torch.nn.Module, input_LSI: Tensor) -> Tensor:
    """What the layer's weight is applied to; Transformer Engine keeps the norm before a layer inside it."""
    norm_weight_I = getattr(linear, "layer_norm_weight", None)
    if norm_weight_I is None:
        return input_LSI
    if getattr(linear, "zero_centered_gamma", False):
        norm_weight_I = norm_weight_I + 1
    epsilon: Any = linear.eps
    return F.rms_norm(input_LSI, norm_weight_I.shape, norm_weight_I, epsilon)


def _require_grad(_: torch.nn.Module, __: Any, output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() and not output.requires_grad else output


def _checksum(chunks: Sequence[GPTModel]) -> str:
    """A number for all weights of the model, the same on every rank and in every layout.

    Every value counts once with its bits as an integer, times a factor of its parameter's name. Experts are left out:
    how they are spread depends on the layout in ways of its own.
    """
    total = torch.zeros(1, dtype=torch.int64, device=next(chunks[0].parameters()).device)
    for name, parameter in parameters_of(chunks).items():
        if not is_expert(name) and param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter):
            bits = parameter.detach().view(torch.int32 if parameter.element_size() == 4 else torch.int16)
            factor = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little") | 1
            total += bits.sum(dtype=torch.int64) * factor
    torch.distributed.all_reduce(total, group=parallel_state.get_model_parallel_group())
    return f"{int(total) % 2**64:016x}"
