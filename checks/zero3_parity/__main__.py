"""Train the same small models under DeepSpeed ZeRO-3 by TRL's trainers and by fastpref's, and compare every step.

    python -m checks.zero3_parity              # a few minutes on two CPU cores; needs DeepSpeed, no network
    python -m checks.zero3_parity --only LoRA  # the cases whose name holds LoRA

- Two ranks over gloo, three steps and an evaluation: DPO and ORPO, tied and untied output layers, fp32 and bf16, with
  DeepSpeed's default settings and with settings that free every weight after each use.
- fp32 rule, the same for all: every metric of every step within 2e-5 of max(|value|, 1), every tensor's update within
  1e-3 of its norm. bf16 rule: from TRL in bf16 at most twice as far as that is from TRL in fp32; accuracies, which a
  tie can turn, are not compared there.
- Exits with 1 if any case breaks its rule, fails, or kept the output layer whole on a rank.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from checks.machine import machine
from checks.zero3_parity.runs import (
    RANKS,
    STRICT,
    TRAINERS,
    Run,
    ShortRun,
    check_evidence,
    difference,
    tolerance,
    train,
    write_files,
    zero3_ranks,
)
from fastpref.testing.workers import RankPool, WorkerError

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("deepspeed", "trl", "transformers", "accelerate", "peft", "torch", "fastpref")
STRICTLY = {"deepspeed": STRICT}
LORA: dict[str, Any] = {"lora": {"target_modules": ["q_proj", "v_proj"]}, "has_reference": False}
LORA_HEAD: dict[str, Any] = {"lora": {**LORA["lora"], "modules_to_save": ["lm_head"]}, "has_reference": False}
CASES: dict[str, dict[str, Any]] = {
    "DPO": {},
    "DPO, tied": {"tied": True},
    "DPO, strict": STRICTLY,
    "DPO, tied, strict": {"tied": True, **STRICTLY},
    "DPO, bf16": {"settings": {"bf16": True}},
    "DPO, tied, bf16, strict": {"tied": True, "settings": {"bf16": True}, **STRICTLY},
    "DPO, model built before": {"built_before": True},
    "DPO, accumulation": {"settings": {"gradient_accumulation_steps": 2}, **STRICTLY},
    "DPO, no gradient checkpointing": {"settings": {"activation_checkpointing": False}, **STRICTLY},
    "DPO, precomputed reference": {"settings": {"precompute_ref_log_probs": True}, "has_reference": False, **STRICTLY},
    "DPO, weighted (WPO)": {"settings": {"use_weighting": True}, **STRICTLY},
    "DPO, moving reference": {"settings": {"sync_ref_model": True, "ref_model_sync_steps": 1}, **STRICTLY},
    "DPO, LoRA": LORA,
    "DPO, LoRA, strict": {**LORA, **STRICTLY},
    "DPO, LoRA, bf16": {**LORA, "settings": {"bf16": True}},
    "DPO, LoRA and output layer, strict": {**LORA_HEAD, **STRICTLY},
    "ORPO": {"objective": "ORPO"},
    "ORPO, tied, strict": {"objective": "ORPO", "tied": True, **STRICTLY},
    "ORPO, bf16": {"objective": "ORPO", "settings": {"bf16": True}},
    "ORPO, LoRA, strict": {"objective": "ORPO", **LORA, **STRICTLY},
}


class Trained:
    """The runs of TRL's trainers and of fastpref's, each made once."""

    def __init__(self, pool: RankPool, folder: Path) -> None:
        self.pool, self.folder = pool, folder
        self._done: dict[tuple[str, str], Run] = {}

    def __call__(self, run: ShortRun, *, by_trl: bool) -> Run:
        """Metrics and weights of `run`."""
        trainer = TRAINERS[run.objective][0 if by_trl else 1]
        key = repr(run), trainer
        if key not in self._done:
            ranks = self.pool.run(train, run, trainer, str(self.folder / f"cache-{len(self._done)}-{trainer[:3]}"))
            check_evidence(ranks)
            self._done[key] = ranks[0]
        return self._done[key]


def compare(case: str, trained: Trained, files: str) -> dict[str, Any]:
    """The record of a case: how far fastpref's trainer is from TRL's, and how far it may be."""
    run, start = ShortRun(files=files, **CASES[case]), time.perf_counter()
    try:
        theirs = trained(run, by_trl=True)
        exact = None
        if run.settings.get("bf16"):
            exact = trained(replace(run, settings={**run.settings, "bf16": False}), by_trl=True)
        ours = trained(run, by_trl=False)
        found, allowed = difference(ours, theirs, with_counts=exact is None), tolerance(theirs, exact)
    except (WorkerError, AssertionError) as error:
        return {"case": case, "agrees": False, "error": str(error)[-2000:]}
    seconds = round(time.perf_counter() - start, 1)
    record = {"case": case, "agrees": found.within(allowed), **found._asdict(), "tolerance": allowed._asdict()}
    return {**record, "steps": len(ours.log) - 1, "seconds": seconds, **ours.evidence}


def main() -> None:
    """Run every case and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="run the cases whose name holds this text")
    parser.add_argument("--output", type=Path, help="also write the differences here, as JSON")
    options = parser.parse_args()
    # Worker ranks end with this process only if it ends in order.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    chosen = [case for case in CASES if options.only in case]
    with tempfile.TemporaryDirectory() as root, zero3_ranks() as pool:
        files = write_files(Path(root) / "files", ROOT / "examples/tokenizer", ROOT / "examples/data/demo_train.jsonl")
        trained = Trained(pool, Path(root))
        records = [compare(case, trained, files) for case in track(chosen, "comparing", console=Console(stderr=True))]
    report(records, options.output)
    if not all(record["agrees"] for record in records):
        sys.exit(1)


def report(records: list[dict[str, Any]], output: Path | None) -> None:
    """Print the table, and write it with versions and command where asked to."""
    console = Console(width=None if sys.stdout.isatty() else 150)  # a file or a pipe has no width of its own
    table = Table("case", "metrics", "worst", "updates", "worst", "on one rank alone", "")
    for record in records:
        if "error" in record:
            table.add_row(record["case"], *("",) * 5, "[bold red]failed[/]")
            console.print(f"{record['case']}: {record['error']}", markup=False)
            continue
        verdict = "[green]same[/]" if record["agrees"] else "[bold red]differs[/]"
        numbers = (f"{record['metric']:.1e}", record["worst_metric"], f"{record['update']:.1e}", record["worst_update"])
        table.add_row(record["case"], *numbers, f"{record['partitioned_share']:.0%}", verdict)
    console.print(table)
    agreeing = sum(record["agrees"] for record in records)
    console.print(f"{agreeing} of {len(records)} runs under ZeRO-3 train like TRL's")
    if output is not None:
        document = {
            "command": "python -m checks.zero3_parity",
            "machine": machine(ranks=RANKS, threads=1),
            "versions": {package: version(package) for package in PACKAGES},
            "passed": agreeing == len(records),
            "cases": records,
        }
        output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
