"""Which runs are compared with one process, and how: what `make parity` and `make parity-te` share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch

from checks.layout_parity.runs import (
    EXPERT_LAYOUTS,
    EXPERTS,
    GEMMA,
    LAYOUTS,
    MODEL,
    TOLERANCES,
    WINDOWED,
    Difference,
    ShortRun,
    Tolerance,
    difference,
    train,
)
from fastpref.losses import DPOConfig
from fastpref.testing.workers import RankPool
from fastpref.trainer import LoraConfig

LOSSES = {"DPO": DPOConfig(), "ORPO": DPOConfig(pref_loss="orpo")}
FORMS: dict[str, dict[str, Any]] = {
    "padded": {},
    "packed": {"packing": True},
    "packed, shared": {"packing": True, "prefix_sharing": True},
}
MODELS = {
    "dense": MODEL,
    "tied": {**MODEL, "tie_word_embeddings": True},
    "windowed": WINDOWED,
    "Gemma 3": GEMMA,
    "experts": EXPERTS,
}
# What every model but the dense one is tried in, beside the layouts of experts.
MODEL_LAYOUTS = ("TP2-SP", "PP2-VPP2", "CP2", "DP2 overlapped reduce and gather", "TP2-SP x PP2-VPP2")
BF16_LAYOUTS = ("TP2", "TP2-SP", "PP2", "PP2-VPP2", "CP2", "DP2 overlapped reduce and gather")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison."""

    layout: str
    ranks: int
    model: str
    loss: str
    form: str
    settings: dict[str, Any] = field(default_factory=dict)
    lora: LoraConfig | None = None

    @property
    def is_half(self) -> bool:
        """Whether it is of 16 bits."""
        return bool(self.settings.get("bf16", False))

    def run(self, settings: dict[str, Any]) -> ShortRun:
        """The run with `settings` beside what the form asks for."""
        settings = {**FORMS[self.form], **settings}
        return ShortRun(loss=LOSSES[self.loss], policy=MODELS[self.model], settings=settings, lora=self.lora)


def cases() -> Iterator[Case]:
    """Every comparison, those of two ranks first."""
    for ranks in (2, 4):
        for name, (size, settings) in LAYOUTS.items():
            if size != ranks:
                continue
            for form in FORMS:
                for loss in LOSSES:
                    yield Case(layout=name, ranks=size, model="dense", loss=loss, form=form, settings=settings)
            for model in ("tied", "windowed", "Gemma 3") if name in MODEL_LAYOUTS else ():
                for form in forms_of(settings):
                    yield Case(layout=name, ranks=size, model=model, loss="DPO", form=form, settings=settings)
            if name in BF16_LAYOUTS:
                half = {**settings, "bf16": True}
                yield Case(layout=f"{name}, bf16", ranks=size, model="dense", loss="DPO", form="padded", settings=half)
        for name, (size, settings) in EXPERT_LAYOUTS.items():
            for form in forms_of(settings) if size == ranks else ():
                yield Case(layout=name, ranks=size, model="experts", loss="DPO", form=form, settings=settings)


def forms_of(settings: dict[str, Any]) -> Iterable[str]:
    """Rows that models other than the dense one are tried on: all of them where ranks cut rows in mid-sequence."""
    return FORMS if "context_parallel_size" in settings else ("padded",)


class OneProcess:
    """The runs that layouts are compared with, each made once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._done: dict[str, tuple[list[dict[str, float]], Path]] = {}

    def __call__(self, run: ShortRun) -> tuple[list[dict[str, float]], Path]:
        """Log and directory of `run` in this process."""
        if repr(run) not in self._done:
            directory = Path(mkdtemp(dir=self.root))
            self._done[repr(run)] = train(run, str(directory)), directory
        return self._done[repr(run)]


def compare(case: Case, pool: RankPool, one_process: OneProcess, directory: Path) -> tuple[Difference, Tolerance]:
    """Run a case on the pool's ranks: how far it is from one process, and how far it may be."""
    expected, expected_dir = one_process(case.run({"bf16": True} if case.is_half else {}))
    log = pool.run(train, case.run(case.settings), str(directory))[0]
    tolerance = TOLERANCES[torch.float32]
    if case.is_half:
        exact, exact_dir = one_process(case.run({}))
        tolerance = twice(difference(expected, exact, expected_dir, exact_dir))
    return difference(log, expected, directory, expected_dir), tolerance


def twice(own: Difference) -> Tolerance:
    """What the numeric rule allows where rounding to 16 bits alone makes this difference."""
    return Tolerance(metric=2 * max(own.loss, own.grad_norm, own.metrics), update=2 * own.updates)
