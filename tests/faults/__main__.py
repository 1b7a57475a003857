"""`make faults`: run every numbered fault and print, number by number, what came of it."""

import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import pytest
from fault_table import HERE, files_by_number, make_table, missing_numbers
from rich.console import Console


def results(report: Path) -> dict[str, Counter]:
    """Outcomes by test file, from pytest's JUnit report."""
    counts: dict[str, Counter] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        file = case.attrib["classname"].split(".")[-1]
        outcome = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        counts.setdefault(file, Counter())[outcome] += 1
    return counts


def main() -> int:
    """Prints the table; returns pytest's exit code, or 1 where a fault has no file."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        code = pytest.main([str(HERE), "-q", "-W", "ignore", f"--junitxml={report}", *sys.argv[1:]])
        counts = results(report)
    files = files_by_number(HERE)
    Console().print(make_table(files, counts))
    return int(code) or int(bool(missing_numbers(files)))


if __name__ == "__main__":
    sys.exit(main())
