"""Instructions that a warp spends on a finished tile of the Triton kernels, counted in machine code; no GPU is needed.

    python -m bench.epilogue                            count, with the Triton that is installed; a few seconds
    python -m bench.epilogue --into docs/gpu-run.md     put the stored table between the marks of this page

What is stored as `now` is also the budget: the tests refuse more.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import triton

from bench.pages import replace_in
from fastpref.kernels.machine_code import count_epilogue, disassemble, resource_usage
from fastpref.kernels.tiles import TABLE
from fastpref.kernels.triton_compile import DTYPES, Variant, build, operands

RESULTS = Path(__file__).parent / "results" / "epilogue.json"
OPEN = "<!-- table: python -m bench.epilogue --into docs/gpu-run.md -->"
KERNELS = {
    "forward": ("forward", ()),
    "forward with column masses": ("forward", ("mass",)),
    "screening": ("screen", ()),
    "screening with column masses": ("screen", ("mass",)),
    "gradient with covered mass": ("gradient", ("covered",)),
}
COUNTED = {"MUFU": ("MUFU",), "SHFL": ("SHFL",), "LDS+STS": ("LDS", "STS"), "BAR": ("BAR",), "FSEL": ("FSEL",)}


@dataclasses.dataclass(frozen=True)
class Line:
    """One kernel on the table's Hopper tile."""

    kernel: str
    code: str
    """`before` or `now`."""
    triton: str
    registers: int
    spilled_bytes: int
    instructions: int
    opcodes: dict[str, int]


def count(kernel: str) -> Line:
    """Compile one of KERNELS for sm_90 and its most common operands, and count."""
    name, flags = KERNELS[kernel]
    dtype = operands(name)[0]
    tile = TABLE[f"sm_90/{DTYPES[dtype].itemsize * 8}"][0]
    cubin = build(Variant(name, "sm_90", dtype, flags, tile)).asm["cubin"]
    found = count_epilogue(disassemble(cubin))
    opcodes = {heading: found.count(*names) for heading, names in COUNTED.items()}
    return Line(kernel, "now", triton.__version__, *resource_usage(cubin), found.instructions, opcodes)


def stored() -> list[Line]:
    """Return the lines of the file."""
    return [Line(**line) for line in json.loads(RESULTS.read_text(encoding="utf-8"))["lines"]]


def table(lines: list[Line]) -> str:
    """Return the lines as Markdown."""
    header = ("kernel", "Triton", "code", "registers", "spilled bytes", "instructions", *COUNTED)
    rows = [header, ("---",) * len(header)]
    for line in sorted(lines, key=lambda line: (list(KERNELS).index(line.kernel), line.triton, line.code)):
        numbers = (line.registers, line.spilled_bytes, line.instructions, *line.opcodes.values())
        rows.append((line.kernel, line.triton, line.code, *map(str, numbers)))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Count and store, or write the table of what is stored."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, help="count nothing; put the stored table between the marks of this page")
    options = parser.parse_args()
    if options.into is not None:
        replace_in(options.into, table(stored()), OPEN)
        return
    kept = [line for line in stored() if (line.code, line.triton) != ("now", triton.__version__)]
    lines = [*kept, *map(count, KERNELS)]
    content = {"benchmark": "epilogue", "lines": [dataclasses.asdict(line) for line in lines]}
    RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
