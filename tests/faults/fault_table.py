"""Which file tests which numbered fault: read from the first line of each, as in "Faults 30 to 32: what happens"."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

HERE = Path(__file__).parent
FAULTS = range(1, 55)
REPORT_FOLDER = "FASTPREF_FAULT_REPORTS"
"""Variable with the folder in which processes of tests leave their JUnit reports, if somebody wants them."""
_TITLE = re.compile(r'"""Faults? (?P<first>\d+)(?: (?P<link>and|to) (?P<last>\d+))?: (?P<what>.+?)(?:""")?$')


def read_title(file: Path) -> tuple[list[int], str]:
    """The numbers that a file is for, and what happens to them."""
    line = file.read_text(encoding="utf-8").split("\n", 1)[0]
    title = _TITLE.match(line)
    assert title, f"{file.name} must begin with 'Fault N: ...' or 'Faults N to M: ...', got {line}"
    first = int(title["first"])
    last = int(title["last"] or first)
    return ([first, last] if title["link"] == "and" else [*range(first, last + 1)]), title["what"]


def files_by_number(folder: Path) -> dict[int, list[Path]]:
    """The files of every fault, in the order of the numbers; an empty list where there is none."""
    files: dict[int, list[Path]] = {number: [] for number in FAULTS}
    for file in sorted(folder.glob("test_f[0-9]*.py")):
        for number in read_title(file)[0]:
            files.setdefault(number, []).append(file)
    return files


def missing_numbers(files: Mapping[int, Sequence[Path]]) -> list[int]:
    """Faults that nothing tests."""
    return [number for number, paths in files.items() if not paths]


def make_table(files: Mapping[int, Sequence[Path]], counts: Mapping[str, Counter]) -> Table:
    """One row per number and file, with the outcomes of its tests."""
    table = Table("fault", "what happens to it", "file", "tests", "result", title="Faults and bad input")
    for number, paths in files.items():
        if not paths:
            table.add_row(str(number), "", "", "0", "[red]no file")
        for path in paths:
            count = counts.get(path.stem, Counter())
            bad = count["failure"] + count["error"]
            result = f"[red]{bad} failed" if bad else "[green]survived" if count["passed"] else "[yellow]not run here"
            table.add_row(str(number), read_title(path)[1], path.name, str(sum(count.values())), result)
    return table
