"""Every numbered fault has a file, every file says which, and the table shows what is missing."""

from collections import Counter
from io import StringIO
from pathlib import Path

import pytest
from fault_table import FAULTS, HERE, files_by_number, make_table, missing_numbers, read_title
from rich.console import Console


def test_every_fault_has_a_file_that_is_named_after_it() -> None:
    files = files_by_number(HERE)
    assert missing_numbers(files) == []
    assert list(files) == list(FAULTS)
    for number, paths in files.items():
        for path in paths:
            assert read_title(path)[0][0] == int(path.name[6:8]) <= number, path.name


def test_table_lists_all_numbers_in_order_and_what_is_missing_in_red(tmp_path: Path) -> None:
    for name, line in {
        "test_f01_a.py": '"""Fault 1: one."""',
        "test_f02_b.py": '"""Faults 2 to 4: some.',
        "test_f06_c.py": '"""Faults 6 and 8: two."""',
        "test_f08_d.py": '"""Fault 8: again."""',
    }.items():
        (tmp_path / name).write_text(line + "\n")
    files = files_by_number(tmp_path)
    assert missing_numbers(files) == [5, 7, *range(9, 55)]
    counts = {"test_f01_a": Counter(passed=2), "test_f02_b": Counter(passed=1, failure=3)}
    out = StringIO()
    Console(file=out, width=120, color_system="standard", force_terminal=True).print(make_table(files, counts))
    text = out.getvalue()
    assert text.count("test_f02_b.py") == 3 and text.count("\x1b[31mno file") == 48
    assert text.count("\x1b[31m3 failed") == 3 and "\x1b[32msurvived" in text and "\x1b[33mnot run here" in text


@pytest.mark.parametrize("line", ['"""Something else."""', '"""F7: short."""', "import os"])
def test_file_without_a_number_is_an_error(tmp_path: Path, line: str) -> None:
    (tmp_path / "test_f07_x.py").write_text(line + "\n")
    with pytest.raises(AssertionError, match=r"test_f07_x\.py must begin with"):
        files_by_number(tmp_path)
