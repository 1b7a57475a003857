"""Part 3: steps of the trainer on one GPU, from the head that most trainers have to everything that fastpref saves.

One model with random weights serves all settings and never moves (learning rate 0, the update runs all the same), so
that every step computes the same numbers; they are compared before anything is timed. Random weights have a flat
softmax, which would leave the active plan nothing to leave out, so their head is made as peaked as a real one
(`sharpen`); everything else costs what it costs with any weights.

Dims: T tokens, S sequences, R response rows, H hidden, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.gpu.inputs import real_shares
from bench.measure import Row, status_mib
from bench.workloads import BULK, popularity
from checks.tiny import TINY_LLAMA, pair_of
from fastpref import SequenceLogps
from fastpref.data import PreferenceDataset, TokenizedPair
from fastpref.run.architecture.architecture import Architecture
from fastpref.run.plan.pipeline import head_flops, layer_flops
from fastpref.trainer import (
    DPOConfig,
    DPOTrainer,
    ModelOptions,
    ReferenceCache,
    TrainingArguments,
    build_models,
    initialize_megatron,
    score_reference,
)
from fastpref.trainer.model import head
from fastpref.trainer.ranks import platform
from fastpref.trainer.reference.reference import build_reference
from fastpref.trainer.step.feed import PairFeed

LLAMA_1B = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
"""Shape of Llama-3.2-1B, with a head of its own."""
LEVEL = 100.0
"""How far the channel that decides the logits outweighs the others, over the square root of H."""
TOLERANCES = {torch.bfloat16: 3e-2, torch.float32: 1e-3}
"""Relative, of log-probs and gradient norm: other kernels for other rows, in 16 bits."""
COMPARED = ("logps/chosen", "logps/rejected", "grad_norm")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to train."""

    title: str
    is_naive: bool = False
    """Logits of every position, held."""
    backward: str = "active"
    """Plan of the fused head."""
    packing: bool = False
    prefix_sharing: bool = False
    is_cached: bool = False
    """Reference log-probs precomputed, its weights not in memory."""


SETTINGS = {
    "naive": Setting(title="logits of all positions, padded rows", is_naive=True),
    "fused": Setting(title="fused head, exact, padded rows", backward="exact"),
    "active": Setting(title="fused head, active, padded rows"),
    "packed": Setting(title="fused head, active, packed rows", packing=True),
    "shared": Setting(title="fused head, active, packed rows, shared prompts", packing=True, prefix_sharing=True),
    "cached": Setting(title="the same, precomputed reference", packing=True, prefix_sharing=True, is_cached=True),
}
"""In this order: the last one gives the reference's weights away."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is trained on."""

    model: dict[str, Any]
    num_pairs: int = 16
    """Of an optimizer step."""
    microbatch_pairs: int = 2
    length: int = 1024
    """Of the longest sequence; the shortest is half as long."""
    pack_length: int = 4096
    bf16: bool = True


DRY = Sizes(
    model=TINY_LLAMA | {"vocab_size": 32768}, num_pairs=4, microbatch_pairs=2, length=24, pack_length=96, bf16=False
)
FULL = Sizes(model=LLAMA_1B)


class Steps:
    """A trainer, and feeds and references of every setting.

    Args:
        sizes: model and data.
        folder: for the reference cache.
    """

    def __init__(self, sizes: Sizes, folder: Path) -> None:
        self.sizes = sizes
        self.arch = Architecture.from_hf(sizes.model)
        self.args = TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=sizes.microbatch_pairs,
            gradient_accumulation_steps=sizes.num_pairs // sizes.microbatch_pairs,
            learning_rate=0.0,
            bf16=sizes.bf16,
            packing=True,
            prefix_sharing=True,
            pack_length=sizes.pack_length,
            shuffle=False,
            report_to=(),
            disable_progress=True,
        )
        initialize_megatron(self.args)
        self.data = PreferenceDataset(random_pairs(sizes))
        models = build_models(sizes.model, ModelOptions(params_dtype=self.args.params_dtype), seed=0)
        sharpen(models[0])
        self.trainer = DPOTrainer(models, DPOConfig(), None, self.args, train_dataset=self.data)
        self._cache = folder / "reference-cache"
        self._expected: dict[str, float] | None = None

    def close(self) -> None:
        """Give model and process group back."""
        del self.trainer
        platform.destroy()

    def measure(self, name: str, repeats: int) -> Row:
        """Compare a step with that of the fused head on padded rows, then time and weigh steps of a setting."""
        setting = SETTINGS[name]
        if self._expected is None:
            self._expected, _ = self._step(SETTINGS["fused"], 0)
        if setting.is_cached:
            self._precompute()
        answers, _ = self._step(setting, 0)
        row: Row = {"title": setting.title, "answers": answers, "expected": self._expected}
        tolerance = TOLERANCES[self.args.params_dtype]
        for key in COMPARED:
            if not abs(answers[key] - self._expected[key]) <= tolerance * abs(self._expected[key]):
                reason = f"{key} is {answers[key]:.6g}, of the fused head on padded rows {self._expected[key]:.6g}"
                return row | {"status": "wrong", "reason": reason}
        _reset_peak()
        self._head.activity.read()
        wall_s = [self._step(setting, turn)[1] for turn in range(1, repeats + 1)]
        active, _, _, passes = self._head.activity.read()
        row["active_fraction"] = round(active / passes, 4) if passes else None
        sides = [len(ids) for pair in self.data for ids in (pair.chosen_input_ids, pair.rejected_input_ids)]
        rows = sum(len(ids) - num_prompt for pair in self.data for ids, num_prompt in pair.sides)
        shape = {"tokens": sum(sides), "rows": rows, "pairs": len(self.data), "vocab": self.arch.vocab_size}
        flops = self._flops(sum(sides), rows, sum(sides) / len(sides), has_reference=not setting.is_cached)
        return row | {"shape": shape, "wall_s": wall_s, "flops": flops, "peak_mib": round(_peak_mib(), 1)}

    @property
    def _head(self) -> Any:
        """The policy's head; its reference has one of its own."""
        return self.trainer.model[0].output_layer

    def _flops(self, num_tokens: int, num_rows: int, length: float, *, has_reference: bool) -> float:
        """Operations of a step that computes every sequence alone: forward and twice that backward."""
        passes = 4 if has_reference else 3
        layers = self.arch.num_layers * layer_flops(self.arch, length)
        return passes * (num_tokens * layers + num_rows * head_flops(self.arch))

    def _step(self, setting: Setting, turn: int) -> tuple[dict[str, float], float]:
        """One optimizer step on the same pairs: what it answers, and its seconds."""
        trainer, unpacked = self.trainer, {"packing": False, "prefix_sharing": False, "pack_length": None}
        kind = {"packing": True, "prefix_sharing": setting.prefix_sharing} if setting.packing else unpacked
        self._head.options = replace(self._head.options, backward=setting.backward)
        feed = PairFeed(replace(self.args, **kind), trainer.train_config, self.data, None, None, None)
        batches = feed.train_batches(turn)
        _synchronize()
        start = time.perf_counter()
        with naive_head() if setting.is_naive else nullcontext():
            result = trainer.engine.run_step(trainer.models_wrapped, batches)
        _synchronize()
        wall_s = time.perf_counter() - start
        weight = sum(float(each.metrics["loss"][1]) for each in result.results)
        answers = {key: sum(float(each.metrics[key][0]) for each in result.results) / weight for key in COMPARED[:-1]}
        assert result.grad_norm is not None
        return answers | {"grad_norm": result.grad_norm}, round(wall_s, 4)

    def _precompute(self) -> None:
        """Put the reference's scores in the place of its weights."""
        trainer = self.trainer
        assert trainer.engine.reference is not None
        if trainer.engine.reference.models is None:
            return
        cache = score_reference(trainer.engine.reference.models, [self.data], self._cache, self.args, identity={})
        assert isinstance(cache, ReferenceCache)
        datasets = {"training pairs": self.data}
        trainer.engine.reference = build_reference(trainer.model, cache, trainer.train_config, self.args, datasets)


@torch.no_grad()
def sharpen(model: Any) -> None:
    """Let the head of random weights prefer low ids, as a trained one does.

    The first channel of the embedding outweighs everything that the layers add to it, so that after the last norm it is
    sqrt(H) at every token, and the head's first channel decides. Its logits are those of `workloads.popularity`, with
    what drawn activations have in peaks, 1 - `BULK` of the mass, at id 0: `expected_active` is then their rule, too.
    """
    embedding_VH, head_VH = model.embedding.word_embeddings.weight, model.output_layer.weight
    width = head_VH.shape[1] ** 0.5
    embedding_VH[:, 0] = LEVEL * width
    logits_V = popularity(head_VH.shape[0], head_VH.device)
    logits_V[0] = logits_V[1:].logsumexp(dim=0) + math.log((1 - BULK) / BULK)
    head_VH[:, 0] = logits_V / width


@contextmanager
def naive_head() -> Iterator[None]:
    """Let the head hold the logits of every position, as a trainer without a fused head does."""

    def naive_logps(hidden: Tensor, weight: Tensor, labels: Tensor, *, rows: Tensor, cu_rows: Tensor, **_: Any):
        rows, bounds = rows.to(hidden.device), cu_rows.to(hidden.device)
        logps_TV = torch.log_softmax(hidden @ weight.t(), dim=1)
        logps_R = logps_TV.gather(1, labels.clamp(min=0)[:, None]).squeeze(1)[rows].float()
        counts_S = bounds.diff()
        sequences_S = torch.arange(len(counts_S), dtype=torch.int64, device=rows.device)
        sequences_R = torch.repeat_interleave(sequences_S, counts_S)
        logps_S = logps_R.new_zeros(len(counts_S)).index_add(0, sequences_R, logps_R)
        return SequenceLogps(logps=logps_S, counts=counts_S, rows=rows, cu_rows=cu_rows)

    with mock.patch.object(head, "linear_logps", naive_logps):
        yield


def random_pairs(sizes: Sizes) -> list[TokenizedPair]:
    """Pairs of tokens drawn by their popularity, with the shares of response of real ones, `num_pairs` of them."""
    generator = torch.Generator().manual_seed(0)
    weights_V = popularity(sizes.model["vocab_size"]).softmax(dim=0)
    weights_V[0] = 0.0
    shares, pairs = real_shares(), []
    for pair_id in range(sizes.num_pairs):
        chosen_share, rejected_share = shares[pair_id * len(shares) // sizes.num_pairs]
        total = sizes.length // 2 + (sizes.length // 2 * pair_id) // sizes.num_pairs
        # The longer side has the length; the prompt is what its share leaves.
        share = max(chosen_share, rejected_share)
        prompt = max(round(total * (1 - share)), 2)
        answers = [max(round(prompt * side / (1 - side)), 1) for side in (chosen_share, rejected_share)]
        ids = torch.multinomial(weights_V, prompt + sum(answers), replacement=True, generator=generator).tolist()
        pairs.append(pair_of(pair_id, ids[:prompt], ids[prompt : prompt + answers[0]], ids[prompt + answers[0] :]))
    return pairs


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM


def _peak_mib() -> float:
    """Highest memory of everything, weights and optimizer included."""
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else status_mib("VmHWM")
