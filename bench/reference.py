"""Training steps of a real model with its reference in memory and with precomputed log-probs.

One trainer takes both kinds of steps by turns, so that both see the same machine; the memory of each kind is that of a
process of its own. Nothing is timed before both kinds gave the step the same reference log-probs.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bench.measure import Row, status_mib
from bench.workloads import MODELS, ROOT
from checks.tiny import TINY_LLAMA, tiny_pairs
from fastpref.data import DataConfig, PreferenceDataset, load_dataset, load_tokenizer
from fastpref.trainer import (
    DPOConfig,
    DPOTrainer,
    ModelOptions,
    ReferenceCache,
    TrainingArguments,
    build_models,
    initialize_megatron,
    load_models,
    score_reference,
)
from fastpref.trainer.reference.reference import MAX_DRIFT, PrecomputedReference, build_reference

PAIRS = ROOT / "examples" / "data_real" / "pairs.jsonl"
KINDS = ("model", "precomputed")


class Setting:
    """A model, some pairs and the cache of their reference log-probs.

    Args:
        model: a name of `workloads.MODELS`, or "dry" for random weights of a tiny model.
        num_pairs: pairs of one step, one a microbatch.
        max_length: longest sequence in tokens; longer pairs are left out.
        precision: fp32 or bf16.
        folder: where the cache goes.
    """

    def __init__(self, model: str, num_pairs: int, max_length: int, precision: str, folder: Path) -> None:
        self.model, self.path = model, folder / "cache"
        pairs = tiny_pairs(num_pairs) if model == "dry" else _real_pairs(model, max_length)[:num_pairs]
        self.data = PreferenceDataset(pairs)
        self.args = TrainingArguments(
            output_dir=str(folder / "run"),
            bf16=precision == "bf16",
            gradient_accumulation_steps=len(pairs),
            shuffle=False,
            learning_rate=1e-6,
            report_to=(),
            disable_progress=True,
        )
        initialize_megatron(self.args)

    def weights(self) -> list[torch.nn.Module]:
        """The model's chunks."""
        options = ModelOptions(params_dtype=self.args.params_dtype)
        if self.model == "dry":
            return list(build_models(TINY_LLAMA, options, seed=0))
        return list(load_models(ROOT / "runs" / "models" / MODELS[self.model], options))

    def score(self) -> float:
        """Make the cache; seconds that it took without loading the weights."""
        models = self.weights()
        start = time.perf_counter()
        score_reference(models, [self.data], self.path, self.args, identity={})
        return time.perf_counter() - start

    def trainer(self, kind: str) -> DPOTrainer:
        """A trainer with the reference of one of `KINDS`."""
        reference = ReferenceCache(self.path) if kind == "precomputed" else None
        return DPOTrainer(self.weights(), DPOConfig(), reference, self.args, train_dataset=self.data)

    def step(self, trainer: DPOTrainer) -> float:
        """Take one step; its loss."""
        return trainer.engine.run_step(trainer.models_wrapped, trainer.feed.train_batches(0)).loss


def time_steps(model: str, num_pairs: int, max_length: int, precision: str, repeats: int) -> Row:
    """Time steps of both kinds by turns, after one of each; the first policy is the reference."""
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(model, num_pairs, max_length, precision, Path(folder))
        score_s = setting.score()
        trainer = setting.trainer("model")
        cache = ReferenceCache(setting.path)
        datasets = {"training pairs": setting.data}
        references: Mapping[str, Any] = {
            "model": trainer.engine.reference,
            "precomputed": build_reference(trainer.model, cache, trainer.train_config, setting.args, datasets),
        }
        assert isinstance(references["precomputed"], PrecomputedReference)
        drift = _drift(references, trainer, setting.data)
        if drift > MAX_DRIFT[setting.args.params_dtype]:
            raise RuntimeError(f"the cache is {drift:.3g} nat per token away from the model in memory")
        times: dict[str, dict[str, list[float]]] = {kind: {"wall_s": [], "cpu_s": []} for kind in KINDS}
        for turn in range(repeats + 1):
            for kind in KINDS:
                trainer.engine.reference = references[kind]
                wall, cpu = time.perf_counter(), time.process_time()
                setting.step(trainer)
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                if turn:
                    times[kind]["wall_s"].append(round(wall, 3))
                    times[kind]["cpu_s"].append(round(cpu, 3))
        sizes = {"pairs": len(setting.data), "tokens": sum(_tokens(pair) for pair in setting.data)}
    timing = {"times": times, "score_s": round(score_s, 3), "drift_per_token": drift}
    return {"shape": sizes, "threads": torch.get_num_threads(), **timing}


def measure_memory(kind: str, model: str, num_pairs: int, max_length: int, precision: str) -> Row:
    """Resident and peak memory of a process that takes two steps with the reference of one of `KINDS`."""
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(model, num_pairs, max_length, precision, Path(folder))
        if kind == "precomputed":
            setting.score()
        trainer = setting.trainer(kind)
        Path("/proc/self/clear_refs").write_text("5")  # the peak of the steps, not of loading
        setting.step(trainer)
        setting.step(trainer)
        weights = sum(p.numel() * p.element_size() for chunk in trainer.model for p in chunk.parameters())
        memory = {"resident_mib": status_mib("VmRSS"), "peak_mib": status_mib("VmHWM"), "weights_mib": weights / 2**20}
    return {name: round(value, 1) for name, value in memory.items()}


def _real_pairs(model: str, max_length: int) -> PreferenceDataset:
    data = DataConfig(max_length=max_length, truncation="drop", on_bad_pair="drop", boundary="common_prefix")
    return load_dataset(PAIRS, load_tokenizer(ROOT / "runs" / "models" / MODELS[model]), data)


def _drift(references: Mapping[str, Any], trainer: DPOTrainer, data: PreferenceDataset) -> float:
    batches = trainer.feed.train_batches(0)
    attached = [reference.attach(batches, data) for reference in references.values()]
    distance = sum(float((a.ref_logps_S - b.ref_logps_S).abs().sum()) for a, b in zip(*attached, strict=True))
    return distance / sum(float(batch.counts_S.sum()) for batch in batches)


def _tokens(pair: Any) -> int:
    return len(pair.chosen_input_ids) + len(pair.rejected_input_ids)
