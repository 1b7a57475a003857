"""The stored table of right and wrong kernels on emulated tensor cores says what docs/numerics.md claims."""

from pathlib import Path

from bench.pages import CLOSE
from checks import tensor_cores as check

PAGE = Path(__file__).resolve().parents[2] / "docs" / "numerics.md"


def cells(page: str) -> list[list[str]]:
    stored = page.split(check.OPEN)[1].split(CLOSE)[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in stored.splitlines() if "---" not in line]


def test_table_has_a_row_per_run_and_per_error() -> None:
    ratios = dict.fromkeys(check.RESULTS, 0.25)
    text = check.table([check.Line("a run", ratios, ratios | {"mass": 6.74})], [("an error", 1234.4)])
    rows = cells(f"{check.OPEN}\n{text}\n{CLOSE}")
    assert ["a run", *["0.25"] * 6, "6.74", "0.25"] in rows and ["an error", "1234"] in rows


def test_stored_table_accepts_right_kernels_and_refuses_errors() -> None:
    rows = [row for row in cells(PAGE.read_text(encoding="utf-8")) if row[-1][:1].isdigit()]
    num_results = len(check.RESULTS)
    right = {row[0]: [float(cell) for cell in row[1:]] for row in rows if len(row) == 1 + 2 * num_results}
    errors = {row[0]: float(row[1]) for row in rows if len(row) == 2}
    assert len(right) == 24 and len(errors) == 6
    assert all(max(ratios[:num_results]) <= 1.0 for ratios in right.values())
    assert all(max(ratios[num_results:]) > 1.0 for title, ratios in right.items() if "x 200 x" not in title)
    assert min(errors.values()) > 100.0
