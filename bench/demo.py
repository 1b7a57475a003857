"""The demo, as a new user runs it: how long the whole of it takes, and held-out accuracy before and after."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from bench.measure import Row
from bench.workloads import ROOT

METRIC = "eval_rewards/accuracies"
TITLES = {"default": "DPO + SFT term", "orpo": "ORPO", "sigmoid": "DPO alone"}
"""Losses that the demo is measured with, as `make demo` takes them."""


def run_demo(loss: str, steps: int | None, output: Path) -> Row:
    """Run the demo on one process.

    Args:
        loss: one of `TITLES`.
        steps: optimizer steps; None for those of the quickstart's epochs.
        output: where the demo writes.

    Raises:
        CalledProcessError: the demo failed.
    """
    arguments = ["--loss", loss, "--output", str(output), *([] if steps is None else ["--steps", str(steps)])]
    before, start = os.getloadavg()[0], time.perf_counter()
    subprocess.run([sys.executable, str(ROOT / "examples" / "demo.py"), *arguments], check=True)
    seconds = time.perf_counter() - start
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    evaluations = [record for record in map(json.loads, lines) if METRIC in record]
    return {
        "loss": loss,
        "steps": evaluations[-1]["step"],
        "is_cut": steps is not None,
        "seconds": round(seconds, 1),
        "accuracies": [evaluations[0][METRIC], evaluations[-1][METRIC]],
        "load_average": [round(load, 1) for load in (before, os.getloadavg()[0])],
    }


def make_command(row: Row) -> str:
    """What a user types for the same."""
    loss = "" if row["loss"] == "default" else f" LOSS={row['loss']}"
    return f"make demo{loss}" + (f' DEMO_ARGS="--steps {row["steps"]}"' if row["is_cut"] else "")
