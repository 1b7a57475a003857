"""How an optimizer step grows with vocabulary, row length and ranks, beside what a count of operations predicts.

A small Llama on random pairs, ORPO (one model, no reference), fp32, exact gradients of the head, one thread per rank.
The count: layers 2 operations per weight and token forward and 4 backward, the head 8 per weight and scored token (its
logits are made twice), attention by the causal half of the scores.
"""

from __future__ import annotations

import tempfile
import time
from statistics import median
from typing import Any

import torch

from bench.measure import Row, status_mib
from checks.tiny import pair_of
from fastpref.data import TokenizedPair
from fastpref.run.architecture.architecture import Architecture
from fastpref.run.plan.pipeline import head_flops, layer_flops
from fastpref.testing.workers import RankPool
from fastpref.trainer import DPOConfig, DPOTrainer, TrainingArguments, build_models, initialize_megatron
from fastpref.trainer.ranks import platform

VOCAB_SIZES = (16_384, 65_536, 262_144)
LENGTHS = (256, 512, 1024, 2048)
BASE_VOCAB, BASE_LENGTH = 65_536, 512
LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "TP2": {"tensor_model_parallel_size": 2},
    "PP2": {"pipeline_model_parallel_size": 2},
    "CP2": {"context_parallel_size": 2},
    "DP2, sharded optimizer": {"use_distributed_optimizer": True},
}
NUM_PAIRS = 4


def model_config(vocab_size: int, length: int) -> dict[str, Any]:
    """A Llama of 4 layers and 3 M parameters beside its embedding and head."""
    return {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": length,
    }


def predicted(vocab_size: int, length: int) -> float:
    """Operations of a step: sequences of `length` positions, half of them scored."""
    arch = Architecture.from_hf(model_config(vocab_size, length))
    num_tokens = 2 * NUM_PAIRS * length
    return num_tokens * (3 * arch.num_layers * layer_flops(arch, length) + 4 * head_flops(arch) / 2)


def take_steps(vocab_size: int, length: int, repeats: int, layout: str = "one rank") -> Row:
    """Median time of a step after one that warms up, and the process's memory; on every rank of a layout."""
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            gradient_accumulation_steps=NUM_PAIRS // 2 if layout.startswith("DP") else NUM_PAIRS,
            head_backward="exact",
            report_to=(),
            disable_progress=True,
            **LAYOUTS[layout],
        )
        initialize_megatron(args)
        try:
            models = build_models(model_config(vocab_size, length), seed=0)
            pairs = _pairs(vocab_size, length)
            trainer = DPOTrainer(models, DPOConfig(pref_loss="orpo"), None, args, train_dataset=pairs)
            taken: dict[str, list[float]] = {"wall_s": [], "cpu_s": []}
            for turn in range(repeats + 1):
                wall, cpu = time.perf_counter(), time.process_time()
                trainer.engine.run_step(trainer.models_wrapped, trainer.feed.train_batches(0))
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                if turn:
                    taken["wall_s"].append(round(wall, 4))
                    taken["cpu_s"].append(round(cpu, 4))
            parameters = sum(parameter.numel() for model in trainer.model for parameter in model.parameters())
            return taken | {"peak_mib": round(status_mib("VmHWM"), 1), "parameters": parameters}
        finally:
            platform.destroy()


def take_steps_on_ranks(repeats: int) -> Row:
    """The base case in every layout of two ranks, two processes beside each other."""
    with RankPool(2, timeout_s=600.0) as pool:
        return {
            layout: pool.run(take_steps, BASE_VOCAB, BASE_LENGTH, repeats, layout)
            for layout in LAYOUTS
            if layout != "one rank"
        }


def _pairs(vocab_size: int, length: int) -> list[TokenizedPair]:
    generator = torch.Generator().manual_seed(0)
    half = length // 2
    pairs = []
    for pair_id in range(NUM_PAIRS):
        prompt, *answers = torch.randint(vocab_size, (3, half + 1), generator=generator, dtype=torch.int64).tolist()
        pairs.append(pair_of(pair_id, prompt[:half], *answers))
    return pairs


def table(row: Row) -> str:
    """Markdown of a measured row."""
    base = _seconds(row["length"][str(BASE_LENGTH)])
    count = predicted(BASE_VOCAB, BASE_LENGTH)
    lines = ["| vocabulary | positions of a row | s a step | times the base | counted | peak memory, MiB |"]
    lines.append("|---:|---:|---:|---:|---:|---:|")
    points = [(int(size), BASE_LENGTH, taken) for size, taken in row["vocab"].items()]
    points += [(BASE_VOCAB, int(length), taken) for length, taken in row["length"].items()]
    for vocab_size, length, taken in points:
        ratio, expected = _seconds(taken) / base, predicted(vocab_size, length) / count
        lines.append(
            f"| {vocab_size:,} | {length:,} | {_seconds(taken):.2f} | {ratio:.2f} | {expected:.2f} | "
            f"{taken['peak_mib']:,.0f} |"
        )
    lines += ["", "| layout | s a step | times one rank | parameters of a rank, M |", "|---|---:|---:|---:|"]
    for layout, ranks in {"one rank": [row["length"][str(BASE_LENGTH)]], **row["ranks"]}.items():
        seconds = max(map(_seconds, ranks))
        most = max(rank["parameters"] for rank in ranks) / 1e6
        lines.append(f"| {layout} | {seconds:.2f} | {seconds / base:.2f} | {most:.1f} |")
    return "\n".join(lines)


def _seconds(taken: Row) -> float:
    return median(taken["wall_s"])
