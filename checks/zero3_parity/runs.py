"""The same short TRL training under DeepSpeed ZeRO-3, by either trainer: what `make parity-zero3` and tests share.

Design decisions:
- Two CPU ranks over gloo. Accelerate starts DeepSpeed on devices only, so the state that it would make is made here.
- The vocabulary makes the output layer larger than DeepSpeed's default `stage3_param_persistence_threshold` (1e5
  elements): what is smaller stays whole on every rank, and a tiny model would test nothing.
- DeepSpeed's own settings keep weights that are used again soon. `STRICT` frees each one after each use, so that a
  backward pass has nothing but what was gathered for it.
- A trainer class travels as "module:name": this room of the package may not import `integrations`.
- Every run reports what DeepSpeed did (`Run.evidence`); a run in which the output layer was whole proves nothing.
"""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from checks.layout_parity.runs import TOLERANCES, Tolerance
from fastpref.testing.workers import RankPool

RANKS = 2
TIMEOUT_S = 120.0
BUILTIN_LINEAR = torch.nn.functional.linear
# What a config file asks for that leaves everything to DeepSpeed; "auto" takes the trainer's arguments.
DEFAULT: dict[str, Any] = {
    "zero_optimization": {"stage": 3},
    "bf16": {"enabled": "auto"},
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}
_NOTHING_KEPT = ("param_persistence_threshold", "max_reuse_distance", "max_live_parameters", "prefetch_bucket_size")
STRICT = {**DEFAULT, "zero_optimization": {"stage": 3, **{f"stage3_{name}": 0 for name in _NOTHING_KEPT}}}
TRAINERS = {
    "DPO": ("trl:DPOTrainer", "fastpref.integrations.trl:DPOTrainer"),
    "ORPO": ("trl.experimental.orpo:ORPOTrainer", "fastpref.integrations.trl:ORPOTrainer"),
}
MODEL: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "eos_token_id": 1,
    "bos_token_id": None,
    "pad_token_id": 0,
}
TRAINING: dict[str, Any] = {
    "max_steps": 3,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "max_length": 64,
    "train_sampling_strategy": "sequential",
    "learning_rate": 5e-3,
    "lr_scheduler_type": "constant",
    # far above the rounding of the gradients, which Adam would otherwise blow up to full-sized updates
    "adam_epsilon": 1e-5,
    "optim": "adamw_torch",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "bf16": False,
    "accelerator_config": {"use_configured_state": True},
}
# Counts of signs and of largest logits: a rounding of 16 bits decides them at ties.
COUNTS = ("accuracies", "token_accuracy")
TIMINGS = ("runtime", "samples_per_second", "steps_per_second")


@dataclass(frozen=True, kw_only=True)
class ShortRun:
    """A run of three steps and an evaluation; travels to worker ranks by pickle."""

    files: str
    """Folder that `write_files` filled."""
    objective: str = "DPO"
    """A key of `TRAINERS`."""
    tied: bool = False
    """Whether input embedding and output layer are one weight."""
    deepspeed: Mapping[str, Any] = field(default_factory=lambda: DEFAULT)
    """The DeepSpeed config."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of TRL's config beside `TRAINING`."""
    lora: Mapping[str, Any] | None = None
    """Fields of PEFT's `LoraConfig`; None trains all weights."""
    has_reference: bool = True
    """Whether a reference model is passed."""
    built_before: bool = False
    """Whether the policy is whole when the trainer gets it, instead of loaded in parts."""

    @property
    def policy(self) -> str:
        """Directory of the model to train."""
        return f"{self.files}/{'tied' if self.tied else 'untied'}-policy"


class Run(NamedTuple):
    """What one rank reports."""

    log: list[dict[str, float]]
    """Metrics of every step, then of the evaluation."""
    start: dict[str, Tensor]
    """Trainable weights before training, whole, fp32."""
    end: dict[str, Tensor]
    """The same afterwards; of bf16 weights, DeepSpeed's fp32 master."""
    evidence: dict[str, Any]
    """What DeepSpeed did to the model."""


class Difference(NamedTuple):
    """Largest relative differences, in the terms of `Tolerance`, with the names of the worst."""

    metric: float
    update: float
    worst_metric: str
    worst_update: str

    def within(self, tolerance: Tolerance) -> bool:
        """Whether the two trained alike."""
        return self.metric <= tolerance.metric and self.update <= tolerance.update


def write_files(folder: Path, tokenizer: Path, pairs: Path) -> str:
    """Write the models, and copy tokenizer and pairs; returns the folder, for `ShortRun.files`."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    for tied in (False, True):
        for seed, role in enumerate(("policy", "reference")):
            torch.manual_seed(seed)
            config = AutoConfig.for_model("llama", **MODEL, tie_word_embeddings=tied)
            model = AutoModelForCausalLM.from_config(config)
            model.save_pretrained(folder / f"{'tied' if tied else 'untied'}-{role}")
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder / "tokenizer")
    (folder / "pairs.jsonl").write_text(pairs.read_text(encoding="utf-8"), encoding="utf-8")
    return str(folder)


@contextmanager
def zero3_ranks() -> Iterator[RankPool]:
    """Ranks of their own, as DeepSpeed replaces functions of torch for the rest of a process."""
    # read when DeepSpeed and the Hugging Face libraries are imported, which the fork server does
    os.environ.update(DS_ACCELERATOR="cpu", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1")
    os.environ.update(TRANSFORMERS_VERBOSITY="error", HF_DATASETS_DISABLE_PROGRESS_BARS="1")
    preload = ("torch", "deepspeed", "trl.trainer.dpo_trainer", "transformers.models.llama.modeling_llama", __name__)
    with RankPool(RANKS, TIMEOUT_S, preload=preload) as pool:
        yield pool


def train(run: ShortRun, trainer_class: str, cache: str) -> Run:
    """Train on this rank by the class named "module:name".

    Args:
        run: the run.
        trainer_class: TRL's class or the one that replaces it.
        cache: folder of cached data sets. TRL reads reference log-probs from there whichever class wrote them.
    """
    _start_deepspeed()
    trainer = _build(run, trainer_class, cache)
    start = _whole_weights(trainer.model)
    trainer.train()
    evidence = _evidence(trainer)  # an evaluation leaves weights whole that the next one needs
    trainer.evaluate()
    # The last record but the evaluation's is a summary of the run.
    log = [_untimed(record) for record in trainer.state.log_history if "train_loss" not in record]
    end = _master_weights(trainer.model)
    _end_deepspeed(trainer)
    return Run(log, start, end, evidence) if torch.distributed.get_rank() == 0 else Run([], {}, {}, evidence)


def _start_deepspeed() -> None:
    """Bring the process to the state that a launcher and accelerate leave it in on devices."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # the fork server may be older than `zero3_ranks`
    import deepspeed
    import transformers.training_args
    from accelerate.state import AcceleratorState, PartialState

    rank = str(torch.distributed.get_rank())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE=str(RANKS))
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    warnings.simplefilter("ignore")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # On a CPU DeepSpeed would compile an operator for shared memory; a process that is killed meanwhile leaves a lock
    # on which all later ones wait for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Otherwise `bf16=True` asks for `use_cpu=True` where there is no device, which leaves DeepSpeed out.
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(backend="gloo")


def _build(run: ShortRun, trainer_class: str, cache: str) -> Any:
    """The trainer of `run`."""
    import datasets  # type: ignore[import-untyped]
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback

    module, _, name = trainer_class.partition(":")
    policy: Any = run.policy
    if run.built_before:  # no config is in force yet, so the weights are ordinary ones
        policy = AutoModelForCausalLM.from_pretrained(run.policy, dtype=torch.float32)
    args = _arguments(run, cache)
    options: dict[str, Any] = {}
    if run.objective == "DPO" and run.has_reference:
        reference = run.policy.replace("policy", "reference")
        options["ref_model"] = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32)
    if run.lora is not None:
        from peft import LoraConfig

        options["peft_config"] = LoraConfig(task_type="CAUSAL_LM", **run.lora)
    if run.objective == "ORPO" and not run.built_before:
        policy = AutoModelForCausalLM.from_pretrained(run.policy, dtype=torch.float32)
    # From a file: TRL keeps reference log-probs beside it; for a data set in memory each rank looks in another folder.
    data = datasets.Dataset.from_json(f"{run.files}/pairs.jsonl", cache_dir=cache)
    trainer = getattr(importlib.import_module(module), name)(
        policy,
        args=args,
        train_dataset=data.select(range(24)),
        eval_dataset=data.select(range(24, 30)),
        processing_class=AutoTokenizer.from_pretrained(f"{run.files}/tokenizer"),
        **options,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _arguments(run: ShortRun, cache: str) -> Any:
    """TRL's config; while it lives, models are loaded in parts."""
    fields = {**TRAINING, "output_dir": f"{cache}/out", "deepspeed": dict(run.deepspeed), **run.settings}
    if run.objective == "ORPO":
        from trl.experimental.orpo import ORPOConfig

        return ORPOConfig(remove_unused_columns=False, **fields)
    from trl import DPOConfig

    return DPOConfig(**fields)


def _whole_weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """Trainable weights of a model that has no optimizer yet."""
    import deepspeed

    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    with deepspeed.zero.GatheredParameters(list(trained.values())):
        return {name: weight.detach().float().clone() for name, weight in trained.items()}


def _master_weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """Trainable weights as the optimizer of ZeRO-3 holds them."""
    from deepspeed.utils import safe_get_full_fp32_param

    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    return {name: safe_get_full_fp32_param(weight).detach().clone() for name, weight in trained.items()}


def _evidence(trainer: Any) -> dict[str, Any]:
    """Whether linear layers were replaced, and how much of the model lies on one rank alone."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = base.get_output_embeddings()
    weights = list(model.parameters())
    whole = sum(weight.ds_numel for weight in weights)
    return {
        "memory_efficient_linear": torch.nn.functional.linear is not BUILTIN_LINEAR,
        "head_is_partitioned": all(weight.numel() == 0 for weight in head.parameters()),
        "partitioned_share": sum(weight.ds_numel for weight in weights if weight.numel() == 0) / whole,
        "engine": type(trainer.model_wrapped).__name__,
    }


def _end_deepspeed(trainer: Any) -> None:
    """Undo what outlives a trainer: hooks, and the linear layer that DeepSpeed puts in place for good."""
    for engine in (trainer.model_wrapped, getattr(trainer, "ref_model", None)):
        if engine is not None:
            engine.destroy()
    torch.nn.functional.linear = BUILTIN_LINEAR


def _untimed(record: Mapping[str, float]) -> dict[str, float]:
    """A record without what depends on the machine."""
    return {name: value for name, value in record.items() if not name.endswith(TIMINGS)}


def difference(ours: Run, theirs: Run, *, with_counts: bool = True) -> Difference:
    """How far two runs are apart; see `Tolerance`.

    Args:
        ours: a run.
        theirs: what it is compared with.
        with_counts: whether to compare `COUNTS` too.

    Raises:
        AssertionError: other metrics, steps or weights, other weights at the start, or one that did not move.
    """
    assert len(ours.log) == len(theirs.log) == TRAINING["max_steps"] + 1, (len(ours.log), len(theirs.log))
    metrics: dict[str, float] = {}
    for our_record, their_record in zip(ours.log, theirs.log, strict=True):
        assert our_record.keys() == their_record.keys(), our_record.keys() ^ their_record.keys()
        for name, value in their_record.items():
            if name.endswith(COUNTS) and not with_counts:
                continue
            relative = abs(our_record[name] - value) / max(abs(value), 1.0)
            metrics[name] = max(metrics.get(name, 0.0), relative if relative == relative else float("inf"))
    assert ours.end.keys() == theirs.end.keys(), ours.end.keys() ^ theirs.end.keys()
    updates = {}
    for name, weight in theirs.end.items():
        # one of them may be in bf16
        assert torch.allclose(ours.start[name], theirs.start[name], rtol=2**-8, atol=0), (
            f"{name} did not begin the same"
        )
        update = (weight - theirs.start[name]).norm()
        assert update > 0, f"{name} did not move"
        updates[name] = float((ours.end[name] - weight).norm() / update)
    worst_metric, worst_update = max(metrics, key=metrics.__getitem__), max(updates, key=updates.__getitem__)
    return Difference(metrics[worst_metric], updates[worst_update], worst_metric, worst_update)


def tolerance(theirs: Run, theirs_in_fp32: Run | None) -> Tolerance:
    """What two runs may differ by: the rule of fp32; in bf16 twice what TRL's own run is off from fp32."""
    if theirs_in_fp32 is None:
        return TOLERANCES[torch.float32]
    own = difference(theirs, theirs_in_fp32, with_counts=False)
    return Tolerance(metric=2 * own.metric, update=2 * own.update)


def check_evidence(runs: Sequence[Run]) -> dict[str, Any]:
    """What DeepSpeed did to the first run.

    Raises:
        AssertionError: in some run the output layer was whole, or linear layers were torch's own.
    """
    for run in runs:
        assert run.evidence["memory_efficient_linear"] and run.evidence["head_is_partitioned"], run.evidence
    return runs[0].evidence
