"""The same short training run in many layouts of ranks, compared with one process: what `make parity` and tests share.

Design decisions:
- A run takes three optimizer steps of eight pairs, whatever the layout: data parallelism and accumulation share them.
- Weights depend on a seed and a tensor's name, so every layout starts from the same bits and exports comparable files.
- One rule for all of them, `TOLERANCES`: sums in another order, and nothing else, may tell a layout from one process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from checks.tiny import tiny_pairs
from fastpref.data import TokenizedPair
from fastpref.losses import DPOConfig
from fastpref.run.plan.pipeline import plan_pipeline
from fastpref.trainer import (
    DPOTrainer,
    LoraConfig,
    ModelOptions,
    TrainingArguments,
    add_lora,
    build_models,
    initialize_megatron,
    load_models,
    save_adapter,
    save_hf,
)
from fastpref.trainer.ranks.platform import destroy

STEPS = 3
STEP_PAIRS = 8
UNTIMED = ("perf/", "memory/", "alarm/")
MODEL: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}

GEMMA: dict[str, Any] = {**MODEL, "model_type": "gemma3_text", "sliding_window": 4, "sliding_window_pattern": 2}
EXPERTS = {
    **MODEL,
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    # its load-balancing loss is a mean over microbatches, which other layouts make of other pairs
    "router_aux_loss_coef": 0.0,
}
WINDOWED = {
    **{key: value for key, value in MODEL.items() if key != "head_dim"},
    "model_type": "qwen2",
    "use_sliding_window": True,
    "sliding_window": 4,
    "max_window_layers": 2,
}


class Tolerance(NamedTuple):
    """Largest differences of a layout from one process in the same number format.

    `metric` bounds |ours - theirs| / max(|theirs|, 1) of every logged metric of every step and of the evaluation: what
    is small there is the difference of two log-probs near 64, whose last digits are worth 8e-6 each. `update` bounds
    |ours - theirs| / |theirs - start|, in L2 norms, of every tensor of the trained model.
    """

    metric: float
    update: float


TOLERANCES = {torch.float32: Tolerance(metric=2e-5, update=1e-3)}


@dataclass(frozen=True, kw_only=True)
class ShortRun:
    """A run of `STEPS` steps of `STEP_PAIRS` pairs; travels to worker ranks by pickle."""

    loss: DPOConfig
    """The preference loss."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `TrainingArguments`: layout, precision and the like."""
    policy: Mapping[str, Any] | str = field(default_factory=lambda: MODEL)
    """Config of a model with random weights, or a model directory."""
    reference: str | None = None
    """Model directory; None takes random weights for a random policy without adapters, else the policy's own."""
    pairs_per_microbatch: int = 2
    """Pairs in a microbatch."""
    head_layers: float = 0.0
    """Cost of the head that the pipeline plan is made for."""
    lora: LoraConfig | None = None
    """Adapters to train in the place of the model's weights; those alone are exported then."""


def _case(ranks: int, **changes: Any) -> tuple[int, dict[str, Any]]:
    return ranks, changes


_SHARDED = {"use_distributed_optimizer": True}
_OVERLAPPED = {**_SHARDED, "overlap_grad_reduce": True, "overlap_param_gather": True}
_TP2 = {"tensor_model_parallel_size": 2}
_PP2 = {"pipeline_model_parallel_size": 2}
_VPP2 = {**_PP2, "virtual_pipeline_model_parallel_size": 2}
_SP2 = {**_TP2, "sequence_parallel": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2": _case(2, **_TP2),
    "TP2-SP": _case(2, **_SP2),
    "PP2": _case(2, **_PP2),
    "PP2-VPP2": _case(2, **_VPP2),
    "DP2": _case(2),
    "DP2 sharded optimizer": _case(2, **_SHARDED),
    "DP2 overlapped reduce": _case(2, overlap_grad_reduce=True),
    "DP2 overlapped reduce and gather": _case(2, **_OVERLAPPED),
    "DP2 recompute": _case(2, recompute_granularity="full"),
    "TP2-SP recompute": _case(2, **_SP2, recompute_granularity="full"),
    "PP2 recompute selective": _case(2, **_PP2, recompute_granularity="selective"),
    "CP2": _case(2, context_parallel_size=2),
    "TP4": _case(4, tensor_model_parallel_size=4),
    "TP2 x PP2": _case(4, **_TP2, **_PP2),
    "TP2-SP x PP2-VPP2": _case(4, **_SP2, **_VPP2),
    "TP2-SP x DP2 sharded optimizer": _case(4, **_SP2, **_SHARDED),
    "CP4": _case(4, context_parallel_size=4),
    "TP2-SP x CP2": _case(4, **_SP2, context_parallel_size=2),
    "PP2-VPP2 x CP2": _case(4, **_VPP2, context_parallel_size=2),
    "CP2 x DP2 overlapped reduce and gather": _case(4, context_parallel_size=2, **_OVERLAPPED),
    "PP2 x DP2": _case(4, **_PP2),
    "PP2-VPP2 x DP2 overlapped reduce and gather": _case(4, **_VPP2, **_OVERLAPPED),
}
"""Name -> (ranks, fields of `TrainingArguments`): the layouts that are compared with one process."""
_EP2 = {"expert_model_parallel_size": 2}
EXPERT_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "EP2": _case(2, **_EP2),
    "EP2 overlapped reduce and gather": _case(2, **_EP2, **_OVERLAPPED),
    "EP2 x TP2-SP": _case(4, **_EP2, **_SP2),
    "EP2 x CP2": _case(4, **_EP2, context_parallel_size=2),
    "EP2 x PP2-VPP2": _case(4, **_EP2, **_VPP2),
}
"""The same for `EXPERTS`."""


class Difference(NamedTuple):
    """Largest relative difference of each kind, in the terms of `Tolerance`, with the name of the worst of all."""

    loss: float
    grad_norm: float
    metrics: float
    updates: float
    worst: str

    def within(self, tolerance: Tolerance) -> bool:
        """Whether the layout trained like one process."""
        return max(self.loss, self.grad_norm, self.metrics) <= tolerance.metric and self.updates <= tolerance.update


def train(run: ShortRun, output_dir: str, pairs: Sequence[TokenizedPair] | None = None) -> list[dict[str, float]]:
    """Train on this rank, export the model before and after to `start` and `hf` in `output_dir`; return the log."""
    pairs = tiny_pairs(22, seed=11) if pairs is None else pairs
    world_size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    settings = dict(run.settings)
    ranks = TrainingArguments(**{**settings, "gradient_accumulation_steps": STEP_PAIRS}).layout
    num_microbatches = STEP_PAIRS // run.pairs_per_microbatch // ranks.data_parallel_size(world_size)
    args = TrainingArguments(
        output_dir=output_dir,
        per_device_train_batch_size=run.pairs_per_microbatch,
        gradient_accumulation_steps=num_microbatches,
        learning_rate=5e-3,
        # far above the rounding of the gradients, which Adam would otherwise blow up to full-sized updates
        adam_epsilon=1e-5,
        max_steps=STEPS,
        logging_steps=1,
        report_to=(),
        disable_progress=True,
        save_on_end=False,
        log_token_stats=True,
        log_num_zeros_in_grad=True,
        **settings,
    )
    initialize_megatron(args)
    try:
        policy, reference = _models(run, args)
        _assert_layers(policy, args)
        if run.lora is not None:
            add_lora(policy, run.policy, run.lora, seed=7)
        trainer = DPOTrainer(policy, run.loss, reference, args, train_dataset=pairs, eval_dataset=pairs[:7])
        _export(trainer.model, run, f"{output_dir}/start")
        trainer.train()
        _export(trainer.model, run, f"{output_dir}/hf")
        return trainer.log_history
    finally:
        destroy()


def _assert_layers(models: list, args: TrainingArguments) -> None:
    """Raises AssertionError unless all parts of the layers that compute, routers aside, are whose they are to be.

    Over context-parallel ranks attention is not looked at: in fp32 it is this library's.
    """
    looks_at_attention = args.context_parallel_size == 1
    for name, module in (part for model in models for part in model.named_modules() if ".layers." in part[0]):
        computes = any(True for _ in module.parameters(recurse=False)) and not name.endswith("router")
        is_engine = any(base.__module__.startswith("transformer_engine.") for base in type(module).__mro__)
        if computes or (looks_at_attention and name.endswith("core_attention")):
            whose = "transformer_engine" if is_engine else "local"
            assert whose == (args.transformer_impl or whose), f"{name} is {whose}: {type(module)}"


def _export(models: list, run: ShortRun, directory: str) -> None:
    if run.lora is None:
        save_hf(models, directory, run.policy)
    else:
        save_adapter(models, directory)


def _models(run: ShortRun, args: TrainingArguments) -> tuple[list, list | None]:
    num_layers = run.policy["num_hidden_layers"] if isinstance(run.policy, Mapping) else None
    options = ModelOptions(
        params_dtype=args.params_dtype,
        sequence_parallel=args.sequence_parallel,
        recompute_granularity=args.recompute_granularity,
        pipeline_plan=plan_pipeline(num_layers, args.layout, run.head_layers) if num_layers else None,
        transformer_impl=args.transformer_impl,
    )
    if isinstance(run.policy, str):
        path = run.reference if run.loss.use_ref_model else None
        return load_models(run.policy, options), None if path is None else load_models(path, options)
    has_reference = run.loss.use_ref_model and run.lora is None
    reference = build_models(run.policy, options, seed=6) if has_reference else None
    return build_models(run.policy, options, seed=5), reference


def exported(directory: Path) -> dict[str, Tensor]:
    """Return all tensors of a model directory."""
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def untimed(record: Mapping[str, float]) -> dict[str, float]:
    """Return the numbers of a log record that must not depend on the machine."""
    return {name: value for name, value in record.items() if not name.startswith(UNTIMED)}


def difference(
    log: Sequence[Mapping[str, float]], expected: Sequence[Mapping[str, float]], directory: Path, expected_dir: Path
) -> Difference:
    """Compare two runs by their logs and the models that they exported.

    Raises:
        AssertionError: they did not log the same metrics at the same steps, export the same tensors, or move them.
    """
    assert [record["step"] for record in log] == [record["step"] for record in expected]
    found: dict[str, float] = {}
    for ours, theirs in zip(map(untimed, log), map(untimed, expected), strict=True):
        assert set(ours) == set(theirs), set(ours) ^ set(theirs)
        for name, value in theirs.items():
            relative = abs(ours[name] - value) / max(abs(value), 1.0)
            found[name] = max(found.get(name, 0.0), relative)
    updates = _update_differences(directory, expected_dir)
    groups = {"loss": ("loss", "eval_loss"), "grad_norm": ("grad_norm",)}
    rest = {name: value for name, value in found.items() if name not in (*groups["loss"], *groups["grad_norm"])}
    everything = {**found, **updates}
    return Difference(
        loss=max(found[name] for name in groups["loss"]),
        grad_norm=found["grad_norm"],
        metrics=max(rest.values()),
        updates=max(updates.values()),
        worst=max(everything, key=lambda name: everything[name]),
    )


def _update_differences(directory: Path, expected_dir: Path) -> dict[str, float]:
    ours, theirs, start = exported(directory / "hf"), exported(expected_dir / "hf"), exported(expected_dir / "start")
    assert set(ours) == set(theirs) == set(start)
    differences = {}
    for name, tensor in theirs.items():
        update = (tensor.float() - start[name].float()).norm()
        assert update > 0, f"{name} did not move"
        differences[name] = float((ours[name].float() - tensor.float()).norm() / update)
    return differences
