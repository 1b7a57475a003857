"""`worker`: one measurement in a process of its own."""

from __future__ import annotations

import importlib
import json

import click

# By name, as the trainer takes seconds to import and the head does not need it.
WORKERS = {
    "check": "bench.measure",
    "time_in_turns": "bench.measure",
    "ceilings": "bench.measure",
    "measure": "bench.packing",
    "time_steps": "bench.reference",
    "measure_memory": "bench.reference",
    "time_dropin": "bench.dropin",
    "memory_of_dropin": "bench.dropin",
    "take_steps": "bench.scaling",
    "take_steps_on_ranks": "bench.scaling",
    "measure_on_ranks": "bench.ranks",
    "measure_saves": "bench.save",
    "measure_import": "bench.save",
    "measure_export": "bench.save",
    "run_row": "bench.train",
    "score_start": "bench.training_effect",
    "train_run": "bench.training_effect",
    "gemm_rate": "bench.measure",
}


@click.command(hidden=True)
@click.argument("function", type=click.Choice(list(WORKERS)))
@click.argument("arguments")
def worker(function: str, arguments: str) -> None:
    """One measurement in this process; its row is the last line printed."""
    called = getattr(importlib.import_module(WORKERS[function]), function)
    print(json.dumps(called(*json.loads(arguments))))
