"""Count what a call of `linear_logps` costs a GPU beside its products, without one: syncs, launches, bytes.

    python -m bench.device_counts --as after        counts, and stores them beside what is stored

Dims: `R` rows, `S` sequences, `H` hidden, `V` vocabulary, `C` chunks of rows.
"""

from __future__ import annotations

from pathlib import Path
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.simulated_device import SimulatedDevice, simulated
from fastpref import linear_logps
from fastpref.kernels.triton_common import KernelCall

RESULTS = Path(__file__).parent / "results" / "device_counts.json"
OPEN, CLOSE = "<!-- table: python -m bench.device_counts --into docs/gpu-run.md -->", "<!-- end of table -->"
NUM_SEQUENCES = 16
SHARED_SHARE, OWN_SHARE = 0.08, 0.02
"""Parts of the columns that are active in every chunk of rows, and in one alone (drawn, so some meet)."""


class Call(NamedTuple):
    """What is counted: shapes, plan and what else is asked of `linear_logps`."""

    num_rows: int = 8192
    num_columns: int = 128256
    hidden_size: int = 4096
    backward: str = "active"
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
        columns = self._is_shared_V.nonzero().squeeze(1) if self._is_shared_V.any() else torch.zeros(1, dtype=torch.int64)
        return columns[torch.randint(0, len(columns), (count,), generator=self._generator)]

    def draw(self, shape: torch.Size) -> Tensor:
        """Return masses [V] of one chunk, or [C, V] of several."""
        is_own = torch.rand(shape, generator=self._generator) < OWN_SHARE
        return torch.where(is_own | self._is_shared_V, 1.0, 1e-9)

    def fill(self, call: KernelCall) -> None:
        """Give the sums of column masses their numbers."""
        sums = call.arguments.get("sums_ptr")
        if sums is not None and sums.shape[-1] == self._is_shared_V.shape[0]:
            sums.inner = self.draw(sums.shape)


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
        hidden_TH = device.nothing(num_tokens, call.hidden_size, dtype=torch.bfloat16)
        weight_VH = device.nothing(call.num_columns, call.hidden_size, dtype=torch.bfloat16)
        options: dict[str, Any] = {}
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
            stats=call.stats,
            **options,
        )
        if call.needs_grad:
            result.logps.sum().backward()
    return device
