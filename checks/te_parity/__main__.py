"""Train the same small models on Transformer Engine's layers and on Megatron's own, and compare them.

    make parity-te                           # every version; hours on two CPU cores
    python -m checks.te_parity --only CP     # what CP is part of; with the stand-in and Transformer Engine on the path

- The matrix of `checks.layout_parity` and its rules, on the real Python code of Transformer Engine over the stand-in
  for its extension (`tests/te_stub`): every layout against one process on Megatron's own layers. The models exported
  before training must be equal bit for bit.
- 16 bits: from fp32 at most twice as far as Megatron's own layers, in one process or in the same layout.
- Adapters, and runs that are cut and continued: bit for bit where nothing changes, else as the layouts.
- Exits with 1 if any comparison breaks its rule.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from torch.distributed.checkpoint.api import CheckpointException

from checks.layout_parity.cases import OneProcess
from checks.layout_parity.report import described, outcome, print_table
from checks.layout_parity.runs import Difference, Tolerance
from checks.machine import machine
from checks.te_parity.cases import (
    Ranks,
    compare_layers,
    compare_resumed,
    perturbed_adapter,
    resumed_cases,
    te_cases,
)
from fastpref.testing.workers import RankPool

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("megatron-core", "transformer-engine", "torch", "fastpref")
Comparison = Callable[[Path], tuple[Difference, Tolerance]]


def main() -> None:
    """Run every case and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="run the cases whose description holds this text")
    parser.add_argument("--output", type=Path, help="also write the differences here, as JSON")
    options = parser.parse_args()
    # Worker ranks end with this process only if it ends in order.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory() as root, RankPool(2, 120.0) as two, RankPool(4, 120.0) as four:
        comparisons = [
            (names, comparison)
            for names, comparison in every_comparison(Path(root), Ranks(two, four))
            if options.only in ", ".join(map(str, names.values()))
        ]
        records = []
        for index, (names, comparison) in enumerate(track(comparisons, console=Console(stderr=True))):
            records.append({**names, **attempt(comparison, Path(root) / f"case-{index}")})
    print_table(records)
    agreeing = sum(record["agrees"] for record in records)
    print(f"{agreeing} of {len(records)} runs train on Transformer Engine's layers as on Megatron's own")
    if options.output is not None:
        write(records, options.output)
    if agreeing < len(records):
        sys.exit(1)


def every_comparison(root: Path, ranks: Ranks) -> list[tuple[dict[str, Any], Comparison]]:
    """What is compared, and what compares it in a directory of its own."""
    lora, one_process = perturbed_adapter(root / "adapter"), OneProcess(root)
    found: list[tuple[dict[str, Any], Comparison]] = []
    for case in te_cases(lora):
        names = described(case)
        found.append((names, partial(compare_layers, case, ranks, one_process)))
    for resumed in resumed_cases():
        found.append((resumed.described(), partial(compare_resumed, resumed, ranks, lora)))
    return found


def attempt(comparison: Comparison, directory: Path) -> dict[str, Any]:
    """What came of a comparison, errors included: others follow."""
    try:
        return outcome(*comparison(directory))
    except (Exception, CheckpointException) as error:  # torch has the latter outside of Exception
        return {"agrees": False, "error": f"{type(error).__name__}: {str(error).strip().splitlines()[-1:]}"[:400]}


def write(records: list[dict[str, Any]], output: Path) -> None:
    """Write the records with what they were made with."""
    commit = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    document = {
        "command": "make parity-te",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "commit": commit.stdout.strip(),
        "machine": machine(threads=1),
        "versions": {package: version(package) for package in PACKAGES},
        "passed": all(record["agrees"] for record in records),
        "cases": records,
    }
    output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
