"""Megatron's DDP, optimizer and scheduler around the model chunks, and the guard in front of every update."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module

from fastpref.errors import ConfigError, Problem, raise_if_any
from fastpref.run.config.arguments import TrainingArguments
from fastpref.trainer.model.chunks import refuse_sharded, unwrap
from fastpref.trainer.model.copies import layers_train_alike
from fastpref.trainer.model.layers import layers_of
from fastpref.trainer.model.moe import balance_coefficient, bias_kept_in_fp32, separate_experts
from fastpref.trainer.ranks.platform import before_destroy

SIZES = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
"""Parallel sizes that a model's configuration repeats, and its layers act on."""


class Update(NamedTuple):
    """What Megatron's optimizer says of a step, as Python numbers; some of its versions answer with tensors."""

    done: bool
    """Whether parameters moved; not where a loss scale overflowed."""
    grad_norm: float | None
    """L2 norm of the gradient before clipping."""
    num_zeros: int | None
    """Zeros in the gradient, where they are counted."""


def update(optimizer: MegatronOptimizer) -> Update:
    """Takes a step of the optimizer; waits for the device where the answer is there."""
    done, grad_norm, num_zeros = optimizer.step()
    return Update(
        done=bool(done),
        grad_norm=None if grad_norm is None else float(grad_norm),
        num_zeros=None if num_zeros is None else int(num_zeros),
    )


def learning_rate(optimizer: MegatronOptimizer) -> float:
    """The largest learning rate of its parameter groups; an optimizer may keep them as tensors."""
    return max(float(group["lr"]) for group in optimizer.param_groups)


def check_model(models: Sequence[GPTModel], args: TrainingArguments) -> None:
    """Requires that chunks were built with the settings that a run can only take from them.

    Raises:
        ConfigError: chunks are sharded by PyTorch; number of chunks, parallel sizes, precision, sequence parallelism,
            recomputation, the kind of layers or the load-balancing loss differ; lists every difference.
    """
    refuse_sharded(models)
    wanted = {
        **{name: getattr(args, name) for name in SIZES},
        "params_dtype": args.params_dtype,
        "sequence_parallel": args.sequence_parallel,
        "recompute_granularity": args.recompute_granularity,
    }
    if models[0].config.num_moe_experts is not None:
        wanted["expert_model_parallel_size"] = args.expert_model_parallel_size
    if args.moe_aux_loss_coeff is not None:
        wanted["moe_aux_loss_coeff"] = args.moe_aux_loss_coeff
    config = models[0].config
    built = {name: getattr(config, name) for name in wanted} | {"moe_aux_loss_coeff": balance_coefficient(config)}
    problems = [
        Problem(name, f": the model was built with {built[name]}, TrainingArguments ask for {value}")
        for name, value in wanted.items()
        if built[name] != value
    ]
    layers = layers_of(models)
    if args.transformer_impl not in (None, layers):
        text = f": the model was built with {layers} layers, TrainingArguments ask for {args.transformer_impl}"
        problems.append(Problem("transformer_impl", text))
    if args.pipeline_balance == "head_cost" and getattr(models[0], "pipeline_plan", None) is None:
        text = "is head_cost, but the model was built without a ModelOptions.pipeline_plan"
        problems.append(Problem("pipeline_balance", text))
    if len(models) != (args.virtual_pipeline_model_parallel_size or 1):
        name = "virtual_pipeline_model_parallel_size"
        problems.append(Problem(name, f"is {getattr(args, name)}, but the model has {len(models)} chunks on this rank"))
    raise_if_any(problems, "the model does not fit the run; build it with the run's settings")


def to_precision(models: Sequence[torch.nn.Module], args: TrainingArguments) -> list[torch.nn.Module]:
    """Wraps bare `GPTModel` chunks for half precision; leaves fp32 and already wrapped chunks as they are."""
    if args.params_dtype == torch.float32:
        return list(models)
    return [_to_16_bits(model) if isinstance(model, GPTModel) else model for model in models]


def _to_16_bits(model: GPTModel) -> Float16Module:
    with bias_kept_in_fp32(model):
        return Float16Module(model.config, model)


def wrap_for_training(models: Sequence[torch.nn.Module], args: TrainingArguments) -> list[DistributedDataParallel]:
    """Wraps chunks in Megatron's DDP; chunks that a caller wrapped already pass through."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=args.overlap_grad_reduce,
        overlap_param_gather=args.overlap_param_gather,
        use_distributed_optimizer=args.use_distributed_optimizer,
    )
    wrapped = []
    for index, model in enumerate(models):
        if isinstance(model, DistributedDataParallel):
            for name in ("use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather"):
                if getattr(model.ddp_config, name) != getattr(args, name):
                    raise ConfigError(f"{name} differs between TrainingArguments and the chunks in DDP; set both alike")
            ddp = model
        else:
            (model,) = to_precision([model], args)
            separate_experts(model)
            # Later chunks communicate under computation anyway; bucketing them only adds launches.
            ddp = DistributedDataParallel(unwrap(model).config, ddp_config, model, disable_bucketing=index > 0)
        before_destroy(partial(_let_go, ddp))
        wrapped.append(ddp)
    return wrapped


def _let_go(model: DistributedDataParallel) -> None:
    """Cuts the ties that would keep a model, and with it the threads of its process groups, for ever.

    Autograd's accumulators hold the hooks of DDP and the shards of the distributed optimizer hold the accumulators,
    where no garbage collector looks; DDP holds the former and the model's configuration the latter.
    """
    model.grad_accs.clear()
    config = unwrap(model).config
    config.grad_scale_func = config.finalize_model_grads_func = config.no_sync_func = config.grad_sync_func = None


def build_optimizer(models: Sequence[DistributedDataParallel], args: TrainingArguments) -> MegatronOptimizer:
    """AdamW over the chunks' parameters, and the schedule hooks that need it; every rank calls it.

    Each chunk carries `layers_train_alike` then, by which checkpoints name what the optimizer keeps of layers.

    Raises:
        ConfigError: no parameter is trained, on any rank.
    """
    config = OptimizerConfig(
        optimizer="adam",
        lr=args.learning_rate,
        min_lr=args.min_lr,
        weight_decay=args.weight_decay,
        adam_beta1=args.adam_beta1,
        adam_beta2=args.adam_beta2,
        adam_eps=args.adam_epsilon,
        bf16=args.bf16,
        fp16=args.fp16,
        params_dtype=args.params_dtype,
        use_distributed_optimizer=args.use_distributed_optimizer,
        overlap_param_gather=args.overlap_param_gather,
        # Megatron measures the norm only where it clips; an infinite limit measures and never clips.
        clip_grad=args.max_grad_norm or float("inf"),
        log_num_zeros_in_grad=args.log_num_zeros_in_grad,
    )
    chunks = [unwrap(model) for model in models]
    is_alike = layers_train_alike(chunks)
    for chunk in chunks:
        chunk.layers_train_alike = is_alike
    optimizer = get_megatron_optimizer(config, list(models))
    # Where experts alone are trained, the rest has one without anything, which cannot be saved.
    optimizer.chained_optimizers = [sub for sub in optimizer.chained_optimizers if not sub.is_stub_optimizer]
    if not optimizer.chained_optimizers:
        raise ConfigError(
            "no parameter of the model is trained: requires_grad is False for all of them; set it to True for some "
            "before the trainer is made"
        )
    model_config = unwrap(models[0]).config
    model_config.grad_scale_func = optimizer.scale_loss
    model_config.finalize_model_grads_func = finalize_model_grads
    no_sync, start_sync = [model.no_sync for model in models], [model.start_grad_sync for model in models]
    model_config.no_sync_func = no_sync[0] if len(models) == 1 else no_sync
    if args.overlap_grad_reduce:
        model_config.grad_sync_func = start_sync[0] if len(models) == 1 else start_sync
    return optimizer


def checked_warmup(args: TrainingArguments, total_steps: int) -> int:
    """Steps of warm-up in a run of `total_steps` updates.

    Raises:
        ConfigError: the warm-up is as long as the run.
    """
    warmup = args.warmup_steps_of(total_steps)
    if warmup >= total_steps:
        raise ConfigError(
            f"warm-up takes {warmup} of {total_steps} steps; lower warmup_steps or warmup_ratio, or train longer"
        )
    return warmup


def build_scheduler(optimizer: MegatronOptimizer, args: TrainingArguments, total_steps: int) -> OptimizerParamScheduler:
    """Megatron's learning-rate schedule over `total_steps` updates.

    Raises:
        ConfigError: the warm-up is as long as the run.
    """
    warmup = checked_warmup(args, total_steps)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=args.learning_rate,
        min_lr=args.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=total_steps,
        lr_decay_style=args.lr_scheduler_type,
        start_wd=args.weight_decay,
        end_wd=args.weight_decay,
        wd_incr_steps=total_steps,
        wd_incr_style="constant",
        # A checkpoint's own settings were compared with these, or may differ by request.
        override_opt_param_scheduler=True,
        use_checkpoint_opt_param_scheduler=False,
    )


def use_settings(optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler, args: TrainingArguments) -> None:
    """Makes a restored optimizer follow `args`: its parameter groups came with the settings of the run that saved."""
    for group in optimizer.param_groups:
        group |= {
            "max_lr": args.learning_rate,
            "min_lr": args.min_lr,
            "betas": (args.adam_beta1, args.adam_beta2),
            "eps": args.adam_epsilon,
        }
    scheduler.step(0)  # from these the rate of the step to come


def sync_parameters(models: Sequence[DistributedDataParallel]) -> None:
    """Brings every rank the weights of the last update, which `overlap_param_gather` leaves to the next forward pass.

    Whoever reads weights in another way than by a forward pass of `models` (a checkpoint, an export) calls it first, on
    every rank; in every other setting the weights are complete already and nothing happens.
    """
    for model in models:
        if model.ddp_config.overlap_param_gather:
            model.start_param_sync(force_sync=True)


def gradients_are_finite(models: Sequence[DistributedDataParallel]) -> bool:
    """Whether the fp32 norm of every gradient buffer of this rank is finite; costs one pass over the gradients."""
    buffers = [buffer for model in models for buffer in (*model.buffers, *model.expert_parallel_buffers)]
    if not buffers:
        return True
    norms = torch.stack([torch.linalg.vector_norm(buffer.grad_data, dtype=torch.float32) for buffer in buffers])
    return bool(torch.isfinite(norms).all())
