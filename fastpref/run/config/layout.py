"""What a parallel layout must keep: which sizes divide what, each rule with the nearest values that would fit.

The check of a run file, the construction of a model and the creation of Megatron's process groups ask the same
functions. Nothing here needs a process group, weights or Megatron.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastpref.errors import Problem

if TYPE_CHECKING:
    from fastpref.run.architecture.architecture import Architecture

# Field of `ParallelLayout` -> field of `TrainingArguments`, which messages name.
ARGUMENT_NAMES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
}


@dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """How the ranks share a model; data parallelism takes what is left of them."""

    tp: int = 1
    """Tensor-parallel ranks."""
    pp: int = 1
    """Pipeline stages."""
    vpp: int | None = None
    """Model chunks on each stage (interleaved schedule); None for one."""
    cp: int = 1
    """Context-parallel ranks, which share every row."""
    ep: int = 1
    """Expert-parallel ranks, taken from all ranks of a stage; each holds whole experts."""
    sequence_parallel: bool = False
    """Norms and residuals are split along the sequence over the tensor-parallel ranks."""

    @property
    def num_chunks(self) -> int:
        """Parts that the layers are cut into, over all stages."""
        return self.pp * (self.vpp or 1)

    @property
    def row_ranks(self) -> int:
        """Ranks that work on the same rows: tp * pp * cp."""
        return self.tp * self.pp * self.cp

    @property
    def row_multiple(self) -> int:
        """What the length of every row is filled up to a multiple of, so that its ranks can share it."""
        return self.tp if self.cp == 1 else 2 * self.cp * self.tp

    @property
    def fewest_ranks(self) -> int:
        """Smallest number of ranks that the layout fits."""
        return math.lcm(self.row_ranks, self.pp * self.ep)

    @property
    def expert_tp(self) -> int:
        """Ranks that share one expert: experts that are shared out whole are not split."""
        return self.tp if self.ep == 1 else 1

    def expert_copies(self, world_size: int) -> int:
        """Copies of an expert among `world_size` ranks."""
        return world_size // (self.pp * self.ep * self.expert_tp)

    def data_parallel_size(self, world_size: int) -> int:
        """Copies of the model among `world_size` ranks that work on different pairs."""
        return world_size // self.row_ranks


def size_problems(layout: ParallelLayout) -> Iterator[Problem]:
    """Yield what is wrong with the sizes by themselves."""
    for field, name in ARGUMENT_NAMES.items():
        size = getattr(layout, field)
        if size is not None and size < 1:
            yield Problem(name, f"must be >= 1, got {size}")
    if layout.sequence_parallel and layout.tp == 1:
        tp = ARGUMENT_NAMES["tp"]
        yield Problem("sequence_parallel", f"needs {tp} >= 2, got 1; raise it or leave sequence_parallel out", (tp,))
    if layout.vpp is not None and layout.pp == 1:
        vpp, pp = ARGUMENT_NAMES["vpp"], ARGUMENT_NAMES["pp"]
        yield Problem(vpp, f"{layout.vpp} needs {pp} >= 2, got 1; raise it or leave {vpp} out", (pp,))


def world_problems(layout: ParallelLayout, world_size: int) -> Iterator[Problem]:
    """Yield why `world_size` ranks cannot take the layout."""
    for fields in (("tp", "pp", "cp"), ("pp", "ep")):
        sizes = {ARGUMENT_NAMES[field]: getattr(layout, field) for field in fields if getattr(layout, field) > 1}
        if world_size % math.prod(sizes.values()):
            fitting = _nearest(world_size, lambda ranks: ranks % layout.fewest_ranks == 0)
            first, *others = sizes
            yield Problem(
                first,
                f"{''.join(f'* {name} ' for name in others)}= {' * '.join(map(str, sizes.values()))} must divide the "
                f"number of ranks, got {world_size}; start {fitting} (torchrun --nproc-per-node) or lower a size",
                tuple(others),
            )
            return


def model_problems(layout: ParallelLayout, arch: Architecture) -> Iterator[Problem]:
    """Yield why the model cannot be cut as the layout says."""
    rules: list[tuple[str, Callable[[int], bool]]] = [
        (f"divide num_attention_heads {arch.num_heads}", lambda tp: arch.num_heads % tp == 0),
        (f"divide intermediate_size {arch.ffn_hidden_size}", lambda tp: arch.ffn_hidden_size % tp == 0),
        (
            f"divide num_key_value_heads {arch.num_query_groups} or be a multiple of it",
            lambda tp: arch.num_query_groups % tp == 0 or tp % arch.num_query_groups == 0,
        ),
    ]
    if arch.experts is not None and layout.ep == 1:
        width = arch.experts.ffn_hidden_size
        rules.append((f"divide an expert's width {width}", lambda tp: width % tp == 0))
    broken = [text for text, holds in rules if not holds(layout.tp)]
    if broken:
        fitting = _nearest(layout.tp, lambda tp: all(holds(tp) for _, holds in rules), arch.num_heads)
        text = f"must {' and '.join(broken)}, got {layout.tp}; nearest valid: {fitting}"
        yield Problem(ARGUMENT_NAMES["tp"], text)
    if layout.num_chunks > arch.num_layers:
        pp, vpp = ARGUMENT_NAMES["pp"], ARGUMENT_NAMES["vpp"]
        times, sizes = ("", layout.pp) if layout.vpp is None else (f"* {vpp} ", f"{layout.pp} * {layout.vpp}")
        fitting_pp = max(1, arch.num_layers // (layout.vpp or 1))
        yield Problem(
            pp,
            f"{times}must not exceed num_hidden_layers {arch.num_layers}, got {sizes}; "
            f"nearest valid: {pp} {fitting_pp}",
            (vpp,),
        )
    yield from _expert_problems(layout, arch)


def _expert_problems(layout: ParallelLayout, arch: Architecture) -> Iterator[Problem]:
    experts, ep = arch.experts, ARGUMENT_NAMES["ep"]
    if experts is None:
        if layout.ep > 1:
            yield Problem(ep, f"must be 1 for {arch.model_type}, which has no experts, got {layout.ep}")
        return
    if experts.num_experts % layout.ep:
        fitting = _nearest(layout.ep, lambda ep: experts.num_experts % ep == 0, experts.num_experts)
        yield Problem(
            ep,
            f"must divide the model's number of experts {experts.num_experts}, got {layout.ep}; nearest valid: "
            f"{fitting}",
        )
    if layout.tp > 1 and not layout.sequence_parallel:
        yield Problem(
            ARGUMENT_NAMES["tp"],
            f"{layout.tp} needs sequence_parallel for a model with experts, or every rank would send every token; set "
            "sequence_parallel: true",
            ("sequence_parallel",),
        )


def schedule_problems(layout: ParallelLayout, gradient_accumulation_steps: int) -> Iterator[Problem]:
    """Yield why the pipeline schedule cannot run a step of so many microbatches."""
    if layout.vpp is not None and gradient_accumulation_steps % layout.pp:
        fitting = _nearest(gradient_accumulation_steps, lambda steps: steps % layout.pp == 0)
        pp, vpp = ARGUMENT_NAMES["pp"], ARGUMENT_NAMES["vpp"]
        yield Problem(
            "gradient_accumulation_steps",
            f"must be a multiple of {pp} {layout.pp} with {vpp} {layout.vpp} (the interleaved schedule runs "
            f"microbatches in groups), got {gradient_accumulation_steps}; nearest valid: {fitting}",
            (pp, vpp),
        )


def _nearest(value: int, fits: Callable[[int], bool], largest: int | None = None) -> str:
    """Name the closest fitting values below and above `value`; a value above need not exist, 1 is always tried."""
    below = next((number for number in range(value - 1, 0, -1) if fits(number)), None)
    stop = 2 * value + 10_000 if largest is None else largest + 1
    above = next((number for number in range(value + 1, stop) if fits(number)), None)
    return " or ".join(str(number) for number in (below, above) if number is not None)
