"""What a checkpoint costs: seconds of a save that training waits for and of one beside it, memory of import and export.

One rank, fp32 weights, AdamW's moments in place. The files are in the page cache when they are hashed, verified and
read again, as they are on a machine that has just written them.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from bench.measure import Row, return_memory, status_mib
from checks.tiny import tiny_pairs

if TYPE_CHECKING:
    from fastpref.trainer import DPOTrainer

STEPS = 1000
"""Of the run that is saved; it never gets there."""
Times = dict[str, list[float]]


def measure_saves(model: str, scratch: str, repeats: int) -> Row:
    """Save, verify and load by turns; every save is removed before the next.

    Args:
        model: a Hugging Face model directory.
        scratch: a new directory for the checkpoints.
        repeats: of each, after one that warms up.
    """
    from fastpref.trainer.ranks import platform
    from fastpref.trainer.saves import state

    trainer = _trainer(model, scratch)
    try:
        step = _step_taker(trainer)
        step()  # after which there are moments
        times: dict[str, Times] = {"sync": {}, "async": {}, "read": {}}
        steps: Times = {"alone": [], "beside": []}
        load_before = os.getloadavg()[0]
        for turn in range(repeats + 1):
            seconds = {"sync": _save(trainer, 2 * turn + 1)}
            seconds["async"], beside = _save_beside(trainer, 2 * turn + 2, step)
            path = Path(scratch) / "checkpoints" / f"step-{2 * turn + 2}"
            size = sum(file.stat().st_size for file in path.iterdir())
            models, optimizer, scheduler = trainer.models_wrapped, trainer.optimizer, trainer.lr_scheduler
            seconds["read"] = {
                "verify_s": _seconds(lambda: state.verify(path)),  # noqa: B023  (called at once)
                "load_s": _seconds(lambda: state.load(path, models, optimizer, scheduler, _fingerprint(path))),  # noqa: B023
            }
            shutil.rmtree(path.parent)
            alone = step()
            if turn:
                steps["alone"].append(alone)
                steps["beside"] += beside
                for kind, taken in seconds.items():
                    for name, value in taken.items():
                        times[kind].setdefault(name, []).append(round(value, 4))
    finally:
        platform.destroy()
    return {
        "parameters": sum(parameter.numel() for parameter in trainer.model[0].parameters()),
        "bytes": size,
        **times,
        "steps": {kind: [round(value, 4) for value in taken] for kind, taken in steps.items()},
        "threads": torch.get_num_threads(),
        "load_average": [round(load, 1) for load in (load_before, os.getloadavg()[0])],
    }


def measure_import(model: str) -> Row:
    """Highest resident memory of `load_models` above what was there before, the model's own included."""
    from fastpref.trainer import TrainingArguments, initialize_megatron, load_models
    from fastpref.trainer.ranks import platform

    initialize_megatron(TrainingArguments())
    try:
        models: list[Any] = []
        peaks = _peaks(lambda: models.extend(load_models(model)))
        size = sum(parameter.numel() * parameter.element_size() for parameter in models[0].parameters()) / 2**20
        files = sum(file.stat().st_size for file in Path(model).glob("*.safetensors")) / 2**20
    finally:
        platform.destroy()
    return {"model_mib": size, "files_mib": files, **peaks}


def measure_export(model: str, scratch: str, shard_mib: int) -> Row:
    """Highest resident memory of `save_hf` above that of the model."""
    from fastpref.trainer import TrainingArguments, initialize_megatron, load_models, save_hf
    from fastpref.trainer.ranks import platform

    initialize_megatron(TrainingArguments())
    try:
        models = load_models(model)
        largest = max(parameter.numel() * parameter.element_size() for parameter in models[0].parameters()) / 2**20
        out = Path(scratch) / "export"
        peaks = _peaks(lambda: save_hf(models, out, model, max_shard_bytes=shard_mib << 20))
        shards = [round(file.stat().st_size / 2**20, 1) for file in sorted(out.glob("*.safetensors"))]
        shutil.rmtree(out)
    finally:
        platform.destroy()
    return {"shards_mib": shards, "largest_parameter_mib": largest, **peaks}


def _trainer(model: str, scratch: str) -> DPOTrainer:
    from fastpref.trainer import DPOConfig, DPOTrainer, TrainingArguments, initialize_megatron, load_models

    args = TrainingArguments(output_dir=scratch, max_steps=STEPS, learning_rate=1e-6, report_to=())
    initialize_megatron(args)
    # a loss without a reference, so that all memory and time are the policy's
    return DPOTrainer(load_models(model), DPOConfig(pref_loss="orpo"), None, args, train_dataset=tiny_pairs(8, 0, 32))


def _step_taker(trainer: DPOTrainer) -> Callable[[], float]:
    batches = trainer.feed.train_batches(0)
    return lambda: _seconds(lambda: trainer.engine.run_step(trainer.models_wrapped, batches))


def _save(trainer: DPOTrainer, step: int) -> dict[str, float]:
    """A save that is waited for; its parts, and talk between ranks, add up to the whole."""
    with _timeline() as spans:
        started = time.perf_counter()
        trainer.save_checkpoint(step)
        total = time.perf_counter() - started
    return {**_parts(started, spans), "total_s": total}


def _save_beside(
    trainer: DPOTrainer, step: int, take_step: Callable[[], float]
) -> tuple[dict[str, float], list[float]]:
    """A save beside steps: seconds in which none can be taken, and those that were."""
    from fastpref.trainer.session import Session

    beside: list[float] = []
    with _timeline() as spans:
        started = time.perf_counter()
        save = Session(trainer.engine).begin_save(step, copies=True)
        begin = time.perf_counter() - started
        while save.is_running:
            beside.append(take_step())
        asked = time.perf_counter()
        save.finish()
        ended = time.perf_counter()
    parts = _parts(started, spans)
    blocked = {name: parts[name] for name in ("list_s", "copy_s")} | {"finish_s": ended - asked}
    return {**blocked, "blocked_s": begin + ended - asked, "total_s": ended - started}, beside


@contextmanager
def _timeline() -> Iterator[dict[str, list[tuple[float, float]]]]:
    """While entered, notes when the parts of a save begin and end, in whatever thread."""
    from fastpref.trainer.saves import save, shards

    places = {
        "copy": (shards.Shards, "to_host"),
        "plan": (shards.Shards, "plan"),
        "write": (shards.Shards, "write"),
        "hash": (save, "_recorded"),
        "publish": (save.Save, "_publish"),
    }
    spans: dict[str, list[tuple[float, float]]] = {part: [] for part in places}
    originals = {part: getattr(owner, name) for part, (owner, name) in places.items()}

    def noted(part: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            try:
                return originals[part](*arguments, **options)
            finally:
                spans[part].append((begin, time.perf_counter()))

        return call

    for part, (owner, name) in places.items():
        setattr(owner, name, noted(part))
    try:
        yield spans
    finally:
        for part, (owner, name) in places.items():
            setattr(owner, name, originals[part])


def _parts(started: float, spans: dict[str, list[tuple[float, float]]]) -> dict[str, float]:
    """Seconds until what is to be copied is listed, of copy and plan, of the last byte and hash, of publication."""
    (copy,), (plan,), (publish,) = spans["copy"], spans["plan"], spans["publish"]
    written = max(end for _, end in spans["write"])
    hashed = max(end for _, end in spans["hash"] if end < publish[0])
    return {
        "list_s": copy[0] - started,
        "copy_s": copy[1] - copy[0],
        "plan_s": plan[1] - plan[0],
        "write_s": written - plan[1],
        "hash_s": hashed - written,
        "publish_s": publish[1] - publish[0],
    }


def _fingerprint(path: Path) -> dict[str, Any]:
    from fastpref.checkpoint.directory import read_state

    return read_state(path)["fingerprint"]


def _seconds(action: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def _peaks(action: Callable[[], Any]) -> dict[str, float]:
    """Seconds, and MiB by which resident memory rose at most, with and (as far as seen) without pages of files."""
    done, seen = threading.Event(), [0.0]

    def look() -> None:
        while not done.wait(0.002):
            seen[0] = max(seen[0], status_mib("RssAnon"))

    return_memory()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before, before_own = status_mib("VmRSS"), status_mib("RssAnon")
    looking = threading.Thread(target=look)
    looking.start()
    seconds = _seconds(action)
    done.set()
    looking.join()
    peak = status_mib("VmHWM") - before
    return {"seconds": round(seconds, 3), "peak_mib": round(peak, 1), "own_peak_mib": round(seen[0] - before_own, 1)}


def _shortest(taken: Times, by: str) -> dict[str, float]:
    """The save that took least, in seconds of `by`."""
    index = min(range(len(taken[by])), key=taken[by].__getitem__)
    return {name: seconds[index] for name, seconds in taken.items()}


def table(row: Row) -> str:
    """Markdown: seconds of a save, then of reading it, then memory of import and export.

    Other work on a machine only adds to a time, so the shortest says most.
    """
    wait, beside = _shortest(row["sync"], "total_s"), _shortest(row["async"], "blocked_s")
    read = {name: min(taken) for name, taken in row["read"].items()}
    alone, slowed = (median(taken) if taken else 0.0 for taken in row["steps"].values())
    repeats = len(row["sync"]["total_s"])
    names = ("list_s", "copy_s", "plan_s", "write_s", "hash_s", "publish_s", "total_s")
    share = beside["blocked_s"] / wait["total_s"]
    into, out = row["import"], row["export"]
    return "\n".join(
        [
            f"{row['parameters'] / 1e6:.0f} M parameters, {row['bytes'] / 1e9:.2f} GB a checkpoint; "
            f"{row['threads']} threads, load {max(row['load_average'])}; the shortest of {repeats} each.",
            "",
            "| save | list, s | copy, s | plan, s | write, s | hash, s | publish, s | training waits, s |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
            f"| waited for | {' | '.join(f'{wait[name]:.2f}' for name in names)} |",
            f"| beside training | {beside['list_s']:.2f} | {beside['copy_s']:.2f} |{' beside |' * 4} "
            f"{beside['blocked_s']:.2f} ({share:.0%}) |",
            "",
            f"Beside training it takes {beside['total_s']:.2f} s, in which a step takes {slowed:.2f} s instead of "
            f"{alone:.2f} s (medians). Verifying takes {read['verify_s']:.2f} s, loading {read['load_s']:.2f} s.",
            "",
            f"Import of {into['files_mib']:.0f} MiB of safetensors into a model of {into['model_mib']:.0f} MiB: "
            f"{into['seconds']:.2f} s, {into['peak_mib']:.0f} MiB at most, {into['own_peak_mib']:.0f} without pages of "
            f"the file. Export in {len(out['shards_mib'])} files of at most {max(out['shards_mib']):.0f} MiB: "
            f"{out['seconds']:.2f} s, {out['peak_mib']:.0f} MiB above the model, whose largest parameter has "
            f"{out['largest_parameter_mib']:.0f} MiB.",
        ]
    )
