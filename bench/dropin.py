"""TRL's `DPOTrainer` and the drop-in on one batch of real pairs: the same metrics, then time and memory.

A pass is what a training step computes without its optimizer: the reference, the policy, the loss, its gradients and
the metrics. Both trainers take passes by turns, so that both see the same machine; nothing is timed before every
metric that TRL logs agrees. The memory of each is that of a process of its own.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.measure import Row, status_mib
from bench.workloads import MODELS, ROOT

PAIRS = ROOT / "examples" / "data_real" / "pairs.jsonl"
KINDS = ("trl", "fastpref")
BETA = 0.1
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
"""Of each metric, relative. TRL rounds every logit to bf16, the op adds up in fp32. Rewards may also differ by
beta times `BITS`."""
BITS = {"rewards/chosen": 2, "rewards/rejected": 2, "rewards/margins": 4}
"""One bit for each log-prob that a metric is a difference of."""
POLICY_SCALE = 0.5
"""Factor on the final norm of the policy, which is then flatter than its reference: rewards far from 0."""


def build_trainer(kind: str, model: str, num_pairs: int, max_length: int, precision: str, folder: str) -> Any:
    """A trainer of one of `KINDS`, policy and reference in memory.

    Args:
        kind: whose class.
        model: a name of `workloads.MODELS`, or "dry" for random weights of a tiny model.
        num_pairs: pairs of the batch.
        max_length: tokens of prompt and completion together; longer pairs lose their end.
        precision: fp32, or bf16 for autocast over fp32 weights.
        folder: what TRL may write to.
    """
    import trl
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

    from fastpref.integrations.trl import DPOTrainer

    path = ROOT / "examples" / "tokenizer" if model == "dry" else ROOT / "runs" / "models" / MODELS[model]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    models = [_load(path, len(tokenizer), model == "dry") for _ in ("policy", "reference")]
    with torch.no_grad():
        models[0].base_model.norm.weight.mul_(POLICY_SCALE)
    args = trl.DPOConfig(
        folder,
        beta=BETA,
        per_device_train_batch_size=num_pairs,
        max_length=max_length,
        train_sampling_strategy="sequential",
        bf16=precision == "bf16",
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    records = [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()[:num_pairs]]
    trainer_class = DPOTrainer if kind == "fastpref" else trl.DPOTrainer
    trainer = trainer_class(*models, args=args, train_dataset=Dataset.from_list(records), processing_class=tokenizer)
    trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model)
    return trainer


def _load(path: Path, vocab_size: int, is_dry: bool) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    if not is_dry:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    from checks.tiny import TINY_LLAMA

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY_LLAMA | {"vocab_size": vocab_size}))


def take_pass(trainer: Any) -> tuple[float, float, dict[str, float]]:
    """Wall and CPU seconds of one pass, and the metrics that it logs."""
    [inputs] = trainer.get_train_dataloader()
    inputs = trainer._prepare_inputs(inputs)
    trainer.model.train()
    trainer.model.zero_grad()
    wall, cpu = time.perf_counter(), time.process_time()
    loss = trainer.compute_loss(trainer.model_wrapped, inputs)
    loss.backward()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    norms = [weight.grad.norm() for weight in trainer.model.parameters()]
    trainer.log({"loss": loss.item(), "grad_norm": torch.stack(norms).norm().item()})
    return wall, cpu, trainer.state.log_history[-1]


def time_dropin(model: str, num_pairs: int, max_length: int, precision: str, repeats: int) -> Row:
    """Compare the metrics of one pass of each trainer, then time passes by turns.

    Raises:
        RuntimeError: a metric is missing, or differs by more than `TOLERANCE`.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainers = {kind: build_trainer(kind, model, num_pairs, max_length, precision, folder) for kind in KINDS}
        metrics = {kind: take_pass(trainer)[2] for kind, trainer in trainers.items()}
        differences = _compare(metrics, precision)
        times: dict[str, dict[str, list[float]]] = {kind: {"wall_s": [], "cpu_s": []} for kind in KINDS}
        for _ in range(repeats):
            for kind, trainer in trainers.items():
                wall, cpu, _ = take_pass(trainer)
                times[kind]["wall_s"].append(round(wall, 4))
                times[kind]["cpu_s"].append(round(cpu, 4))
        [inputs] = trainers["trl"].get_train_dataloader()
    shape = {"positions": inputs["input_ids"].numel(), "response_rows": int(inputs["completion_mask"].sum())}
    setting = {"pairs": num_pairs, "precision": precision, "threads": torch.get_num_threads()}
    return {"shape": shape | setting, "metrics": metrics, "differences": differences, "times": times}


def memory_of_dropin(kind: str, model: str, num_pairs: int, max_length: int, precision: str) -> Row:
    """Peak memory of a process that takes two passes, and what was resident before them."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(kind, model, num_pairs, max_length, precision, folder)
        before_mib = status_mib("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak of the passes, not of loading
        take_pass(trainer)
        take_pass(trainer)
        return {"before_mib": round(before_mib, 1), "peak_mib": round(status_mib("VmHWM"), 1)}


def _compare(metrics: dict[str, dict[str, float]], precision: str) -> dict[str, float]:
    theirs, ours = (metrics[kind] for kind in KINDS)
    if theirs.keys() != ours.keys():
        raise RuntimeError(f"metrics logged by one trainer alone: {sorted(theirs.keys() ^ ours.keys())}")
    tolerance, epsilon = TOLERANCE[precision], torch.finfo(DTYPES[precision]).eps
    one_bit = BETA * epsilon * max(abs(theirs["logps/chosen"]), abs(theirs["logps/rejected"]))
    differences = {}
    for name, value in theirs.items():
        largest, apart = max(abs(value), abs(ours[name])), abs(value - ours[name])
        differences[name] = apart / largest if largest else 0.0
        if not (differences[name] <= tolerance or apart <= BITS.get(name, 0) * one_bit):
            raise RuntimeError(f"{name} is {value} in TRL and {ours[name]} in fastpref, further than {tolerance} apart")
    return differences


def table(row: Row) -> str:
    """Markdown: a line per trainer."""
    lines = ["| trainer | s a pass | CPU s a pass | peak MiB above the models |", "|---|---:|---:|---:|"]
    for kind in KINDS:
        (wall, cpu), memory = map(median, row["times"][kind].values()), row["memory"][kind]
        lines.append(f"| {kind} | {wall:.2f} | {cpu:.2f} | {memory['peak_mib'] - memory['before_mib']:.0f} |")
    worst = max(row["differences"], key=row["differences"].get)
    lines += ["", f"Largest relative difference of a metric: {row['differences'][worst]:.1e} (`{worst}`)."]
    return "\n".join(lines) + "\n"
