"""Train the same small models in every layout of ranks, and compare each run with one process.

    python -m checks.layout_parity               # about ten minutes on two CPU cores; needs no files and no network
    python -m checks.layout_parity --only CP     # the layouts whose name holds CP

- Three steps of eight pairs, DPO and ORPO, fp32, on 2 and 4 ranks over gloo: padded rows, packed rows, and packed rows
  that share their prompts; a dense, a tied, a sliding-window and a mixture-of-experts model.
- fp32 rule, the same for all: every metric of every step within 2e-5 of max(|value|, 1), every tensor's update within
  1e-3 of its norm. bf16 rule: from one process in bf16 at most twice as far as that is from one process in fp32, since
  the rounding errors of the two may point in opposite directions.
- Exits with 1 if any layout breaks its rule.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import track

from checks.layout_parity.cases import OneProcess, cases, compare
from checks.layout_parity.report import described, outcome, print_table
from fastpref.testing.workers import RankPool


def main() -> None:
    """Run every case and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="run the layouts whose name holds this text")
    parser.add_argument("--output", type=Path, help="also write the differences here, as JSON")
    options = parser.parse_args()
    records = []
    chosen = [case for case in cases() if options.only in case.layout]
    with tempfile.TemporaryDirectory() as root, RankPool(2, 120.0) as two, RankPool(4, 120.0) as four:
        one_process = OneProcess(Path(root))
        for index, case in enumerate(track(chosen, "comparing", console=Console(stderr=True))):
            pool = two if case.ranks == 2 else four
            found, tolerance = compare(case, pool, one_process, Path(root) / f"case-{index}")
            records.append({**described(case), **outcome(found, tolerance)})
    print_table(records)
    agreeing = sum(record["agrees"] for record in records)
    print(f"{agreeing} of {len(records)} runs in parallel train like one process")
    if options.output is not None:
        options.output.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    if agreeing < len(records):
        sys.exit(1)


if __name__ == "__main__":
    main()
