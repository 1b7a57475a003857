"""`make faults`: run every numbered fault and print, case by case, what came of it."""

import re
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent


def results(report: Path) -> dict[str, Counter]:
    """Outcomes by test file, from pytest's JUnit report."""
    counts: dict[str, Counter] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        file = case.attrib["classname"].split(".")[-1]
        outcome = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        counts.setdefault(file, Counter())[outcome] += 1
    return counts


def main() -> int:
    """Prints the table; returns pytest's exit code."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        code = pytest.main([str(HERE), "-q", "-W", "ignore", f"--junitxml={report}", *sys.argv[1:]])
        counts = results(report)
    table = Table("fault", "what happens to it", "tests", "result", title="Faults and bad input")
    for file in sorted(HERE.glob("test_f[0-9]*.py")):
        what = file.read_text(encoding="utf-8").split('"""')[1].split("\n")[0]
        number = re.match(r"Faults? [\d to,and]+", what)
        name = number[0].split(" ", 1)[1].strip() if number else file.stem[6:8]
        count = counts.get(file.stem, Counter())
        bad = count["failure"] + count["error"]
        result = f"[red]{bad} failed" if bad else "[green]survived" if count["passed"] else "[yellow]not run here"
        table.add_row(name, what.split(": ", 1)[-1], str(sum(count.values())), result)
    Console().print(table)
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
