"""Rows of `python -m bench train`: which pairs, in which turns, held against TRL's answers, and the operations needed.

Lengths are (prompt, chosen, rejected) in tokens.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import click

from bench import train
from bench.commands.shared import command_line, store
from bench.measure import Row, gemm_rate, surroundings
from bench.train import SETTINGS, UNTIMED_STEPS, Setting
from checks.trl_parity.runs import compare_steps, worst
from fastpref.data import DataConfig, TokenizedPair, load_dataset, load_tokenizer
from fastpref.errors import FastprefError
from fastpref.run.architecture.architecture import Architecture
from fastpref.run.plan.pipeline import head_flops, layer_flops

ANCHOR = "trl"
GEMM_REPEATS = 9
Lengths = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured."""

    model: str
    """A Hugging Face model directory."""
    data: str
    """A file of preference pairs."""
    pairs: int
    """Pairs of an optimizer step."""
    steps: int
    """Timed steps of a run."""
    max_length: int
    """Longest sequence in tokens."""
    pack_length: int
    """Most positions of a packed row."""
    threads: int
    """OMP_NUM_THREADS of the runs."""

    def sizes(self) -> Row:
        """What must be equal for runs to stand in one table."""
        names = {"model": Path(self.model).name, "data": Path(self.data).name}
        return {**vars(self), **names}


def order_pairs(plan: Plan, into: Path) -> list[Lengths]:
    """Write the pairs in the order of the steps: the shortest, untimed, then those that stand for the file.

    These are neighbours in the file, the ones whose mean lengths are nearest to the means of all its pairs.

    Returns:
        Lengths of the timed pairs.

    Raises:
        ClickException: the file has too few pairs, or pairs that are left out.
    """
    lines = Path(plan.data).read_text(encoding="utf-8").splitlines(keepends=True)
    pairs = list(load_dataset(plan.data, load_tokenizer(plan.model), DataConfig(max_length=plan.max_length)))
    num_untimed, num_timed = UNTIMED_STEPS * plan.pairs, plan.steps * plan.pairs
    if len(pairs) != len(lines) or len(lines) < num_untimed + num_timed:
        raise click.ClickException(
            f"{plan.data} has {len(lines)} lines and {len(pairs)} usable pairs; all must be usable, and at least "
            f"{num_untimed + num_timed}: lower --pairs or --steps, or choose another file"
        )
    lengths = [_lengths(pair) for pair in pairs]
    in_order = sorted(range(len(pairs)), key=lambda index: 2 * lengths[index][0] + sum(lengths[index][1:]))
    untimed, rest = in_order[:num_untimed], sorted(in_order[num_untimed:])
    windows = [rest[start : start + num_timed] for start in range(len(rest) - num_timed + 1)]
    timed = min(windows, key=lambda window: _distance([lengths[index] for index in window], lengths))
    into.write_text("".join(lines[index] for index in (*untimed, *timed)), encoding="utf-8")
    return [lengths[index] for index in timed]


def _lengths(pair: TokenizedPair) -> Lengths:
    prompt = pair.num_prompt_tokens
    return prompt, len(pair.chosen_input_ids) - prompt, len(pair.rejected_input_ids) - prompt


def _distance(some: Sequence[Lengths], every: Sequence[Lengths]) -> float:
    """Sum over prompt, chosen and rejected of how far the mean length is from that of all, relative."""
    wanted = [mean(part) for part in zip(*every, strict=True)]
    return sum(abs(mean(part) / want - 1.0) for part, want in zip(zip(*some, strict=True), wanted, strict=True))


def model_flops(arch: Architecture, lengths: Sequence[Lengths], setting: Setting) -> float:
    """Operations that pairs of these lengths need: no padding, nothing recomputed, the head on answers alone.

    Forward 1, backward 2, and 1 for a reference in memory. A shared prompt counts once; its last token, which has two
    labels, twice.
    """
    total = 0.0
    for prompt, chosen, rejected in lengths:
        total += (chosen + rejected) * head_flops(arch)
        kept = prompt - 1 if setting.shares_prompts else 0
        rest = prompt - kept + rejected
        # A token of the rest sees the kept ones and half of the rest, as in the mean over a row of 2 * kept + rest.
        layers = (prompt + chosen) * layer_flops(arch, prompt + chosen) + rest * layer_flops(arch, 2 * kept + rest)
        total += arch.num_layers * layers
    return (3.0 if setting.precomputed else 4.0) * total


def architecture(model: str) -> Architecture:
    """The shape of a model directory."""
    return Architecture.from_hf(json.loads((Path(model) / "config.json").read_text(encoding="utf-8")))


def measure_rows(
    plan: Plan, names: Sequence[str], turns: int, minutes: float, file: Path, folder: Path, run: Callable[..., Row]
) -> Row:
    """Measure what `file` has not got yet, and store each run as it is done.

    Args:
        plan: what is measured.
        names: of `SETTINGS`, `ANCHOR` first.
        turns: runs of each row; every other turn goes backwards.
        minutes: no run begins after so long.
        file: of the results.
        folder: for temporary files.
        run: calls a function of `bench.train`, here or in a process of its own.

    Returns:
        The contents of `file`.

    Raises:
        ClickException: the file holds runs of another plan or commit, or TRL does not run.
    """
    ordered = folder / "pairs.jsonl"
    lengths = order_pairs(plan, ordered)
    content = _open(file, plan, lengths)
    arguments = (plan.model, str(ordered), plan.pairs, plan.steps, plan.max_length, plan.pack_length)
    start = time.perf_counter()
    for turn in range(turns):
        if len(content["gemm"]) <= turn:
            content["gemm"].append(run(gemm_rate, GEMM_REPEATS))
        for name in names if turn % 2 == 0 else [*reversed(names)]:
            row = content["rows"].setdefault(name, {"status": "ok", "runs": []})
            if row["status"] != "ok" or len(row["runs"]) > turn:
                continue
            if time.perf_counter() - start > 60.0 * minutes:
                click.echo(f"{minutes:g} minutes are over; run the same command again to go on")
                return content
            click.echo(f"turn {turn + 1} of {turns}, {name}: {_measure_one(content, name, arguments, run)}")
            store(file, content)
    return content


def _open(file: Path, plan: Plan, lengths: Sequence[Lengths]) -> Row:
    here: Row = surroundings()
    arch = architecture(plan.model)
    content: Row = {"sizes": plan.sizes(), "lengths": [list(pair) for pair in lengths]}
    content["model_flops"] = {name: model_flops(arch, lengths, setting) for name, setting in SETTINGS.items()}
    content |= here | {"command": command_line(), "gemm": [], "rows": {}}
    if not file.exists():
        return content
    stored: Row = json.loads(file.read_text(encoding="utf-8"))
    for name in ("sizes", "commit", "machine", "versions"):
        if stored[name] != content[name]:
            raise click.ClickException(
                f"{file} holds runs of another {name} ({stored[name]}, now {content[name]}); remove it to start anew"
            )
    return stored


def _measure_one(content: Row, name: str, arguments: tuple[Any, ...], run: Callable[..., Row]) -> str:
    """One run of a row, stored unless its answers are others than TRL's; what to print of it."""
    row = content["rows"][name]
    load_before = os.getloadavg()[0]
    try:
        found = run(train.run_row, name, *arguments)
    except (RuntimeError, FastprefError) as error:
        if name == ANCHOR:
            raise click.ClickException(f"TRL does not run: {error}") from error
        row |= {"status": "failed", "reason": str(error)}
        return f"failed, {error}"
    found["load_average"] = [round(load, 1) for load in (load_before, os.getloadavg()[0])]
    expected = found if name == ANCHOR and not row["runs"] else content["rows"][ANCHOR]["runs"][0]
    reason = difference(SETTINGS[name], expected["steps"], found["steps"])
    if reason is not None:
        row |= {"status": "wrong", "reason": reason, "runs": []}
        return f"wrong, {reason}"
    row["runs"].append(found)
    return f"{', '.join(f'{seconds:.2f}' for seconds in found['wall_s'])} s a step, {found['peak_mib']:.0f} MiB"


def difference(setting: Setting, expected: Sequence[Row], found: Sequence[Row]) -> str | None:
    """Say where the steps of a row differ most from those of TRL; None where they agree.

    Rewards of the first step, where policy and reference are one model, are rounding alone where the reference was
    scored in other batches; they are not looked at then.
    """
    run = train.parity_run(setting, "", "", 1, len(expected) - UNTIMED_STEPS, 1, Path())
    wrong = [comparison for comparison in compare_steps(run, expected, found) if not comparison.agrees]
    if setting.precomputed:
        wrong = [each for each in wrong if each.step > 1 or not each.metric.startswith("rewards/")]
    if not wrong:
        return None
    most = worst(wrong)
    return f"{most.metric} of step {most.step} is {most.fastpref:.7g}, TRL's {most.trl:.7g}"
