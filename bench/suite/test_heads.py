"""Every entry of the registry, every pass it has, after the gate.

pytest bench/suite --workload llama3.1-8b-r8192 --benchmark-json heads.json
pytest bench/suite --workload llama3.1-8b-r8192 -k "ours or liger" --benchmark-compare
"""

from functools import cache, partial

import pytest
import torch

from bench.gpu.heads import PRODUCTS, Prepared, passes_of
from bench.gpu.inputs import build_on
from bench.implementations import IMPLEMENTATIONS

pytest.importorskip("pytest_benchmark", reason="pip install pytest-benchmark")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16
ENTRIES = [(name, kind) for name, found in IMPLEMENTATIONS.items() for kind in PRODUCTS if kind in passes_of(found)]


@cache
def prepared(workload: str) -> Prepared:
    """One workload for all entries."""
    return Prepared(build_on(workload, DEVICE, DTYPE))


@cache
def gate(workload: str, name: str) -> str | None:
    """What is wrong with an entry, or None; each is checked once."""
    head, entry = prepared(workload), IMPLEMENTATIONS[name]
    return head.reason(entry, head.errors_of(entry))


@pytest.mark.parametrize(("name", "kind"), ENTRIES)
def test_head(name: str, kind: str, benchmark, request: pytest.FixtureRequest) -> None:
    """Time one pass of one entry; the group is what it is compared within."""
    entry, workload = IMPLEMENTATIONS[name], request.config.getoption("--workload")
    if DEVICE.type not in entry.devices:
        pytest.skip(f"{entry.title} is measured on {' and '.join(entry.devices)}")
    missing = entry.unavailable(DEVICE)
    if missing is not None:
        pytest.skip(f"{entry.title}: {missing}")
    if entry.is_compiled and DEVICE.type == "cpu":
        pytest.skip(f"{entry.title} compiles for longer than a CPU run of it says anything")
    reason = gate(workload, name)
    assert reason is None, reason
    case = prepared(workload).case
    case = entry.given(case, case.weight_VH)
    run = partial(passes_of(entry)[kind], case, case.hidden_SLH, case.weight_VH)
    benchmark.group = f"{workload} {kind}"
    benchmark.extra_info.update(case.shape | {"title": entry.title, "loss": entry.loss})

    def timed() -> None:
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    rounds = 2 if DEVICE.type == "cpu" else 10
    benchmark.pedantic(timed, rounds=rounds, warmup_rounds=1)
