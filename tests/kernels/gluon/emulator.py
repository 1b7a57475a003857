"""Runs the very source of the GPU kernels on the CPU: their Python, with PyTorch in the place of the GPU's language.

Triton's interpreter knows neither Gluon's warpgroups nor their barriers. Here each function that a kernel gives to
`warp_specialize` is a thread; one runs at a time, and a seed decides which goes on after every barrier, copy and
product. Copies land late: until then, and after a buffer was loaded anew, it holds NaN. Products read their operands at
the latest moment, when somebody waits for them. `edits` change the source, to see that a planted error is found.

What is not emulated: rounding inside of tensor cores, registers, and memory that two threads see in different order.
"""

import functools
import inspect
import math
import random
import textwrap
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import CodeType, SimpleNamespace
from typing import Any

import torch
import triton.language as tl
from emulated_values import Block, Descriptor, Pointer, block, exclusive_or, fmax, largest, load, store

from fastpref.kernels import (
    gluon_forward,
    triton_backward,
    triton_common,
    triton_exponentials,
    triton_forward,
    triton_parts,
)
from fastpref.kernels.tiles import Tile
from fastpref.kernels.triton_common import KernelCall

MODULES = (triton_common, triton_exponentials, triton_parts, triton_forward, triton_backward, gluon_forward)
GLUON, TRITON = "linear_logps_kernel", "_linear_logps_fwd_kernel"
# Small tiles, so that a few rows and columns cross many; a half has the 16 rows of a matrix instruction.
TILE = Tile(rows=32, columns=64, hidden=16, group_rows=2, slices=4, warps=8, stages=3, kernel="gluon")
DTYPES = ("float32", "float64", "int32", "int64", "bfloat16", "float16")


FUNCTIONS = {
    name: function.fn
    for module in MODULES
    for name, function in vars(module).items()
    if hasattr(function, "fn") and function.fn.__module__ == module.__name__
}


@functools.cache
def _compiled(function: Any, edit: tuple[str, str] | None) -> CodeType:
    source = textwrap.dedent(inspect.getsource(function))
    source = source[source.index("def ") :]
    if edit is not None:
        if edit[0] not in source:  # no AssertionError: tests of planted errors expect one
            raise LookupError(f"{edit[0]!r} is not in {function.__name__}")
        source = source.replace(*edit)
    return compile("from __future__ import annotations\n" + source, f"<{function.__name__}>", "exec")


class Deadlock(AssertionError):
    """Nobody can go on."""


@dataclass
class Shared:
    """A ring of buffers, or of barriers."""

    name: str
    shape: list[int]
    values: torch.Tensor

    def index(self, slot: Any) -> "Slot":
        assert 0 <= int(slot) < self.shape[0]
        return Slot(self, int(slot))


@dataclass(frozen=True)
class Slot:
    ring: Shared
    slot: int

    @property
    def name(self) -> tuple[str, int]:
        return self.ring.name, self.slot

    def permute(self, order: tuple[int, int]) -> "Slot":
        assert order == (1, 0)
        return self


@dataclass
class Accumulator:
    """A sum with products that are still running, oldest first."""

    values: torch.Tensor
    running: list[tuple[Slot, Slot, bool]] = field(default_factory=list)
    """Their operands, and whether they add to the sum or replace it."""


@dataclass(frozen=True)
class Event:
    """One thing that a thread does to what it shares with others."""

    kind: str
    """wait, expect, copy, arrive; multiply (buffers are read from here on) or retire (they are no longer)."""
    names: tuple[tuple[str, int], ...]
    """Rings and slots: of the barrier; of the barrier and the buffer; or of both buffers."""
    number: int = 0
    """Parity of a wait, bytes of a copy or an expectation."""
    action: Callable[[], None] = field(default=lambda: None, compare=False, repr=False)
    """What happens once it is its turn."""


@dataclass
class Barrier:
    count: int
    pending: int
    bytes: int = 0
    phase: int = 0

    def change(self, arrivals: int, count: int) -> None:
        self.pending -= arrivals
        self.bytes += count
        assert self.pending >= 0
        if not self.pending and not self.bytes:
            self.phase, self.pending = self.phase + 1, self.count


class Program:
    """One program of a grid, while its source runs."""

    def __init__(self, number: int, grid: int, seed: int | None, edits: dict[str, tuple[str, str]] | None) -> None:
        self.number, self.grid = number, grid
        self.seed = seed
        """None = threads run one after the other, and only what they do is recorded."""
        self.barriers: dict[tuple[str, int], Barrier] = {}
        self.copies: list[Event] = []
        self.threads: list[Thread] = []
        self.num_rings = 0
        self.globals = self._language()
        edits = edits or {}
        for name, function in FUNCTIONS.items():
            exec(_compiled(function, edits.get(name)), self.globals)
        if not set(edits) <= set(FUNCTIONS):
            raise LookupError(f"no such function: {sorted(set(edits) - set(FUNCTIONS))}")

    def _language(self) -> dict[str, Any]:
        """The names that kernels use."""
        constants = {
            name: value.value
            for module in MODULES
            for name, value in vars(module).items()
            if isinstance(value, tl.constexpr)
        }
        language = SimpleNamespace(
            **{name: getattr(torch, name) for name in DTYPES},
            constexpr=None,
            program_id=lambda axis: block(self.number),
            num_programs=lambda axis: self.grid,
            static_range=range,
            range=lambda *bounds, **_: self._range(*bounds),
            cdiv=lambda number, size: (number + size - 1) // size,
            arange=lambda low, high, layout=None: block(torch.arange(low, high, dtype=torch.int32)),
            zeros=lambda shape, dtype, layout=None: block(torch.zeros(tuple(shape), dtype=dtype)),
            full=lambda shape, value, dtype, layout=None: block(torch.full(tuple(shape), value, dtype=dtype)),
            load=load,
            store=store,
            where=torch.where,
            max=largest,
            sum=lambda values, axis: values.sum(dim=axis),
            maximum=fmax,
            minimum=lambda left, right: torch.fmin(left, torch.as_tensor(right, dtype=left.dtype)),
            exp2=torch.exp2,
            floor=torch.floor,
            ceil=torch.ceil,
            abs=torch.abs,
            # Exact in fp64, and then rounded once; Triton takes constants as fp32.
            fma=lambda a, b, c: (a.double() * torch.as_tensor(b, dtype=torch.float32).double() + c).float(),
            div_rn=torch.div,
            join=lambda left, right: torch.stack((left, right), dim=-1),
            xor_sum=exclusive_or,
            dot=lambda a, b, acc, input_precision, out_dtype: acc + (a.float() @ b.float()),
            convert_layout=lambda values, layout: values,
            SliceLayout=lambda *_: None,
            NVMMADistributedLayout=lambda *_: None,
            allocate_shared_memory=self._allocate,
            warp_specialize=self._warp_specialize,
        )
        barrier = SimpleNamespace(
            MBarrierLayout=lambda: None, init=self._init, wait=self._wait, expect=self._expect, arrive=self._arrive
        )
        return {
            **constants,
            "tl": language,
            "gl": language,
            "mbarrier": barrier,
            "async_load": self._load,
            "warpgroup_mma": self._multiply,
            "warpgroup_mma_wait": self._retire,
            "range": self._range,
            "INTERPRET": False,
        }

    @staticmethod
    def _range(*bounds: Any) -> Iterator[Block]:
        return (block(number) for number in range(*(int(bound) for bound in bounds)))

    def run(self, call: KernelCall) -> None:
        """Run the kernel with a launch's arguments."""
        convert = {name: _argument(value) for name, value in call.arguments.items()}
        kernel = self.globals[call.kernel.fn.__name__]
        kernel(**convert)

    # What a kernel does before its threads part.

    def _allocate(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Shared:
        name = ("low", "high", "columns", "full", "empty")[self.num_rings]
        self.num_rings += 1
        values = torch.full(tuple(shape), math.nan, dtype=dtype) if dtype.is_floating_point else torch.zeros(shape)
        return Shared(name, list(shape), values)

    def _init(self, barrier: Slot, count: int) -> None:
        self.barriers[barrier.name] = Barrier(count, count)

    def _warp_specialize(self, functions: list[Any], warps: list[int], registers: list[int]) -> None:
        assert len(functions) == len(warps) + 1 == len(registers) + 1
        self.threads = [Thread(self, function, arguments) for function, arguments in functions]
        if self.seed is None:
            for thread in self.threads:
                thread.run_alone()
        else:
            Scheduler(self, random.Random(self.seed)).run()

    # What threads do to each other.

    def _do(self, kind: str, *slots: Slot, number: Any = 0, action: Callable[[], None] = lambda: None) -> None:
        Thread.current().do(Event(kind, tuple(slot.name for slot in slots), int(number), action))

    def _wait(self, barrier: Slot, parity: Any) -> None:
        self._do("wait", barrier, number=parity)

    def _expect(self, barrier: Slot, count: int) -> None:
        self._do("expect", barrier, number=count, action=lambda: self.barriers[barrier.name].change(1, count))

    def _arrive(self, barrier: Slot, pred: Any = True) -> None:
        if pred:
            self._do("arrive", barrier, action=lambda: self.barriers[barrier.name].change(1, 0))

    def _load(self, source: Descriptor, corner: list[Any], barrier: Slot, buffer: Slot) -> None:
        count, found = source.block_type.nbytes, source.load(corner)

        def begin() -> None:
            buffer.ring.values[buffer.slot] = math.nan
            self.copies.append(Event("land", (barrier.name, buffer.name), count, land))

        def land() -> None:
            buffer.ring.values[buffer.slot] = found
            self.barriers[barrier.name].change(0, -count)

        self._do("copy", barrier, buffer, number=count, action=begin)

    def _multiply(self, rows: Slot, columns: Slot, acc: Any, use_acc: Any, is_async: bool) -> Accumulator:
        acc = acc if isinstance(acc, Accumulator) else Accumulator(acc)
        assert is_async
        self._do("multiply", rows, columns, action=lambda: acc.running.append((rows, columns, bool(use_acc))))
        return acc

    def _retire(self, left: int, deps: list[Accumulator]) -> Any:
        (acc,) = deps
        while len(acc.running) > left:
            rows, columns, adds = acc.running[0]

            def finish(rows: Slot = rows, columns: Slot = columns, adds: bool = adds) -> None:
                left, right = rows.ring.values[rows.slot].float(), columns.ring.values[columns.slot].float()
                product = block(left @ right.t())
                acc.values = acc.values + product if adds else product
                acc.running.pop(0)

            self._do("retire", rows, columns, action=finish)
        return acc if left else acc.values


class Thread:
    """One warp or warpgroup."""

    _local = threading.local()

    def __init__(self, program: Program, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        self.program, self.events = program, list[Event]()
        self.is_over, self.error = False, None
        self._run = lambda: function(*arguments)
        # Taken, until the other side gives them back: half the time of semaphores.
        self._go, self._parked = threading.Lock(), threading.Lock()
        self._go.acquire(), self._parked.acquire()
        self.next: Event | None = None

    @classmethod
    def current(cls) -> "Thread":
        return cls._local.thread

    def run_alone(self) -> None:
        """Record what the thread does; nothing waits."""
        Thread._local.thread = self
        self._run()

    def do(self, event: Event) -> None:
        """Called by the thread itself: wait for its turn."""
        self.events.append(event)
        if self.program.seed is None:
            if event.kind in ("multiply", "retire"):
                event.action()
            return
        self.next = event
        self._parked.release()
        self._go.acquire()
        if self.error is not None:
            raise SystemExit
        event.action()

    def start(self) -> None:
        def body() -> None:
            Thread._local.thread = self
            try:
                self._run()
            except BaseException as error:
                self.error = self.error or error
            self.is_over, self.next = True, None
            self._parked.release()

        threading.Thread(target=body, daemon=True).start()
        self._parked.acquire()

    def step(self) -> None:
        """Let it do its next event and run on to the one after."""
        self._go.release()
        self._parked.acquire()
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        if not self.is_over:
            self.error = Deadlock()
            self._go.release()


class Scheduler:
    """Chooses who goes on."""

    def __init__(self, program: Program, chance: random.Random) -> None:
        self.program, self.chance = program, chance

    def run(self) -> None:
        program = self.program
        try:
            for thread in program.threads:
                thread.start()
                if thread.error is not None:
                    raise thread.error
            while choices := [t for t in program.threads if self._can(t.next)] + list(program.copies):
                chosen = self.chance.choice(choices)
                if isinstance(chosen, Thread):
                    chosen.step()
                else:
                    program.copies.remove(chosen)
                    chosen.action()
        finally:
            for thread in program.threads:
                thread.stop()
        stuck = [thread.next for thread in program.threads if not thread.is_over or thread.next is not None]
        if stuck:
            raise Deadlock(f"waiting for ever: {stuck}, barriers {program.barriers}")
        for name, barrier in program.barriers.items():
            assert barrier.pending == barrier.count and not barrier.bytes, f"{name} is left at {barrier}"

    def _can(self, event: Event | None) -> bool:
        if event is None:
            return False
        return event.kind != "wait" or self.program.barriers[event.names[0]].phase & 1 != event.number


def emulate(call: KernelCall, seed: int = 0, edits: dict[str, tuple[str, str]] | None = None) -> None:
    """Do what `call.launch()` does on a device, programs one after the other."""
    for number in range(call.num_programs):
        Program(number, call.num_programs, seed + number, edits).run(call)


def _argument(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return Pointer.to(value)
    if hasattr(value, "block_shape"):
        return Descriptor(value.base, list(value.block_shape))
    return value
