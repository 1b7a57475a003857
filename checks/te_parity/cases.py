"""Which runs on Transformer Engine's layers are compared, and with what: what `make parity-te` and tests share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from checks.layout_parity.cases import FORMS, LOSSES, MODELS, Case, OneProcess, cases, twice
from checks.layout_parity.runs import (
    EXPERT_LAYOUTS,
    LAYOUTS,
    STEPS,
    TOLERANCES,
    Difference,
    ShortRun,
    Tolerance,
    difference,
    exported,
    train,
)
from fastpref.testing.workers import RankPool
from fastpref.trainer import LoraConfig

ENGINE: dict[str, Any] = {"transformer_impl": "transformer_engine"}
LOCAL: dict[str, Any] = {"transformer_impl": "local"}
HALF: dict[str, Any] = {"bf16": True}
LAYERS = {"TE": ENGINE, "local": LOCAL}
ONE_RANK: dict[str, tuple[int, dict[str, Any]]] = {"one rank": (1, {})}
ALL_LAYOUTS = {**ONE_RANK, **LAYOUTS, **EXPERT_LAYOUTS}
LORA = LoraConfig(r=4, lora_alpha=16.0)
LORA_LAYOUTS = ("one rank", "TP2", "TP2-SP", "PP2", "CP2", "DP2 overlapped reduce and gather", "TP2-SP x PP2-VPP2")
HALF_EXPERT_LAYOUTS = ("EP2", "EP2 x TP2-SP")
SAVED_STEP = STEPS - 1


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """A run that is cut and continued, in another layout or on other layers, against itself without the cut."""

    before: str
    after: str
    model: str = "dense"
    layers: tuple[str, str] = ("TE", "TE")
    with_lora: bool = False
    is_half: bool = False

    @property
    def is_same(self) -> bool:
        """Whether nothing changes at the cut, so that every bit must stay."""
        return self.before == self.after and self.layers[0] == self.layers[1]

    def described(self) -> dict[str, Any]:
        """What it compares, in the words of a record."""
        sizes = (ALL_LAYOUTS[name][0] for name in (self.before, self.after))
        return {
            "layout": f"{self.before} ({self.layers[0]}), resumed in {self.after} ({self.layers[1]})",
            "ranks": max(sizes),
            "model": f"{self.model}, LoRA" if self.with_lora else self.model,
            "objective": "DPO",
            "rows": "padded",
            "precision": "bf16" if self.is_half else "fp32",
        }


class Ranks:
    """Worker ranks by their number; one rank is this process."""

    def __init__(self, two: RankPool, four: RankPool) -> None:
        self._pools = {2: two, 4: four}

    def train(self, ranks: int, run: ShortRun, directory: Path) -> list[dict[str, float]]:
        """The log of rank 0."""
        if ranks == 1:
            return train(run, str(directory))
        log: list[dict[str, float]] = self._pools[ranks].run(train, run, str(directory))[0]
        return log


def te_cases(lora: LoraConfig) -> Iterator[Case]:
    """Every comparison with one process on Megatron's own layers, those of one rank first.

    Args:
        lora: `perturbed_adapter`.
    """
    for model in MODELS:
        for form in FORMS:
            for loss in LOSSES if model == "dense" else ("DPO",):
                yield Case(layout="one rank", ranks=1, model=model, loss=loss, form=form)
    for model in ("dense", "experts"):
        for form in FORMS:
            yield Case(layout="one rank, bf16", ranks=1, model=model, loss="DPO", form=form, settings=HALF)
    yield from cases()
    for name in LORA_LAYOUTS:
        ranks, settings = ALL_LAYOUTS[name]
        for form in FORMS if ranks == 1 or "context_parallel_size" in settings else ("padded",):
            yield Case(layout=name, ranks=ranks, model="dense", loss="DPO", form=form, settings=settings, lora=lora)
    for name in HALF_EXPERT_LAYOUTS:
        ranks, settings = EXPERT_LAYOUTS[name]
        half = {**settings, **HALF}
        yield Case(layout=f"{name}, bf16", ranks=ranks, model="experts", loss="DPO", form="padded", settings=half)


def resumed_cases() -> Iterator[Resumed]:
    """Every cut run."""
    for name in ("one rank", "DP2 sharded optimizer", "DP2 overlapped reduce and gather", "TP2-SP", "PP2-VPP2", "CP2"):
        yield Resumed(before=name, after=name)
    yield Resumed(before="DP2 sharded optimizer", after="DP2 sharded optimizer", is_half=True)
    yield Resumed(before="EP2", after="EP2", model="experts")
    yield Resumed(before="TP2-SP", after="TP2-SP", with_lora=True)
    yield Resumed(before="TP2-SP", after="PP2-VPP2")
    yield Resumed(before="PP2-VPP2", after="TP2")
    yield Resumed(before="DP2 overlapped reduce and gather", after="one rank")
    yield Resumed(before="TP2-SP x PP2-VPP2", after="DP2")
    yield Resumed(before="TP2-SP", after="PP2-VPP2", model="Gemma 3")
    yield Resumed(before="EP2", after="PP2-VPP2", model="experts")
    yield Resumed(before="EP2 x TP2-SP", after="one rank", model="experts")
    yield Resumed(before="TP2", after="PP2", with_lora=True)
    for layers in (("TE", "local"), ("local", "TE")):
        yield Resumed(before="TP2-SP", after="one rank", layers=layers)
        yield Resumed(before="one rank", after="PP2", layers=layers)
        yield Resumed(before="EP2", after="one rank", model="experts", layers=layers)
        yield Resumed(before="TP2", after="PP2", with_lora=True, layers=layers)
        yield Resumed(before="TP2-SP", after="PP2-VPP2", model="Gemma 3", layers=layers)


def compare_layers(case: Case, ranks: Ranks, one_process: OneProcess, directory: Path) -> tuple[Difference, Tolerance]:
    """Run a case on Transformer Engine's layers: how far it is from Megatron's in one process, and how far it may be.

    In 16 bits the error, measured against fp32, may be twice that of Megatron's layers in one
    process or in the same layout: one run is one draw of the rounding errors.

    Raises:
        AssertionError: the two did not start from the same bits, log the same metrics or export the same tensors.
    """
    exact, exact_dir = one_process(case.run(LOCAL))
    log = ranks.train(case.ranks, case.run({**case.settings, **ENGINE}), directory)
    start_dir, tolerance = exact_dir, TOLERANCES[torch.float32]
    if case.is_half:
        start_dir = directory / "local"
        own = ranks.train(case.ranks, case.run({**case.settings, **LOCAL}), start_dir)
        alone, alone_dir = one_process(case.run({**LOCAL, **HALF}))
        own_errors = difference(own, exact, start_dir, exact_dir), difference(alone, exact, alone_dir, exact_dir)
        tolerance = Tolerance(*map(max, *map(twice, own_errors)))
    assert_same_bits(exported(directory / "start"), exported(start_dir / "start"))
    return difference(log, exact, directory, exact_dir), tolerance


def compare_resumed(case: Resumed, ranks: Ranks, lora: LoraConfig, directory: Path) -> tuple[Difference, Tolerance]:
    """Run a cut run: how far its steps after the cut and its end are from those without it, and how far they may be.

    Raises:
        AssertionError: the two did not log the same metrics or export the same tensors.
    """
    (size, settings), (size_after, settings_after) = ALL_LAYOUTS[case.before], ALL_LAYOUTS[case.after]
    before, after = LAYERS[case.layers[0]], LAYERS[case.layers[1]]
    common = {"use_distributed_optimizer": settings.get("use_distributed_optimizer", False), "bf16": case.is_half}
    whole = ShortRun(
        loss=LOSSES["DPO"],
        policy=MODELS[case.model],
        lora=lora if case.with_lora else None,
        settings={**settings, **common, **before, "save_steps": SAVED_STEP},
    )
    checkpoint = str(directory / "whole" / "checkpoints" / f"step-{SAVED_STEP}")
    again = replace(whole, settings={**settings_after, **common, **after, "resume_from_checkpoint": checkpoint})
    expected = ranks.train(size, whole, directory / "whole")[SAVED_STEP:]
    log = ranks.train(size_after, again, directory / "again")
    found = difference(log, expected, directory / "again", directory / "whole")
    return found, Tolerance(metric=0.0, update=0.0) if case.is_same else TOLERANCES[torch.float32]


def assert_same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Raises AssertionError unless two exports hold the same tensors."""
    assert set(ours) == set(theirs), set(ours) ^ set(theirs)
    different = [name for name, tensor in theirs.items() if not torch.equal(ours[name], tensor)]
    assert not different, f"exports differ before training: {different}"


def perturbed_adapter(directory: Path) -> LoraConfig:
    """Adapters for the dense model whose B is not zero, so that all gradients are full-sized from the first step."""
    run = ShortRun(loss=LOSSES["DPO"], policy=MODELS["dense"], settings=LOCAL, lora=LORA)
    train(run, str(directory))
    generator = torch.Generator().manual_seed(1)
    adapter = directory / "start"
    tensors = {
        name: tensor.normal_(std=0.1, generator=generator) if "lora_B" in name else tensor
        for name, tensor in sorted(exported(adapter).items())
    }
    save_file(tensors, adapter / "adapter_model.safetensors")
    return replace(LORA, path=str(adapter))
