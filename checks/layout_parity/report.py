"""What came of the comparisons, as a table and as records."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from checks.layout_parity.cases import Case
from checks.layout_parity.runs import Difference, Tolerance

MEASURES = ("loss", "grad_norm", "metrics", "updates")


def described(case: Case) -> dict[str, Any]:
    """What a case compares, in the words of a record."""
    return {
        "layout": case.layout,
        "ranks": case.ranks,
        "model": case.model if case.lora is None else f"{case.model}, LoRA",
        "objective": case.loss,
        "rows": case.form,
        "precision": "bf16" if case.is_half else "fp32",
    }


def outcome(found: Difference, tolerance: Tolerance) -> dict[str, Any]:
    """How far two runs are from each other and may be."""
    return {**found._asdict(), "tolerance": tolerance._asdict(), "agrees": found.within(tolerance)}


def print_table(records: Sequence[dict[str, Any]]) -> None:
    """Print a line for every record."""
    names = ("layout", "ranks", "model", "objective", "rows")
    table = Table("layout", "ranks", "model", "loss", "rows", *MEASURES, "")
    for record in records:
        if "error" in record:
            numbers, verdict = [""] * len(MEASURES), f"[bold red]{escape(record['error'][:60])}[/]"
        else:
            numbers = [f"{record[name]:.1e}" for name in MEASURES]
            verdict = "[green]same[/]" if record["agrees"] else f"[bold red]differs: {record['worst']}[/]"
        table.add_row(*(str(record[name]) for name in names), *numbers, verdict)
    # a file or a pipe has no width of its own
    Console(width=None if sys.stdout.isatty() else 150).print(table)
