"""Time of trainer steps on padded, packed, and packed and shared rows: DPO with an online reference, AdamW included.

One model serves all three, and its weights never move (learning rate 0; the update runs all the same), so that every
pass of every kind of row computes one and the same step; what they answer is compared before anything is timed.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from bench.measure import Row

if TYPE_CHECKING:
    from fastpref.trainer import DPOTrainer, TrainingArguments
    from fastpref.trainer.step.feed import PairFeed

KINDS: dict[str, dict[str, bool]] = {
    "padded": {},
    "packed": {"packing": True},
    "packed, prompt shared": {"packing": True, "prefix_sharing": True},
}
SHARING_TARGET = 1.25
TOLERANCE = 1e-4
"""Of log-probs and gradient norm, relative: fp32 sums over thousands of terms in another order."""
COMPARED = ("loss", "logps/chosen", "logps/rejected", "grad_norm")


def measure(model: str, data: str, num_pairs: int, microbatch_pairs: int, pack_length: int, passes: int) -> Row:
    """Check that the three kinds of rows give the same steps, then time them by turns.

    Args:
        model: a Hugging Face model directory.
        data: a file of preference pairs.
        num_pairs: pairs of an optimizer step.
        microbatch_pairs: pairs of a padded microbatch.
        pack_length: most positions of a packed row.
        passes: steps of each kind, on other pairs each time, after one that warms up and is compared.

    Raises:
        RuntimeError: two kinds of rows do not give the same step.
    """
    with tempfile.TemporaryDirectory() as directory:
        trainer, feeds, lengths = _build(model, data, num_pairs, microbatch_pairs, pack_length, Path(directory))
        load_before = os.getloadavg()[0]
        answers, shapes, times = {}, {}, {}
        for kind, feed in feeds.items():
            shapes[kind] = _shape(feed, passes + 1)
            times[kind] = {"wall_s": [], "cpu_s": [], "head_s": [], "reference_s": []}
            answers[kind] = _step(trainer, feed, 0, {})
        _gate(answers)
        for turn in range(1, passes + 1):
            for kind, feed in feeds.items():
                _step(trainer, feed, turn, times[kind])
    return {
        "lengths": lengths,
        "settings": {"pairs": num_pairs, "microbatch_pairs": microbatch_pairs, "pack_length": pack_length},
        "answers": answers,
        "shapes": shapes,
        "times": times,
        "threads": torch.get_num_threads(),
        "load_average": [round(load, 1) for load in (load_before, os.getloadavg()[0])],
    }


def _build(
    model: str, data: str, num_pairs: int, microbatch_pairs: int, pack_length: int, directory: Path
) -> tuple[DPOTrainer, dict[str, PairFeed], dict[str, float]]:
    """One trainer, and a feed of each kind of rows for it."""
    from fastpref.data import DataConfig, load_dataset, load_tokenizer
    from fastpref.trainer import DPOConfig, DPOTrainer, TrainingArguments, initialize_megatron, load_models
    from fastpref.trainer.step.feed import PairFeed

    args = TrainingArguments(
        output_dir=str(directory),
        per_device_train_batch_size=microbatch_pairs,
        gradient_accumulation_steps=num_pairs // microbatch_pairs,
        learning_rate=0.0,
        packing=True,
        prefix_sharing=True,
        pack_length=pack_length,
        report_to=(),
        disable_progress=True,
    )
    tokenizer, loss = load_tokenizer(model), DPOConfig()
    dataset = load_dataset(data, tokenizer, DataConfig(max_length=pack_length // 2))
    initialize_megatron(args)
    trainer = DPOTrainer(load_models(model), loss, None, args, train_dataset=dataset, processing_class=tokenizer)

    def feed(settings: dict[str, bool]) -> PairFeed:
        unpacked: dict[str, Any] = {"packing": False, "prefix_sharing": False, "pack_length": None}
        length = {"pack_length": pack_length} if settings else {}
        kind: TrainingArguments = replace(args, **(unpacked | settings | length))
        return PairFeed(kind, loss, dataset, None, None, tokenizer)

    means = {part: getattr(dataset.report, f"{part}_tokens").mean for part in ("prompt", "chosen", "rejected")}
    return trainer, {kind: feed(settings) for kind, settings in KINDS.items()}, means


def _shape(feed: PairFeed, steps: int) -> dict[str, float]:
    """What the timed steps compute, per step and per pair."""
    batches = [batch for step in range(1, steps) for batch in feed.train_batches(step)]
    computed = sum(batch.input_ids_NL.numel() for batch in batches)
    used = sum(int((~batch.uncounted_NL).sum()) for batch in batches)
    pairs = sum(int((batch.weights_B != 0).sum()) for batch in batches)
    return {
        "microbatches": len(batches) / (steps - 1),
        "positions_per_pair": computed / pairs,
        "padding_fraction": 1.0 - used / computed,
        "response_rows_per_pair": sum(float(batch.counts_S.sum()) for batch in batches) / pairs,
        "pairs": pairs / (steps - 1),
    }


def _step(trainer: DPOTrainer, feed: PairFeed, step: int, times: dict[str, list[float]]) -> dict[str, float]:
    """One optimizer step; its seconds are appended to `times`."""
    batches = feed.train_batches(step)
    wall, cpu = time.perf_counter(), time.process_time()
    result = trainer.engine.run_step(trainer.models_wrapped, batches)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    assert trainer.engine.reference is not None
    seen = {"wall_s": wall, "cpu_s": cpu, "head_s": trainer.model[0].output_layer.timer.read()}
    seen["reference_s"] = trainer.engine.reference.timer.read()
    for name in times:
        times[name].append(round(seen[name], 4))
    totals = {name: sum(float(each.metrics[name][0]) for each in result.results) for name in COMPARED[:-1]}
    weight = sum(float(each.metrics["loss"][1]) for each in result.results)
    assert result.grad_norm is not None
    return {**{name: total / weight for name, total in totals.items()}, "grad_norm": result.grad_norm}


def _gate(answers: dict[str, dict[str, float]]) -> None:
    expected = answers["padded"]
    for kind, found in answers.items():
        for name in COMPARED:
            if abs(found[name] - expected[name]) > TOLERANCE * abs(expected[name]):
                raise RuntimeError(
                    f"{name} of the step on {kind} rows is {found[name]}, on padded ones {expected[name]}"
                )


def table(row: Row) -> str:
    """Markdown: one line for each kind of rows, then the target."""
    lengths, settings = row["lengths"], row["settings"]
    lines = [
        f"Pairs of {lengths['prompt']:.0f} prompt, {lengths['chosen']:.0f} chosen and {lengths['rejected']:.0f} "
        f"rejected tokens on average; steps of {settings['pairs']} pairs, padded microbatches of "
        f"{settings['microbatch_pairs']}, packed rows of at most {settings['pack_length']} positions; "
        f"{row['threads']} threads, load {max(row['load_average'])}.",
        "",
        "| rows | microbatches per step | positions per pair | padding | s per pair | CPU s per pair | head | "
        "times padded | times packed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    cpu = {kind: median(row["times"][kind]["cpu_s"]) / row["shapes"][kind]["pairs"] for kind in KINDS}
    for kind in KINDS:
        shape, times = row["shapes"][kind], row["times"][kind]
        cells = [
            kind,
            f"{shape['microbatches']:.1f}",
            f"{shape['positions_per_pair']:.0f}",
            f"{100 * shape['padding_fraction']:.1f} %",
            f"{median(times['wall_s']) / shape['pairs']:.2f}",
            f"{cpu[kind]:.2f}",
            f"{_head_share(row, kind):.0%}",
            f"{cpu['padded'] / cpu[kind]:.2f}",
            f"{cpu['packed'] / cpu[kind]:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _sharing(row, cpu["packed"] / cpu["packed, prompt shared"])]) + "\n"


def _sharing(row: Row, ratio: float) -> str:
    """What sharing gained over packing alone, and what it could gain: the head works on answer tokens alone."""
    packed, shared = (row["shapes"][kind]["positions_per_pair"] for kind in ("packed", "packed, prompt shared"))
    head = _head_share(row, "packed")
    verdict = f">= {SHARING_TARGET}" if ratio >= SHARING_TARGET else f"< {SHARING_TARGET}"
    return (
        f"Sharing takes {ratio:.2f} times the CPU time off ({verdict}). It computes {packed / shared:.2f} times fewer "
        f"positions; the head, {head:.0%} of a packed step, has as many rows as before: "
        f"{1.0 / (head + (1.0 - head) * shared / packed):.2f} is what that leaves."
    )


def _head_share(row: Row, kind: str) -> float:
    """Wall time of the policy's head over that of the step."""
    times = row["times"][kind]
    return median(head / wall for head, wall in zip(times["head_s"], times["wall_s"], strict=True))
