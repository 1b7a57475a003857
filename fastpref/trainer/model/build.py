"""Megatron `GPTModel` chunks from Hugging Face models, and back.

Parallel sizes come from Megatron's parallel state, which must exist. Every rank of the job calls these
functions together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import unwrap_model

from fastpref.checkpoint.hf import ModelDirectory, read_config
from fastpref.errors import CheckpointError, ConfigError, Problem, raise_if_any
from fastpref.run.architecture.architecture import Architecture
from fastpref.run.architecture.model_files import ModelFiles
from fastpref.run.config.layout import model_problems, size_problems
from fastpref.run.plan.pipeline import PipelinePlan, expert_stage_problems, plan_pipeline
from fastpref.run.plan.surroundings import variable_problems
from fastpref.trainer.model.blocks import gelu_tanh, joint_inv_freq, keep_grad_mode, scale_embedding
from fastpref.trainer.model.layers import block_spec
from fastpref.trainer.model.lora import MergedParameters
from fastpref.trainer.model.moe import expert_settings
from fastpref.trainer.model.overlap import waits_for_sends
from fastpref.trainer.model.reading import TensorSource
from fastpref.trainer.model.shards import mark_shards
from fastpref.trainer.model.weights import RandomTensors, load_parameters, save_parameters
from fastpref.trainer.ranks.agreement import agree
from fastpref.trainer.ranks.platform import current_layout
from fastpref.trainer.ranks.transformer_engine import LayerImplementation, layer_implementation
from fastpref.validation import Rule, validate


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How a model is built, beyond what its `config.json` says."""

    params_dtype: torch.dtype = torch.float32
    """Number format of parameters and activations: float32, bfloat16 or float16."""
    sequence_parallel: bool = False
    """Split norms and residuals along the sequence over the tensor-parallel ranks."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute activations in the backward pass: every layer, or the attention core only."""
    max_sequence_length: int | None = None
    """Longest sequence that will be used, in tokens; None takes the model's own limit."""
    moe_aux_loss_coeff: float | None = None
    """Weight of the load-balancing loss of experts; None takes `router_aux_loss_coef` of the model's config."""
    pipeline_plan: PipelinePlan | None = None
    """Layers of every pipeline chunk; None cuts them evenly."""
    transformer_impl: LayerImplementation | None = None
    """Whose layers: Transformer Engine's or Megatron's own ("local"); None takes the former wherever they run."""

    def __post_init__(self) -> None:
        validate(self, {"params_dtype": Rule(choices=(torch.float32, torch.bfloat16, torch.float16))})


def build_models(
    hf_config: Architecture | Mapping[str, Any] | str | Path, options: ModelOptions | None = None, *, seed: int
) -> list[GPTModel]:
    """Build a model with random weights.

    Args:
        hf_config: the contents of a `config.json`, a directory that holds one, or what was read from it.
        options: precision and memory.
        seed: decides the weights; the same in every parallel layout.

    Returns:
        This rank's chunks, one per virtual pipeline stage. Each carries its `architecture`, and `real_vocab_size`, the
        vocabulary of the config, while `vocab_size` counts the rows that pad it to a multiple of the tensor-parallel
        size.

    Raises:
        ConfigError: a setting is not supported, or does not fit the parallel layout.
        CheckpointError: the directory has no readable `config.json`.
    """
    arch = Architecture.of(hf_config)
    return _filled(arch, options or ModelOptions(), RandomTensors(arch, seed))


def load_models(
    path: str | Path, options: ModelOptions | None = None, *, architecture: Architecture | None = None
) -> list[GPTModel]:
    """Build a model with the weights of a model directory; each shard is read by one rank of those that hold it.

    Args:
        path: a directory with `config.json` and safetensors files.
        options: precision and memory; weights are rounded to `params_dtype`.
        architecture: what was read from `config.json`; None reads it.

    Returns:
        This rank's chunks, as `build_models` returns them.

    Raises:
        ConfigError: a setting is not supported, or does not fit the parallel layout.
        CheckpointError: files are missing, damaged or unsafe, tensors do not fit the config, or a weight is
            not finite.
    """
    directory, problems = None, []
    try:
        directory = ModelDirectory(path)
    except CheckpointError as error:
        problems.append(str(error))
    agree(problems)
    assert directory is not None
    try:
        arch = architecture or Architecture.from_hf(directory.config)
        return _filled(arch, options or ModelOptions(), ModelFiles(directory, arch))
    except ConfigError as error:
        raise ConfigError(error.problems, str(directory.path)) from error
    except CheckpointError as error:
        raise CheckpointError(f"{directory.path}: {error}") from error


def save_hf(
    models: list[GPTModel] | list[torch.nn.Module],
    out_dir: str | Path,
    hf_config: Mapping[str, Any] | str | Path,
    tokenizer_dir: str | Path | None = None,
    *,
    architecture: Architecture | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    replaced: Mapping[str, bytes | None] | None = None,
) -> None:
    """Write a model directory that transformers can load; what `load_models` read comes back bit for bit.

    Adapters (`add_lora`) are added into the weights that they stand beside.

    Args:
        models: this rank's chunks, bare or inside Megatron's wrappers.
        out_dir: the new directory, which appears when it is complete; it must not exist, or be empty.
        hf_config: the model's `config.json` or a directory that holds it; written with `dtype` filled in.
        tokenizer_dir: where to copy tokenizer files and `generation_config.json` from.
        architecture: what was read from that `config.json`; None reads it.
        dtype: number format of the files; None for that of the parameters.
        max_shard_bytes: size at which the next file begins.
        replaced: contents of files by name, in place of copies out of `tokenizer_dir`; None leaves a file out.

    Memory: on rank 0, one parameter gathered on the device, and 256 MiB of them (or one that is larger) on the host.

    Raises:
        CheckpointError: `out_dir` is not empty, or rank 0 could not write it.
        OSError: rank 0's disk is full.
    """
    config = dict(hf_config) if isinstance(hf_config, Mapping) else read_config(hf_config)
    chunks = unwrap_model(list(models))
    dtype = dtype or next(chunks[0].parameters()).dtype
    # the newer name, the older one, or whichever the file has: versions of transformers differ in which they read
    for key in [name for name in ("dtype", "torch_dtype") if name in config] or ["dtype"]:
        config[key] = str(dtype).removeprefix("torch.")
    companions = None if tokenizer_dir is None else Path(tokenizer_dir)
    arch = architecture or Architecture.from_hf(config)
    parameters = MergedParameters(chunks)
    save_parameters(parameters, arch, Path(out_dir), config, companions, dtype, max_shard_bytes, replaced)


def _filled(arch: Architecture, options: ModelOptions, source: TensorSource) -> list[GPTModel]:
    _check_layout(arch, options)
    config = transformer_config(arch, options)
    vpp = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    models = [_build_chunk(arch, options, config, stage) for stage in (range(vpp) if vpp else [None])]
    load_parameters(models, arch, source)
    return models


def _check_layout(arch: Architecture, options: ModelOptions) -> None:
    layout = replace(current_layout(), sequence_parallel=options.sequence_parallel)
    problems = [*variable_problems(), *size_problems(layout), *model_problems(layout, arch)]
    longest = options.max_sequence_length
    if longest is not None and longest > arch.max_positions:
        text = f"{longest} is more than the model's max_position_embeddings {arch.max_positions}"
        problems.append(Problem("max_sequence_length", text))
    if not problems:
        plan = options.pipeline_plan or plan_pipeline(arch.num_layers, layout)
        problems += expert_stage_problems(plan, arch)
    raise_if_any(problems)


def transformer_config(arch: Architecture, options: ModelOptions) -> TransformerConfig:
    """Describe `arch` to Megatron for the current parallel layout."""
    on_gpu, full = torch.cuda.is_available(), options.recompute_granularity == "full"
    layout = current_layout()
    plan = options.pipeline_plan or plan_pipeline(arch.num_layers, layout)
    layers = layer_implementation(options.transformer_impl)
    return TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_heads,
        num_query_groups=arch.num_query_groups,
        kv_channels=arch.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=arch.norm_eps,
        layernorm_zero_centered_gamma=arch.zero_centered_norms,
        gated_linear_unit=True,
        activation_func=F.silu if arch.activation == "silu" else gelu_tanh,
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        qk_layernorm=arch.qk_norm,
        softmax_scale=arch.attention_scale,
        window_size=None if arch.sliding_window is None else (arch.sliding_window - 1, 0),
        window_attn_skip_freq=[int(sliding) for sliding in arch.sliding_layers] or None,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=options.params_dtype,
        pipeline_dtype=options.params_dtype,
        bf16=options.params_dtype == torch.bfloat16,
        fp16=options.params_dtype == torch.float16,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        pipeline_model_parallel_layout=plan.megatron_layout(),
        context_parallel_size=layout.cp,
        # Transformer Engine's own choice, a ring of point-to-point sends, knows no sliding windows.
        cp_comm_type=None if arch.sliding_window is None else "all_gather",
        sequence_parallel=options.sequence_parallel,
        recompute_granularity=options.recompute_granularity,
        recompute_method="uniform" if full else None,
        recompute_num_layers=1 if full else None,
        transformer_impl=layers,
        **expert_settings(arch, options.moe_aux_loss_coeff, grouped_gemm=layers == "transformer_engine"),
        cuda_graph_scope=[],
        # Every parameter is filled right after construction.
        perform_initialization=False,
        use_cpu_initialization=not on_gpu,
        # Freeing a sent tensor is NCCL's business; under gloo the send may still be reading it.
        deallocate_pipeline_outputs=on_gpu and (layout.vpp is None or waits_for_sends()),
        # Batched sends of the interleaved schedule meet the wrong receives where a stage's two neighbours are one rank.
        overlap_p2p_comm=layout.vpp is not None,
        batch_p2p_comm=layout.vpp is None,
    )


def _build_chunk(arch: Architecture, options: ModelOptions, config: TransformerConfig, stage: int | None) -> GPTModel:
    tp = config.tensor_model_parallel_size
    model = GPTModel(
        config=config,
        transformer_layer_spec=block_spec(arch, config, stage),
        vocab_size=-(-arch.vocab_size // tp) * tp,
        max_sequence_length=options.max_sequence_length or arch.max_positions,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=stage is None, vp_stage=stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=stage is None, vp_stage=stage),
        share_embeddings_and_output_weights=arch.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=arch.rope.theta,
        vp_stage=stage,
    )
    # Megatron's own scaling fixes three of Llama's four constants.
    model.rotary_pos_emb.inv_freq = joint_inv_freq(arch).to(model.rotary_pos_emb.inv_freq.device)
    model.real_vocab_size = arch.vocab_size
    model.architecture = arch
    model.pipeline_plan = options.pipeline_plan
    if model.pre_process and arch.embedding_scale is not None:
        scale_embedding(model.embedding, arch.embedding_scale)
    if arch.sandwich_norms:
        keep_grad_mode(model)
    mark_shards([model])
    return model
