"""Train the same small models in every layout of ranks, and compare each run with one process.

    python -m checks.layout_parity               # about ten minutes on two CPU cores; needs no files and no network
    python -m checks.layout_parity --only CP     # the layouts whose name holds CP

- Three steps of eight pairs, DPO and ORPO, fp32, on 2 and 4 ranks over gloo: padded rows, packed rows, and packed rows
  that share their prompts; a dense, a tied, a sliding-window and a mixture-of-experts model.
- fp32 rule, the same for all: every metric of every step within 2e-5 of max(|value|, 1), every tensor's update within
  1e-3 of its norm. bf16 rule: from one process in bf16 at most twice as far as that is from one process in fp32, since
  the rounding errors of the two may point in opposite directions.
- Exits with 1 if any layout breaks its rule.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from checks.layout_parity.runs import (
    EXPERT_LAYOUTS,
    EXPERTS,
    GEMMA,
    LAYOUTS,
    MODEL,
    TOLERANCES,
    WINDOWED,
    Difference,
    ShortRun,
    Tolerance,
    difference,
    train,
)
from fastpref.losses import DPOConfig
from fastpref.testing.workers import RankPool

LOSSES = {"DPO": DPOConfig(), "ORPO": DPOConfig(pref_loss="orpo")}
FORMS: dict[str, dict[str, Any]] = {
    "padded": {},
    "packed": {"packing": True},
    "packed, shared": {"packing": True, "prefix_sharing": True},
}
MODELS = {
    "dense": MODEL,
    "tied": {**MODEL, "tie_word_embeddings": True},
    "windowed": WINDOWED,
    "Gemma 3": GEMMA,
    "experts": EXPERTS,
}
# What every model but the dense one is tried in, beside the layouts of experts.
MODEL_LAYOUTS = ("TP2-SP", "PP2-VPP2", "CP2", "DP2 overlapped reduce and gather", "TP2-SP x PP2-VPP2")
BF16_LAYOUTS = ("TP2", "TP2-SP", "PP2", "PP2-VPP2", "CP2", "DP2 overlapped reduce and gather")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison."""

    layout: str
    ranks: int
    model: str
    loss: str
    form: str
    settings: dict[str, Any] = field(default_factory=dict)

    def run(self, settings: dict[str, Any]) -> ShortRun:
        """The run with `settings` beside what the form asks for."""
        return ShortRun(loss=LOSSES[self.loss], policy=MODELS[self.model], settings={**FORMS[self.form], **settings})


def cases() -> Iterator[Case]:
    """Every comparison, those of two ranks first."""
    for ranks in (2, 4):
        for name, (size, settings) in LAYOUTS.items():
            if size != ranks:
                continue
            for form in FORMS:
                for loss in LOSSES:
                    yield Case(layout=name, ranks=size, model="dense", loss=loss, form=form, settings=settings)
            for model in ("tied", "windowed", "Gemma 3") if name in MODEL_LAYOUTS else ():
                for form in forms_of(settings):
                    yield Case(layout=name, ranks=size, model=model, loss="DPO", form=form, settings=settings)
            if name in BF16_LAYOUTS:
                half = {**settings, "bf16": True}
                yield Case(layout=f"{name}, bf16", ranks=size, model="dense", loss="DPO", form="padded", settings=half)
        for name, (size, settings) in EXPERT_LAYOUTS.items():
            for form in forms_of(settings) if size == ranks else ():
                yield Case(layout=name, ranks=size, model="experts", loss="DPO", form=form, settings=settings)


def forms_of(settings: dict[str, Any]) -> Iterable[str]:
    """Rows that models other than the dense one are tried on: all of them where ranks cut rows in mid-sequence."""
    return FORMS if "context_parallel_size" in settings else ("padded",)


class OneProcess:
    """The runs that layouts are compared with, each made once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._done: dict[str, tuple[list[dict[str, float]], Path]] = {}

    def __call__(self, run: ShortRun) -> tuple[list[dict[str, float]], Path]:
        """Log and directory of `run` in this process."""
        if repr(run) not in self._done:
            directory = self.root / f"one-{len(self._done)}"
            self._done[repr(run)] = train(run, str(directory)), directory
        return self._done[repr(run)]


def compare(case: Case, pool: RankPool, one_process: OneProcess, directory: Path) -> tuple[Difference, Tolerance]:
    """Run a case on the pool's ranks: how far it is from one process, and how far it may be."""
    is_half = case.settings.get("bf16", False)
    expected, expected_dir = one_process(case.run({"bf16": True} if is_half else {}))
    log = pool.run(train, case.run(case.settings), str(directory))[0]
    tolerance = TOLERANCES[torch.float32]
    if is_half:
        exact, exact_dir = one_process(replace(case, settings={}).run({}))
        own = difference(expected, exact, expected_dir, exact_dir)
        tolerance = Tolerance(metric=2 * max(own.loss, own.grad_norm, own.metrics), update=2 * own.updates)
    return difference(log, expected, directory, expected_dir), tolerance


def main() -> None:
    """Run every case and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="run the layouts whose name holds this text")
    parser.add_argument("--output", type=Path, help="also write the differences here, as JSON")
    options = parser.parse_args()
    table = Table("layout", "ranks", "model", "loss", "rows", "loss", "grad_norm", "metrics", "updates", "")
    records, failed = [], 0
    chosen = [case for case in cases() if options.only in case.layout]
    with tempfile.TemporaryDirectory() as root, RankPool(2, 120.0) as two, RankPool(4, 120.0) as four:
        one_process = OneProcess(Path(root))
        for index, case in enumerate(track(chosen, "comparing", console=Console(stderr=True))):
            pool = two if case.ranks == 2 else four
            found, tolerance = compare(case, pool, one_process, Path(root) / f"case-{index}")
            agrees = found.within(tolerance)
            failed += not agrees
            numbers = (f"{value:.1e}" for value in found[:4])
            verdict = "[green]same[/]" if agrees else f"[bold red]differs: {found.worst}[/]"
            table.add_row(case.layout, str(case.ranks), case.model, case.loss, case.form, *numbers, verdict)
            precision = "bf16" if case.settings.get("bf16", False) else "fp32"
            records.append({"layout": case.layout, "ranks": case.ranks, "model": case.model, "objective": case.loss})
            records[-1] |= {"rows": case.form, "precision": precision, **found._asdict()}
            records[-1] |= {"tolerance": tolerance._asdict(), "agrees": agrees}
    # a file or a pipe has no width of its own
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(table)
    console.print(f"{len(chosen) - failed} of {len(chosen)} runs in parallel train like one process")
    if options.output is not None:
        options.output.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
