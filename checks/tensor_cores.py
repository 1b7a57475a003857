"""Hold the kernels to the numeric rule as a Hopper GPU would run them, and write the table of docs/numerics.md.

    python -m checks.tensor_cores --into docs/numerics.md          under a minute on one core; no GPU

- The kernels run in Triton's interpreter with the tiles of sm_90 on emulated tensor cores
  (`tests/kernels/triton/interpreted/hopper.py`).
- A row: error over allowed error of each result, by the device's rule and by the rule of fp32 products; or the least
  among the results that a planted error must show in, by the device's rule.
- Exits with 1 if right kernels do not meet the device's rule, or those with an error do.

Dims: `R` rows, `H` hidden, `V` vocabulary.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bench.pages import replace_in

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (ROOT / "tests", ROOT / "tests" / "kernels" / "triton" / "interpreted")
OPEN = "<!-- table: python -m checks.tensor_cores --into docs/numerics.md -->"
SHAPES = ((35, 200, 300), (96, 1027, 2049), (16, 4096, 600))
"""R, H, V."""
DTYPES = ("bf16", "fp16")
RESULTS = ("token_logps", "entropy", "mass", "d_logits")


class Line(NamedTuple):
    """Ratios of one run, by result."""

    title: str
    device: dict[str, float]
    """By the device's rule."""
    fp32: dict[str, float]
    """By the rule of fp32 products."""


def right_kernels(shape: tuple[int, int, int], dtype: str, case: str) -> Line:
    """Run one case of the tests on emulated tensor cores."""
    hopper, oracle = _tests()
    given = oracle.problem(*shape, oracle.DTYPES[dtype], **oracle.CASES[case])
    found = hopper.run(given)
    # The least favourable yardstick: none of its orders of H is the kernel's.
    device, fp32 = (
        {name: one.ratio for name, one in oracle.compare(found, given, *multiply).items() if name in RESULTS}
        for multiply in ((hopper.other_order,), ())
    )
    return Line(f"{' x '.join(map(str, shape))}, {dtype}, {case}", device, fp32)


def planted_errors(shape: tuple[int, int, int], dtype: str, case: str) -> Iterator[tuple[str, float]]:
    """Yield (error, the least of its ratios) by the most favourable yardstick, which has the kernel's order."""
    hopper, oracle = _tests()
    given = oracle.problem(*shape, oracle.DTYPES[dtype], **oracle.CASES[case])
    for title, error in hopper.ERRORS.items():
        compared = oracle.compare(error.run(given), given, hopper.wgmma_product)
        yield title, min(compared[name].ratio for name in error.reaches)


def table(lines: list[Line], errors: list[tuple[str, float]]) -> str:
    """Markdown: a row per run of right kernels, then one per planted error."""
    names = [*RESULTS, *(f"{name}, fp32" for name in RESULTS)]
    rows = [f"| R x H x V, inputs, case | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for line in lines:
        cells = [f"{ratios[name]:.2f}" for ratios in (line.device, line.fp32) for name in RESULTS]
        rows.append(f"| {line.title} | {' | '.join(cells)} |")
    rows += ["", "| planted error | least ratio of the results that it reaches |", "|---|---|"]
    rows += [f"| {title} | {ratio:.0f} |" for title, ratio in errors]
    return "\n".join(rows)


def main() -> None:
    """Run, write and judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--into", type=Path, help="put the table between the marks of this page; else it is printed")
    options = parser.parse_args()
    cases = _tests()[1].CASES
    lines = [right_kernels(shape, dtype, case) for shape in SHAPES for dtype in DTYPES for case in cases]
    errors = list(planted_errors(SHAPES[0], "bf16", "plain"))
    text = table(lines, errors)
    if options.into is None:
        print(text)
    else:
        replace_in(options.into, text, OPEN)
    if any(max(line.device.values()) > 1.0 for line in lines) or any(ratio <= 1.0 for _, ratio in errors):
        sys.exit("the rule does not tell right kernels from those with an error: see the table")


def _tests() -> tuple[Any, Any]:
    """The tests' own tools; Triton reads the variable as it is imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path[:0] = [str(folder) for folder in FOLDERS if str(folder) not in sys.path]
    return importlib.import_module("hopper"), importlib.import_module("triton_oracle")


if __name__ == "__main__":
    main()
