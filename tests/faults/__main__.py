"""`make faults`: run every numbered fault and print, number by number, what came of it."""

import os
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import pytest
from fault_table import HERE, REPORT_FOLDER, files_by_number, make_table, missing_numbers
from rich.console import Console


def results(folder: Path) -> dict[str, Counter]:
    """Outcomes by test file, from pytest's JUnit reports: this process's and that of the interpreter's."""
    counts: dict[str, Counter] = {}
    for report in folder.glob("*.xml"):
        for case in ElementTree.parse(report).iter("testcase"):
            file = case.attrib["classname"].split(".")[-1]
            outcome = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
            counts.setdefault(file, Counter())[outcome] += 1
    return counts


def main() -> int:
    """Prints the table; returns pytest's exit code, or 1 where a fault has no file."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ[REPORT_FOLDER] = folder
        code = pytest.main([str(HERE), "-q", "-W", "ignore", f"--junitxml={folder}/here.xml", *sys.argv[1:]])
        counts = results(Path(folder))
    files = files_by_number(HERE)
    Console().print(make_table(files, counts))
    return int(code) or int(bool(missing_numbers(files)))


if __name__ == "__main__":
    sys.exit(main())
