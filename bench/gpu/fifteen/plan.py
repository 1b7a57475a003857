"""The steps of both commands, in order, and the files that they may leave."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.gpu.parts import LARGE, MAIN, OURS, SHARED
from bench.measure import Row

COMMAND_S = 300.0
"""A command may take so long, the start of Python included."""
END_S = 4.0
"""Of them: for the process to end in."""
MOST_FILES, MOST_FILE_BYTES = 8, 16 * 2**20
"""What comes back from the machine."""

SMALL = "llama3.1-8b-r1024"
OTHER_HIDDEN = ("v128256-h2048-r8192", "v262144-h640-r8192")
SHARES = (0.05, 0.10, 0.30)
"""Of the columns that are active."""
PEERS = {
    "naive-rows": 7.0,
    "cce-kernel": 13.0,
    "liger-ce": 13.0,
    "torch-lce": 9.0,
    "trl": 7.0,
}
"""What can be carried, most telling first, and the seconds that are kept for each, compilers included; one that is not
there takes none."""
COMPILED_PEERS = {"megatron-fused": 30.0}
"""PyTorch's compiler takes most of it, so these run on the main head alone."""
HEAVY_PEERS = {"liger-ce-scaled": 12.0, "quack": 12.0}
"""Their compiler is too large to be carried: nothing is kept for them, they run where the machine has it."""
COMPILED_BEFORE = 0.7
"""Of these seconds on the next workload."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One row of results."""

    name: str
    run: str
    """`module:function` below `bench.gpu.fifteen`, which gets the context and `arguments`, and returns the row."""
    reserve_s: float
    """Seconds that are kept for it: it is not begun with less left, and may go on until the later ones' begin."""
    arguments: tuple[Any, ...] = ()
    is_extra: bool = False
    """Nothing is kept for it: it gets what is left at the end, if that is `reserve_s`."""
    files: tuple[str, ...] = ()
    """What it leaves beside the command's own files."""

    def function(self) -> Callable[..., Row]:
        """Return what runs it.

        Raises:
            ImportError, AttributeError: there is no such module or function.
        """
        module, name = self.run.split(":")
        return getattr(importlib.import_module(f"bench.gpu.fifteen.{module}"), name)


def rows_file(command: int) -> str:
    """Return the file of a command's rows, one per step, by name."""
    return f"command-{command}.json"


def summary_file(command: int) -> str:
    """Return the file that says the same to a reader."""
    return f"summary-{command}.md"


def log_file(command: int) -> str:
    """Return the file of what a command's processes have printed."""
    return f"log-{command}.txt"


def _heads(workload: str, seconds: Mapping[str, float], *, is_extra: bool = False) -> Iterator[Step]:
    """A step per implementation; the first one makes the inputs and what is right for them, too."""
    for name, reserve_s in seconds.items():
        step = Step(name=f"{name} on {workload}", run="speed:head", reserve_s=reserve_s, arguments=(workload, name))
        yield replace(step, is_extra=is_extra)


COMMANDS: dict[int, tuple[Step, ...]] = {
    1: (
        Step(name="device", run="tools:device", reserve_s=8),
        Step(name="correct", run="correct:check", reserve_s=24, arguments=(SMALL,)),
        *_heads(LARGE, {"ours-active": 15, "ours-exact": 7, "ours-screened": 7, SHARED: 5, **PEERS}),
        *_heads(MAIN, {"ours-active": 14}),
        *(
            Step(name=f"phases at {share:.0%} active", run="speed:phases", reserve_s=14, arguments=(MAIN, share))
            for share in SHARES
        ),
        *_heads(MAIN, {"ours-exact": 7, **{name: COMPILED_BEFORE * kept for name, kept in PEERS.items()}}),
        *_heads(MAIN, {SHARED: 5, "ours-cached": 5, **COMPILED_PEERS}),
        *(step for workload in OTHER_HIDDEN for step in _heads(workload, {"ours-active": 10})),
        *(step for workload in (MAIN, LARGE) for step in _heads(workload, HEAVY_PEERS, is_extra=True)),
        Step(name="other heads", run="speed:others", reserve_s=10, is_extra=True),
    ),
    2: (
        Step(name="tests", run="tools:tests", reserve_s=110),
        Step(name="tiles", run="tools:tiles", reserve_s=55, arguments=(4096,), files=("tiles.json",)),
        Step(name="ncu", run="tools:ncu", reserve_s=30),
        Step(name="compute-sanitizer", run="tools:sanitizer", reserve_s=75),
        Step(name="training steps", run="tools:training", reserve_s=45, is_extra=True),
        Step(name="other heads", run="speed:others", reserve_s=15, is_extra=True),
    ),
}


def files() -> list[str]:
    """Return the names of everything that both commands leave."""
    own = [file(command) for command in COMMANDS for file in (rows_file, summary_file, log_file)]
    return own + [name for steps in COMMANDS.values() for step in steps for name in step.files]


def allowed_s(steps: Sequence[Step], name: str, left_s: float) -> float:
    """Return how long a step may take that begins with so much left: what earlier ones have saved, and its own."""
    place = [step.name for step in steps].index(name)
    later = sum(step.reserve_s for step in steps[place + 1 :] if not step.is_extra)
    return max(steps[place].reserve_s, left_s - later)


def carried_heads() -> list[tuple[str, str]]:
    """Return (workload, implementation of ours) of all heads that the commands run, in order."""
    small = [(SMALL, name) for name in OURS]
    heads = [step.arguments for steps in COMMANDS.values() for step in steps if step.run == "speed:head"]
    phases = [(MAIN, name) for name in OURS]
    return list(dict.fromkeys([*small, *((w, n) for w, n in heads if n.startswith("ours-")), *phases]))
