"""What each part measures, in which order: the most valuable first."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cache, partial
from itertools import groupby
from pathlib import Path

import torch

from bench.gpu import heads, inputs, sanity
from bench.gpu.folder import Folder
from bench.implementations import IMPLEMENTATIONS, names_on
from bench.measure import Row

DTYPE = torch.bfloat16
MAIN = "llama3.1-8b-r8192"
LARGE = "v262144-h4096-r8192"
"""The main workload with twice the vocabulary, where leaving columns out gains most."""
OURS = ("ours-exact", "ours-active", "ours-cached", "ours-screened")
SHARED = "ours-screened-shared"
"""The last one again, with the int8 form of the weight made before."""
PEERS = (
    *("naive-rows", "liger-ce-scaled", "quack", "torch-lce", "cce-kernel", "trl", "liger-ce", "liger-ce-sm90"),
    *("liger", "verl", "megatron-fused", "naive-compiled", "liger-ce-tp", "megatron-linear"),
    *("megatron", "liger-orpo", "naive-pairs"),
)
FEW = ("ours-active", "ours-exact", "naive-rows", "liger-ce-scaled", "quack", "torch-lce", "cce-kernel", "liger-ce")
OTHER_MODELS = ("qwen3-8b-r8192", "gemma3-4b-r8192", "gemma3-270m-r8192", "smollm2-135m-r8192")
OTHER_ROWS = ("llama3.1-8b-r4096", "llama3.1-8b-r16384")
VOCAB_SWEEP = tuple(f"v{2**power}-h2048-r4096" for power in range(15, 20))
SHARE_SWEEP = tuple(f"llama3.1-8b-r{16384 * percent // 100}-f{percent}" for percent in (10, 25, 50, 75, 100))
"""The same 16384 positions."""
REAL = ("gemma3-270m-real", "smollm2-135m-real")
MEASURED_MODELS = {"gemma3-270m": 1576, "smollm2-135m": 1614}
"""Rows on which the active columns of real activations were counted."""
DRY_WORKLOADS = ("v130-h32-r16",)
DRY_NAMES = (*OURS, SHARED, "naive-rows", "naive-pairs")
RESERVE_S, RESERVE_COMPILED_S, RESERVE_STEPS_S = 12.0, 40.0, 45.0
"""A row is not begun with less time left; the second for what compiles first."""


@dataclass(frozen=True)
class Session:
    """How the parts run: on a GPU in earnest, or dry."""

    is_dry: bool

    @property
    def device(self) -> torch.device:
        """Where everything is measured."""
        return torch.device("cpu" if self.is_dry else "cuda")

    @property
    def backend(self) -> str:
        """What `linear_logps` runs on: the Triton kernels, in a dry run through the interpreter."""
        return "triton" if self.is_dry else "auto"

    @property
    def repeats(self) -> int:
        """Timed turns of a row."""
        return 1 if self.is_dry else heads.REPEATS

    @property
    def step_repeats(self) -> int:
        """Timed training steps of a setting."""
        return 1 if self.is_dry else 3

    def reserve(self, seconds: float) -> float:
        """Seconds that must be left to begin a row; none in a dry run."""
        return 0.0 if self.is_dry else seconds


def head_jobs(is_dry: bool) -> list[tuple[str, str]]:
    """(workload, implementation) of part 2, in order, each once."""
    if is_dry:
        return [(workload, name) for workload in DRY_WORKLOADS for name in DRY_NAMES]
    tiers = [
        ((MAIN, LARGE), (*OURS, SHARED)),
        (OTHER_MODELS, OURS),
        ((MAIN,), PEERS),
        ((LARGE,), FEW),
        (OTHER_ROWS, FEW),
        (REAL, FEW),
        (OTHER_MODELS, FEW),
        (VOCAB_SWEEP, FEW),
        (SHARE_SWEEP, FEW),
    ]
    jobs = [(workload, name) for workloads, names in tiers for workload in workloads for name in names]
    assert {name for _, name in jobs} == set(names_on("cuda")), "an implementation is never measured"
    return list(dict.fromkeys(jobs))


def run_sanity(folder: Folder, session: Session) -> None:
    """Part 1."""
    for name, run in sanity.jobs(folder.path, session.device, folder.left).items():
        folder.measure("sanity.json", name, session.reserve(RESERVE_S), run)


def run_heads(folder: Folder, session: Session) -> None:
    """Part 2: rows of heads, and whether drawn activations are like real ones."""
    for workload, group in groupby(head_jobs(session.is_dry), key=lambda job: job[0]):
        _run_workload(folder, session, workload, [name for _, name in group])
    for model, num_rows in () if session.is_dry else MEASURED_MODELS.items():
        run = partial(inputs.compare_activity, model, num_rows, session.device, DTYPE, session.backend)
        folder.measure("activity.json", model, RESERVE_S, run)


def _run_workload(folder: Folder, session: Session, workload: str, names: list[str]) -> None:
    """Rows of one workload, which is made for the first of them that is not there."""

    @cache
    def prepared() -> heads.Prepared:
        return heads.Prepared(inputs.build_on(workload, session.device, DTYPE, session.backend))

    def row(name: str) -> Row:
        try:
            return heads.measure(prepared(), name, session.repeats)
        except FileNotFoundError as error:
            return {"status": "missing", "reason": str(error)}

    for name in names:
        seconds = RESERVE_COMPILED_S if IMPLEMENTATIONS[name].is_compiled else RESERVE_S
        folder.measure(f"head-{workload}.json", name, session.reserve(seconds), partial(row, name))


def run_steps(folder: Folder, session: Session) -> None:
    """Part 3."""
    if importlib.util.find_spec("megatron") is None:
        missing = {"status": "missing", "reason": 'not installed: pip install "fastpref[megatron]"'}
        folder.measure("steps.json", "all", 0.0, lambda: missing)
        return
    from bench.gpu import steps

    with ExitStack() as scope:

        @cache
        def bench() -> steps.Steps:
            scratch = Path(scope.enter_context(tempfile.TemporaryDirectory()))
            return scope.enter_context(closing(steps.Steps(steps.DRY if session.is_dry else steps.FULL, scratch)))

        for name in steps.SETTINGS:
            run = partial(lambda name: bench().measure(name, session.step_repeats), name)
            folder.measure("steps.json", name, session.reserve(RESERVE_STEPS_S), run)


PARTS = {1: run_sanity, 2: run_heads, 3: run_steps}
TITLES = {1: "sanity", 2: "heads", 3: "training steps"}
BUDGETS_S = {1: 480.0, 2: 540.0, 3: 420.0}
"""24 minutes together; none above the 9 that a part may take."""
ROW_LIMITS_S = {1: 260.0, 2: 150.0, 3: 200.0}
"""A row that takes longer, compilers included, is taken to hang."""


def unmeasured(folder: Folder, is_dry: bool) -> Iterator[tuple[str, str]]:
    """Yield (workload, implementation) of part 2 that has no row."""
    for workload, name in head_jobs(is_dry):
        if name not in folder.rows(f"head-{workload}.json"):
            yield workload, name
