"""Steps of the trainer beside TRL's `DPOTrainer`: the same pairs, loss, optimizer and metrics, a process for each run.

Design decisions:
- Both trainers run through their own front doors, by `checks.trl_parity`.
- A step lasts from the end of one optimizer update to the end of the next, seen by a hook that torch gives to all
  optimizers: what either trainer does around its step (data, metrics, logging) counts.
- A run begins with steps on the shortest pairs, which warm up and are not timed. Every step of every run is compared
  with TRL's; a row that answers anything else has no times.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from bench.measure import Row, return_memory, status_mib
from bench.workloads import ROOT
from checks.trl_parity.runs import ParityRun, fastpref_config, run_fastpref, run_trl
from fastpref.losses import DPOConfig
from fastpref.trainer import ReferenceConfig, RunConfig

UNTIMED_STEPS = 2
"""The first has equal policy and reference; from the second on rewards are not 0."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One row: a trainer and how it is set."""

    title: str
    trl: Mapping[str, Any] | None = None
    """Fields of TRL's configuration beside its defaults; None: this library."""
    training: Mapping[str, Any] | None = None
    """Fields of our `TrainingArguments`."""
    pair_by_pair: bool = False
    """Microbatches of one pair; else one of all pairs of a step."""
    precomputed: bool = False
    """The reference's log-probs are computed before training."""

    @property
    def shares_prompts(self) -> bool:
        """Whether a prompt is computed once for both answers."""
        return bool((self.training or {}).get("prefix_sharing"))

    @property
    def activations(self) -> str:
        """What the backward pass finds of a layer's activations: all of them, or its input alone."""
        if self.trl is None:
            recomputes = (self.training or {}).get("recompute_granularity") == "full"
        else:
            recomputes = self.trl.get("gradient_checkpointing", True)  # the default of TRL, not of transformers
        return "recomputed" if recomputes else "kept"


_PRECOMPUTE = {"precompute_ref_log_probs": True}
_PACKED = {"packing": True}
_SHARED = {"packing": True, "prefix_sharing": True}
_ACTIVE = {"head_backward": "active"}
_SCREENED = _ACTIVE | {"head_forward": "screened"}
_RECOMPUTE = {"recompute_granularity": "full"}
SETTINGS = {
    "trl": Setting(title="TRL", trl={}),
    "trl-precomputed": Setting(title="TRL, precomputed reference", trl=_PRECOMPUTE, precomputed=True),
    "trl-tuned": Setting(
        title="TRL, precomputed reference, one pair a microbatch",
        trl=_PRECOMPUTE | {"gradient_checkpointing": False},
        pair_by_pair=True,
        precomputed=True,
    ),
    "padded": Setting(title="fastpref, padded", training={}),
    "packed": Setting(title="fastpref, packed", training=_PACKED),
    "shared": Setting(title="fastpref, packed, prompt shared", training=_SHARED),
    "shared-precomputed": Setting(
        title="fastpref, packed, prompt shared, precomputed reference", training=_SHARED, precomputed=True
    ),
    "shared-active": Setting(
        title="fastpref, packed, prompt shared, precomputed reference, active head",
        training=_SHARED | _ACTIVE,
        precomputed=True,
    ),
    "shared-screened": Setting(
        title="fastpref, packed, prompt shared, precomputed reference, screened head",
        training=_SHARED | _SCREENED,
        precomputed=True,
    ),
    "padded-recomputed": Setting(title="fastpref, padded", training=_RECOMPUTE),
    "shared-recomputed": Setting(
        title="fastpref, packed, prompt shared, precomputed reference",
        training=_SHARED | _RECOMPUTE,
        precomputed=True,
    ),
    "trl-padding-free": Setting(title="TRL, padding_free", trl={"padding_free": True}),
    "trl-liger": Setting(title="TRL, use_liger_kernel", trl={"use_liger_kernel": True}),
}


def run_row(name: str, model: str, data: str, num_pairs: int, num_steps: int, max_length: int, pack_length: int) -> Row:
    """Train as a row is set, for `UNTIMED_STEPS` steps and then `num_steps` that are timed.

    Args:
        name: of `SETTINGS`.
        model: a Hugging Face model directory.
        data: a file of pairs, in the order of the steps.
        num_pairs: pairs of a step.
        num_steps: timed steps.
        max_length: longest sequence in tokens.
        pack_length: most positions of a packed row.

    Returns:
        Seconds of the timed steps, peak memory from the first update on, and the metrics of all steps.
    """
    setting = SETTINGS[name]
    clock = _StepClock()
    hook = register_optimizer_step_post_hook(clock)
    start = time.perf_counter()
    try:
        with TemporaryDirectory() as folder:
            run = parity_run(setting, model, data, num_pairs, num_steps, max_length, Path(folder))
            if setting.trl is None:
                record = run_fastpref(run, _config(setting, run, pack_length))
            else:
                record = run_trl(run, _trl_settings() | dict(setting.trl))
    finally:
        hook.remove()
    build_s = time.perf_counter() - start - record.seconds
    steps = [{metric: step[metric] for metric in run.metrics} for step in record.steps]
    return {"steps": steps, "build_s": round(build_s, 3), "threads": torch.get_num_threads(), **clock.read(num_steps)}


def parity_run(
    setting: Setting, model: str, data: str, num_pairs: int, num_steps: int, max_length: int, folder: Path
) -> ParityRun:
    """What both trainers are asked for; microbatches of one pair leave out metrics that TRL averages over them."""
    return ParityRun(
        model_dir=Path(model),
        data_file=Path(data),
        work_dir=folder,
        loss=DPOConfig(tie_value=0.0),
        steps=UNTIMED_STEPS + num_steps,
        batch_pairs=1 if setting.pair_by_pair else num_pairs,
        accumulation=num_pairs if setting.pair_by_pair else 1,
        max_length=max_length,
        # Rewards well above the rounding of log-probs, after one update.
        learning_rate=1e-4,
        # Gradients of pure rounding would otherwise move weights by full steps of random sign.
        adam_epsilon=1e-5,
        token_stats=not setting.pair_by_pair,
    )


def _config(setting: Setting, run: ParityRun, pack_length: int) -> RunConfig:
    config, training = fastpref_config(run), dict(setting.training or {})
    if training.get("packing"):
        training["pack_length"] = pack_length
    reference = ReferenceConfig(mode="precomputed") if setting.precomputed else None
    return replace(config, reference=reference, training=replace(config.training, **training))


def _trl_settings() -> dict[str, Any]:
    """What a user of TRL gets who sets nothing, where `trl_parity` asks for something else."""
    import trl

    defaults = {field.name: field.default for field in fields(trl.DPOConfig)}
    names = ("gradient_checkpointing", "optim")
    return {name: defaults[name] for name in names} | {"use_cpu": not torch.cuda.is_available()}


class _StepClock:
    """A hook of optimizers that notes when each update ended, and the peak of memory since the first."""

    def __init__(self) -> None:
        self._ends: list[tuple[float, float]] = []
        self._peak_mib = 0.0

    def __call__(self, *_: Any) -> None:
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.synchronize()
        if self._ends:
            self._peak_mib = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else status_mib("VmHWM")
        else:
            # Weights, gradients and moments are there now, and what loading took is given back.
            return_memory()
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            else:
                Path("/proc/self/clear_refs").write_text("5")
        self._ends.append((time.perf_counter(), time.process_time()))

    def read(self, num_steps: int) -> Row:
        """Seconds of the last `num_steps` steps."""
        assert len(self._ends) == UNTIMED_STEPS + num_steps, "an optimizer step of a run is one call of torch's"
        spans = [
            [after - before for before, after in zip(start, end, strict=True)]
            for start, end in zip(self._ends[UNTIMED_STEPS - 1 : -1], self._ends[UNTIMED_STEPS:], strict=True)
        ]
        wall_s, cpu_s = ([round(span[clock], 4) for span in spans] for clock in (0, 1))
        return {"wall_s": wall_s, "cpu_s": cpu_s, "peak_mib": round(self._peak_mib, 1)}


def write_tiny_model(folder: Path) -> None:
    """A random Llama with the tokenizer of the examples."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(ROOT / "examples" / "tokenizer")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
