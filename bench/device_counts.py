"""Count what a call of `linear_logps` costs a GPU beside its products, without one: syncs, launches, bytes.

    python -m bench.device_counts                           counts today's code, and stores it beside `before`
    python -m bench.device_counts --into docs/gpu-run.md    put the stored table between the marks of this page

Dims: `R` rows, `S` sequences, `H` hidden, `V` vocabulary, `C` chunks of rows.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.pages import replace_in
from bench.simulated_device import SimulatedDevice, simulated
from fastpref import linear_logps, screen_weight
from fastpref.kernels.screened import SAMPLED
from fastpref.kernels.triton_common import KernelCall

RESULTS = Path(__file__).parent / "results" / "device_counts.json"
OPEN = "<!-- table: python -m bench.device_counts --into docs/gpu-run.md -->"
NUM_SEQUENCES = 16
SHARED_SHARE, OWN_SHARE = 0.08, 0.02
"""Parts of the columns that are active in every chunk of rows, and in one alone (drawn, so some meet)."""


class Call(NamedTuple):
    """What is counted: shapes, plan and what else is asked of `linear_logps`.

    A screened pass looks at its operands, so these have numbers then; keep them small.
    """

    num_rows: int = 8192
    num_columns: int = 128256
    hidden_size: int = 4096
    backward: str = "active"
    forward: str = "exact"
    has_screened: bool = False
    stats: tuple[str, ...] = ()
    needs_grad: bool = True
    device_rows: bool = False
    is_capturing: bool = False
    has_main_grad: bool = False
    has_weight_sum: bool = False


class Masses:
    """Column masses of one chunk of rows after another: heavy for the active columns, next to nothing for others."""

    def __init__(self, num_columns: int) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._is_shared_V = torch.rand(num_columns, generator=self._generator) < SHARED_SHARE

    def labels(self, count: int) -> Tensor:
        """Draw labels, which are columns that every chunk needs."""
        columns = (
            self._is_shared_V.nonzero().squeeze(1) if self._is_shared_V.any() else torch.zeros(1, dtype=torch.int64)
        )
        return columns[torch.randint(0, len(columns), (count,), generator=self._generator)]

    def draw(self, shape: torch.Size) -> Tensor:
        """Return masses [V] of one chunk, or [C, V] of several; where they are fewer, of columns at even distances."""
        step = self._is_shared_V.shape[0] // shape[-1]
        is_shared = self._is_shared_V[::step][: shape[-1]]
        is_own = torch.rand(shape, generator=self._generator) < OWN_SHARE
        return torch.where(is_own | is_shared, 1.0, 1e-9)

    def fill(self, call: KernelCall) -> None:
        """Give the sums of column masses their numbers, also of a sample; and the log-sum-exp of every row."""
        sums, merged = call.arguments.get("sums_ptr"), call.arguments.get("merged_ptr")
        num_columns = self._is_shared_V.shape[0]
        if sums is not None and sums.shape[-1] in (num_columns, min(num_columns, SAMPLED)):
            sums.inner = self.draw(sums.shape)
        if merged is not None and merged.inner.device.type == "cpu":
            merged.inner.fill_(1.0)
        if "scales_ptr" in call.arguments:  # of rows that are turned into int8
            call.arguments["scales_ptr"].inner.fill_(1.0)
            call.arguments["values_ptr"].inner.zero_()


def count(call: Call, on_kernel: Callable[[KernelCall], None] = lambda _: None) -> SimulatedDevice:
    """Run forward and, with a gradient, backward; return the device with its events.

    `on_kernel` is called with every Triton kernel.
    """
    masses = Masses(call.num_columns)

    def run(kernel: KernelCall) -> None:
        masses.fill(kernel)
        on_kernel(kernel)

    device = SimulatedDevice(run)
    device.num_columns = call.num_columns
    num_tokens = call.num_rows * 2
    labels_T = masses.labels(num_tokens)
    rows = torch.arange(call.num_rows, dtype=torch.int64, device="cpu") * 2
    cu_rows = torch.linspace(0, call.num_rows, NUM_SEQUENCES + 1).long()
    with simulated(device, is_capturing=call.is_capturing):
        hidden_TH, weight_VH = (
            _operand(device, size, call.hidden_size, has_numbers=call.forward == "screened")
            for size in (num_tokens, call.num_columns)
        )
        options: dict[str, Any] = {}
        if call.has_screened:
            options["screened"] = screen_weight(weight_VH)
            device.events.clear()
        if call.has_main_grad:
            options["main_grad"] = device.nothing(call.num_columns, call.hidden_size, dtype=torch.float32)
        if call.has_weight_sum:
            options["weight_sum"] = device.nothing(call.hidden_size, dtype=torch.float32)
        if call.device_rows:
            rows, cu_rows = device.put(rows), device.put(cu_rows)
        for leaf in (hidden_TH, weight_VH):
            leaf.requires_grad_(call.needs_grad)
        result = linear_logps(
            hidden_TH,
            weight_VH,
            device.put(labels_T),
            rows=rows,
            cu_rows=cu_rows,
            backward=call.backward,
            forward=call.forward,
            stats=call.stats,
            **options,
        )
        if call.needs_grad:
            result.logps.sum().backward()
    return device


def _operand(device: SimulatedDevice, count: int, hidden_size: int, *, has_numbers: bool) -> Tensor:
    if not has_numbers:
        return device.nothing(count, hidden_size, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(count)
    values = torch.randn(count, hidden_size, generator=generator, dtype=torch.float32, device="cpu")
    return device.put(values.bfloat16())


CASES = {
    "scoring, no gradient": Call(needs_grad=False),
    "exact, recomputed": Call(backward="recompute"),
    "active": Call(),
    "active, 16384 rows": Call(num_rows=16384),
    "active, 1024 rows": Call(num_rows=1024),
    "active, as the trainer calls it": Call(
        has_main_grad=True, has_weight_sum=True, stats=("active_fraction", "cold_mass")
    ),
}
"""What is stored, by name; R = 8192, V = 128256, H = 4096, bf16, rows on the host where nothing else is said."""


def measure(name: str, *, is_old: bool) -> dict[str, Any]:
    """Count one case; `is_old`: by code that takes no `weight_sum`."""
    call = CASES[name]
    device = count(call._replace(has_weight_sum=False) if is_old else call)
    phases = ("api", "forward", "backward")
    return {
        "case": name,
        "syncs": device.count("sync"),
        "launches": {phase: device.count("launch", phase) for phase in phases},
        "bytes": {phase: device.num_bytes(False, phase) for phase in phases},
        "product_bytes": device.num_bytes(True),
    }


def table(stored: dict[str, Any]) -> str:
    """Markdown of what is stored: before and after side by side."""
    lines = [
        "| call | syncs | launches of the operators | launches around them | GB beside the products |",
        "|---|---|---|---|---|",
    ]
    before = {line["case"]: line for line in stored["before"]["lines"]}
    for after in stored["after"]["lines"]:
        pair = [before[after["case"]], after]
        cells = [
            [str(line["syncs"]) for line in pair],
            [str(line["launches"]["forward"] + line["launches"]["backward"]) for line in pair],
            [str(line["launches"]["api"]) for line in pair],
            [f"{sum(line['bytes'].values()) / 1e9:.1f}" for line in pair],
        ]
        lines.append(f"| {after['case']} | " + " | ".join(" -> ".join(cell) for cell in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Count, print and store; or write the table of what is stored."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--as", dest="name", choices=("before", "after"), default="after", help="under which name")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where they are stored")
    parser.add_argument("--into", type=Path, help="count nothing; put the stored table between the marks of this page")
    options = parser.parse_args()
    stored = json.loads(options.out.read_text()) if options.out.exists() else {}
    if options.into is not None:
        if missing := {"before", "after"} - stored.keys():
            parser.error(f"{options.out} has no counts {' and '.join(sorted(missing))}; make them with --as NAME first")
        replace_in(options.into, table(stored), OPEN)
        return
    lines = [measure(name, is_old=options.name == "before") for name in CASES]
    for line in lines:
        print(line, flush=True)
    stored[options.name] = {"torch": torch.__version__, "lines": lines}
    stored = {"benchmark": "device_counts", **{key: stored[key] for key in ("before", "after") if key in stored}}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
