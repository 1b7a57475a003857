"""What approximate heads do to a whole training run, beside what another order of the pairs does.

Design decisions:
- A run is an ordinary one: a `RunConfig` and `DPOTrainer`, DPO on packed rows with shared prompts and a precomputed
  reference, everything at its default but what `run_config` names.
- All runs start from the same weights, so a seed decides the order of the pairs alone. Runs of one seed see the same
  pairs in the same order; runs of other seeds say how much of a difference is worth nothing.
- A run is stored when it is done; an interrupted one goes on from its last checkpoint.
- Held-out pairs are scored one by one with the exported weights, so that runs are compared pair by pair.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import click
import torch

from bench.commands.shared import command_line, store
from bench.measure import Row, surroundings
from bench.weight_distance import distance
from fastpref.data import DataConfig, PreferenceDataset, load_dataset, load_tokenizer, read_pairs
from fastpref.losses import DPOConfig

if TYPE_CHECKING:
    from fastpref.checkpoint.reference_cache import ReferenceCache
    from fastpref.trainer import RunConfig

HELD_OUT_SHARE = 0.2
PROMPT_SHARE = 0.75
"""Of `Plan.max_length`, the most that a prompt may take: the rest is left for the answers, whose ends are cut off."""
FEWEST_PAIRS = 20
SAVE_STEPS = EVAL_STEPS = 50
CURVES = {
    "loss": "loss",
    "margin": "rewards/margins",
    "accuracy": "rewards/accuracies",
    "grad_norm": "grad_norm",
    "active_fraction": "perf/active_vocab_fraction",
    "fallbacks": "perf/active_vocab_fallbacks",
}
"""What is kept of every step -> its name among the trainer's metrics."""
EVALUATIONS = {"loss": "eval_loss", "margin": "eval_rewards/margins", "accuracy": "eval_rewards/accuracies"}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run."""

    title: str
    seed: int = 0
    head_forward: str = "exact"
    head_backward: str = "exact"
    active_eps: float | None = None
    bf16: bool = False

    @property
    def is_exact(self) -> bool:
        """Whether nothing but the order of the pairs differs from another such run."""
        return (self.head_forward, self.head_backward) == ("exact", "exact") and not self.bf16


BASE = "exact"
"""The run that others of its seed are compared with."""
RUNS = {
    BASE: Run(title="exact"),
    "active-8": Run(title="active, 2^-8", head_backward="active", active_eps=2.0**-8),
    "active-6": Run(title="active, 2^-6", head_backward="active", active_eps=2.0**-6),
    "screened": Run(title="screened, 2^-8", head_forward="screened", head_backward="active", active_eps=2.0**-8),
    "seed-1": Run(title="exact, other order", seed=1),
    "seed-2": Run(title="exact, third order", seed=2),
    "bf16": Run(title="exact, bf16", bf16=True),
}
DEFAULT_RUNS = tuple(name for name, run in RUNS.items() if not run.bf16)
"""In the order in which they begin. The one in bf16 is a second yardstick, on request."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What every run has in common; two runs are compared only where all of it is equal."""

    model: str
    """A Hugging Face model directory."""
    data: str
    """A file of preference pairs."""
    steps: int
    """Optimizer steps of a run."""
    pairs: int
    """Pairs of an optimizer step."""
    max_length: int
    """Longest sequence in tokens."""
    learning_rate: float
    """Peak learning rate, reached after a twentieth of the steps."""

    def sizes(self) -> Row:
        """What must be equal for runs to stand in one table."""
        return asdict(self) | {"model": Path(self.model).name, "data": Path(self.data).name}


def split_pairs(plan: Plan, folder: Path) -> Row:
    """Write `train.jsonl` and `held_out.jsonl`: the pairs that fit, each in one of them, no prompt in both.

    Returns:
        Their numbers and mean lengths in tokens.

    Raises:
        ClickException: too few pairs fit.
    """
    folder.mkdir(parents=True, exist_ok=True)
    every = folder / "every.jsonl"
    names = ("prompt", "chosen", "rejected", "tools")
    records = [{name: getattr(pair, name) for name in names} for pair in read_pairs(plan.data)]
    lines = [json.dumps({name: value for name, value in record.items() if value is not None}) for record in records]
    every.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    tokenised = load_dataset(every, load_tokenizer(plan.model), _data_config(plan, on_bad_pair="drop"))
    longest_prompt = int(PROMPT_SHARE * plan.max_length)
    kept = [pair for pair in tokenised if pair.num_prompt_tokens <= longest_prompt]
    if len(kept) < max(FEWEST_PAIRS, plan.pairs):
        raise click.ClickException(
            f"{plan.data}: {len(kept)} of {len(lines)} pairs have a prompt of at most {longest_prompt} tokens and two "
            f"answers that differ within {plan.max_length} tokens of both; {max(FEWEST_PAIRS, plan.pairs)} are needed: "
            "choose another file or raise --max-length"
        )
    random.Random(0).shuffle(kept)
    num_held_out = round(HELD_OUT_SHARE * len(kept))
    seen = {tuple(pair.chosen_input_ids[: pair.num_prompt_tokens]) for pair in kept[:num_held_out]}
    rest = [pair for pair in kept[num_held_out:] if tuple(pair.chosen_input_ids[: pair.num_prompt_tokens]) not in seen]
    for file, part in (("held_out", kept[:num_held_out]), ("train", rest)):
        text = "".join(f"{lines[int(pair.source.rsplit(':', 1)[1]) - 1]}\n" for pair in part)
        (folder / f"{file}.jsonl").write_text(text, encoding="utf-8")
    answers = [
        len(ids) - pair.num_prompt_tokens for pair in kept for ids in (pair.chosen_input_ids, pair.rejected_input_ids)
    ]
    return {
        "train": len(rest),
        "held_out": num_held_out,
        "prompt_tokens": round(fmean(pair.num_prompt_tokens for pair in kept), 1),
        "answer_tokens": round(fmean(answers), 1),
    }


def _data_config(plan: Plan, **settings: Any) -> DataConfig:
    return DataConfig(max_length=plan.max_length, **settings)


def run_config(plan: Plan, run: Run, work: Path, name: str) -> RunConfig:
    """The `RunConfig` of a run in the folder `work`, which holds the pairs."""
    from fastpref.checkpoint.directory import finished_steps
    from fastpref.trainer import ModelConfig, ReferenceConfig, RunConfig, TrainingArguments

    output = work / name
    training = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=plan.pairs,
        packing=True,
        prefix_sharing=True,
        pack_length=2 * plan.pairs * plan.max_length,  # one row a step
        max_steps=plan.steps,
        learning_rate=plan.learning_rate,
        warmup_ratio=0.05,
        seed=run.seed,
        bf16=run.bf16,
        head_forward=run.head_forward,
        head_backward=run.head_backward,
        active_eps=run.active_eps,
        logging_steps=1,
        eval_steps=EVAL_STEPS,
        save_steps=SAVE_STEPS,
        save_total_limit=2,
        resume_from_checkpoint="latest" if finished_steps(output / "checkpoints") else None,
        report_to=(),
        disable_progress=True,
    )
    cache = f"reference-{'bf16' if run.bf16 else 'fp32'}"
    return RunConfig(
        model=ModelConfig(path=plan.model),
        data=_data_config(plan, train=str(work / "train.jsonl"), eval=str(work / "held_out.jsonl")),
        reference=ReferenceConfig(mode="precomputed", cache=str(work / cache)),
        training=training,
    )


def score_start(plan: dict[str, Any], work: str, is_bf16: bool) -> Row:
    """Score all pairs with the weights that the runs start from, where that is not done yet."""
    from fastpref.trainer.build import precompute_reference
    from fastpref.trainer.ranks import platform

    run = Run(title="", bf16=is_bf16)
    _, is_new = precompute_reference(run_config(Plan(**plan), run, Path(work), f"scoring-{is_bf16}"))
    platform.destroy()
    return {"is_new": is_new}


def train_run(plan: dict[str, Any], work: str, name: str) -> Row:
    """Train one run, or what is left of it, and score the held-out pairs with the weights it ends with.

    Args:
        plan: fields of a `Plan`.
        work: folder with the pairs and the reference's scores; the run gets one of its own in it.
        name: of `RUNS`.

    Returns:
        Curves of the steps, the evaluations, and the reward margin of every held-out pair.

    Raises:
        RuntimeError: a signal stopped it; it goes on from its checkpoint when called again.
    """
    from fastpref.run.record.curves import read_metrics
    from fastpref.trainer import DPOTrainer, export
    from fastpref.trainer.ranks import platform

    shared, folder, run = Plan(**plan), Path(work), RUNS[name]
    weights, unfinished = folder / name / "weights", folder / name / "weights.unfinished"
    if not weights.exists():
        shutil.rmtree(unfinished, ignore_errors=True)
        config = run_config(shared, run, folder, name)
        trainer = DPOTrainer.from_config(config)
        try:
            if trainer.train().was_preempted:
                raise RuntimeError(f"{name} was stopped by a signal; run the same command again to go on")
            export.export_models(trainer.model, config, unfinished)
        finally:
            platform.destroy()
        unfinished.rename(weights)
    shutil.rmtree(folder / name / "checkpoints", ignore_errors=True)
    records = read_metrics(folder / name)
    steps = [record for record in records if "loss" in record]
    evaluations = [record for record in records if "eval_loss" in record]
    curves = {curve: [_short(step[metric]) for step in steps] for curve, metric in CURVES.items() if metric in steps[0]}
    return {
        "curves": curves,
        "evaluations": {
            "step": [record["step"] for record in evaluations],
            **{name: [_short(record[metric]) for record in evaluations] for name, metric in EVALUATIONS.items()},
        },
        "held_out_margins": held_out_margins(shared, run, folder, name),
        "threads": torch.get_num_threads(),
    }


def _short(value: float) -> float:
    return float(f"{value:.7g}")


def held_out_margins(plan: Plan, run: Run, work: Path, name: str) -> list[float]:
    """Reward margin of every held-out pair under the weights that a run ended with, by the op's exact forward pass."""
    from fastpref.checkpoint.reference_cache import ReferenceCache
    from fastpref.trainer import ModelConfig, ReferenceConfig, RunConfig, TrainingArguments
    from fastpref.trainer.build import precompute_reference
    from fastpref.trainer.ranks import platform

    held_out = _data_config(plan, train=str(work / "held_out.jsonl"))
    config = RunConfig(
        model=ModelConfig(path=str(work / name / "weights")),
        data=held_out,
        reference=ReferenceConfig(mode="precomputed", cache=str(work / name / "held-out-scores")),
        training=TrainingArguments(
            output_dir=str(work / name / "scoring"), bf16=run.bf16, report_to=(), disable_progress=True
        ),
    )
    try:
        scores, _ = precompute_reference(config)
    finally:
        platform.destroy()
    dataset = load_dataset(held_out.train_paths, load_tokenizer(plan.model), replace(held_out, train=()))
    start = ReferenceCache(run_config(plan, run, work, name).reference_cache)
    return [_short(margin) for margin in _margins(scores, start, dataset)]


def _margins(policy: ReferenceCache, reference: ReferenceCache, dataset: PreferenceDataset) -> list[float]:
    """The loss's beta * (log-ratio of the chosen answer - that of the rejected one), by pair."""
    ratios_N2 = (policy.read(dataset).double() - reference.read(dataset).double())[:, :2]
    return (DPOConfig().beta * (ratios_N2[:, 0] - ratios_N2[:, 1])).tolist()


def measure_runs(
    plan: Plan, names: Sequence[str], at_once: int, work: Path, file: Path, run: Callable[..., Row]
) -> Row:
    """Train what `file` has not got yet, `at_once` runs at a time, and store each run as it is done.

    Args:
        plan: what is trained.
        names: of `RUNS`, in the order in which they begin.
        at_once: runs side by side.
        work: folder of pairs, scores, checkpoints and final weights.
        file: of the results.
        run: calls a worker of this module, here or in a process of its own.

    Returns:
        The contents of `file`.

    Raises:
        ClickException: the file or the folder holds runs of another plan.
        RuntimeError: a run failed; the others were finished and stored.
    """
    content = _open(file, plan, work)
    store(work / "plan.json", plan.sizes())
    if not content["pairs"]:
        content["pairs"] = split_pairs(plan, work)
    todo = [name for name in names if name not in content["runs"]]
    for is_bf16 in sorted({RUNS[name].bf16 for name in todo}):
        run(score_start, asdict(plan), str(work), is_bf16)
    here, failed = surroundings(), []
    for name, found in _results(todo, at_once, lambda name: run(train_run, asdict(plan), str(work), name)):
        if isinstance(found, BaseException):
            failed.append(f"{name}: {found}")
            continue
        content["runs"][name] = found | here | {"load_average": round(os.getloadavg()[0], 1)}
        add_distances(content, plan, work)
        store(file, content)
        click.echo(f"{name} is done")
    add_distances(content, plan, work)
    store(file, content)
    if failed:
        raise RuntimeError("; ".join(failed))
    return content


def _results(
    names: Sequence[str], at_once: int, train: Callable[[str], Row]
) -> Iterator[tuple[str, Row | BaseException]]:
    """What each run gives, or why it failed, in the order in which they end."""
    if at_once == 1:  # in the thread that signals come to
        yield from ((name, train(name)) for name in names)
        return
    with ThreadPoolExecutor(at_once) as pool:
        futures = {pool.submit(train, name): name for name in names}
        try:
            for future in as_completed(futures):
                yield futures[future], future.exception() or future.result()
        finally:  # after Ctrl-C no other run begins
            pool.shutdown(wait=False, cancel_futures=True)


def _open(file: Path, plan: Plan, work: Path) -> Row:
    """The stored content, or an empty one; both file and folder must be of the same plan."""
    for stored, place in ((file, file), (work / "plan.json", work)):
        if not stored.exists():
            continue
        found = json.loads(stored.read_text(encoding="utf-8"))
        found = found.get("plan", found)
        if found != plan.sizes():
            raise click.ClickException(
                f"{place} holds runs of another plan ({found}, now {plan.sizes()}); remove it to start anew, or name "
                "another place"
            )
    if file.exists():
        content: Row = json.loads(file.read_text(encoding="utf-8"))
        return content
    return {"plan": plan.sizes(), "command": command_line(), "pairs": {}, "runs": {}, "travelled": {}, "apart": {}}


def compared(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Which runs are compared: every other one with `BASE`, and exact ones in fp32 with each other."""
    for first, second in combinations(names, 2):
        if first == BASE or (RUNS[first].is_exact and RUNS[second].is_exact):
            yield first, second


def add_distances(content: Row, plan: Plan, work: Path) -> None:
    """Add to `content` how far runs went and ended apart, where their final weights are there.

    A run in bf16 is left out: what it exports is rounded by more than a run of small steps travels.
    """
    weights = {name: work / name / "weights" for name in RUNS if name in content["runs"] and not RUNS[name].bf16}
    there = {name: folder for name, folder in weights.items() if folder.exists()}
    if not there:
        return
    seen_ids = _token_ids(plan, work)
    for name, folder in there.items():
        if name not in content["travelled"]:
            content["travelled"][name] = _distance(Path(plan.model), folder, seen_ids)
    for first, second in compared([*there]):
        if f"{first} {second}" not in content["apart"]:
            content["apart"][f"{first} {second}"] = _distance(there[first], there[second], seen_ids)


def _token_ids(plan: Plan, work: Path) -> list[int]:
    """Tokens that occur in the pairs that the runs train on."""
    dataset = load_dataset(work / "train.jsonl", load_tokenizer(plan.model), _data_config(plan))
    return sorted({token for pair in dataset for token in (*pair.chosen_input_ids, *pair.rejected_input_ids)})


def _distance(first: Path, second: Path, seen_ids: Sequence[int]) -> dict[str, float]:
    return {part: _short(value) for part, value in distance(first, second, seen_ids).items()}
