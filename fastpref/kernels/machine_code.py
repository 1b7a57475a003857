"""Read the machine code of a kernel: its registers, what it spills, and what it does with a finished tile.

The *epilogue* is what a warp executes once per tile beside the steps of the product, on the common way: a full tile
that needs nothing rare. In the graph of basic blocks it is

    the shortest cycle through a matrix instruction and a base-2 exponential
    less the shortest cycle through a matrix instruction,

where a block is as long as it has instructions. The first is a tile whose product is one step, the second is that step.
So branches to rare work (a label in the tile, a ragged tile, waiting once more for a copy) are not counted, and
it does not matter whether the loops over tiles and steps are two or were flattened into one. In a flattened loop the
arithmetic that finds the next tile is a branch of the step, some 70 instructions, and is not counted either. What only
some lanes of a warp do counts: the warp spends the time.
"""

from __future__ import annotations

import heapq
import itertools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import triton

MATRIX_OPCODES = ("HGMMA", "QGMMA", "IGMMA", "HMMA", "IMMA")
EXPONENTIAL = "MUFU.EX2"
_BRANCHES = ("BRA", "BRX", "JMP", "RET", "EXIT")
_LABEL = re.compile(r"(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;")
_TARGET = re.compile(r"(.*?)`\((\.L_x_\d+)\)")


@dataclass(frozen=True)
class Epilogue:
    """What a warp executes once per tile beside the steps of the product."""

    opcodes: Mapping[str, int]
    """Instructions by opcode, with modifiers."""

    @property
    def instructions(self) -> int:
        """Return how many there are."""
        return sum(self.opcodes.values())

    def count(self, *prefixes: str) -> int:
        """Return how many begin with one of these names; "BAR" is `BAR.SYNC` and `BAR.ARV`, not `BARRIER`."""
        return sum(
            number
            for opcode, number in self.opcodes.items()
            if any(opcode == prefix or opcode.startswith(prefix + ".") for prefix in prefixes)
        )


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """Return (registers, bytes of local memory) per thread."""
    report = _run(triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin=cubin)
    usage = re.search(r"REG:(\d+) STACK:(\d+)", report)
    assert usage, report
    return int(usage[1]), int(usage[2])


def disassemble(cubin: bytes) -> str:
    """Return the machine code as text, with a label wherever a branch leads."""
    return _run(triton.knobs.nvidia.nvdisasm.path, "-c", cubin=cubin)


def count_epilogue(listing: str) -> Epilogue:
    """Return the epilogue of a kernel that multiplies tiles.

    Args:
        listing: of `disassemble`.

    Raises:
        ValueError: no loop leads through a matrix instruction and an exponential.
    """
    graph = _Graph.of(listing)
    products, exponentials = graph.having(*MATRIX_OPCODES), graph.having(EXPONENTIAL)
    # By product: warps that go different ways have loops of their own.
    tiles = [
        (tile, step)
        for product, exponential in itertools.product(products, exponentials)
        if (tile := graph.cycle(product, exponential)) and (step := graph.cycle(product))
    ]
    if not tiles:
        raise ValueError(
            f"the code has no loop through one of {', '.join(MATRIX_OPCODES)} and {EXPONENTIAL}: it is no kernel that "
            "multiplies tiles on tensor cores and takes their exponentials"
        )
    tile, step = min(tiles, key=lambda ways: graph.length(ways[0]))
    once = Counter(tile)
    once.subtract(step)
    if min(once.values()) < 0:
        raise ValueError("the shortest step of the product is no part of the shortest tile: they cannot be told apart")
    opcodes: Counter[str] = Counter()
    for place, times in once.items():
        opcodes.update(graph.blocks[place].opcodes * times)
    return Epilogue(dict(opcodes))


def _run(tool: str, *options: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, *options, file.name], capture_output=True, text=True, check=True).stdout


@dataclass
class _Block:
    """Instructions that run one after the other, and what may run next."""

    opcodes: list[str] = field(default_factory=list)
    next_labels: list[str] = field(default_factory=list)
    falls_through: bool = True
    """Into the block that follows."""


@dataclass(frozen=True)
class _Graph:
    """The basic blocks of a listing in the order of their addresses, and the places of each one's successors."""

    blocks: list[_Block]
    successors: list[list[int]]

    @classmethod
    def of(cls, listing: str) -> _Graph:
        """Cut a listing at its labels and behind its branches; a call is an instruction like others."""
        blocks, places = [_Block()], {}
        # Barriers on which lanes wait that have gone different ways: between BSSY and BSYNC a warp goes all of them.
        divergent: set[str] = set()
        for line in listing.splitlines():
            if label := _LABEL.match(line):
                blocks.append(_Block())
                places[label[1]] = len(blocks) - 1
            elif instruction := _INSTRUCTION.match(line):
                predicate, opcode, operands = instruction.groups()
                blocks[-1].opcodes.append(opcode)
                name = opcode.split(".")[0]
                if name == "BSSY":
                    divergent.add(operands.split(",")[0])
                elif name == "BSYNC":
                    divergent.discard(operands)
                elif name in _BRANCHES:
                    target = _TARGET.fullmatch(operands)
                    # A uniform branch has its predicate among the operands.
                    is_conditional = bool(predicate) or bool(target and target[1])
                    blocks[-1].falls_through = is_conditional
                    if target and not (divergent and is_conditional and target[2] not in places):
                        blocks[-1].next_labels.append(target[2])
                    blocks.append(_Block())
        count = len(blocks)
        successors = [
            [places[label] for label in block.next_labels] + [place + 1] * (block.falls_through and place + 1 < count)
            for place, block in enumerate(blocks)
        ]
        return cls(blocks, successors)

    def having(self, *prefixes: str) -> list[int]:
        """Return the places of the blocks with an instruction that begins with one of these."""
        return [place for place, block in enumerate(self.blocks) if any(o.startswith(prefixes) for o in block.opcodes)]

    def length(self, way: Iterable[int]) -> int:
        """Return the instructions of some blocks."""
        return sum(len(self.blocks[place].opcodes) for place in way)

    def cycle(self, *stations: int) -> list[int] | None:
        """Return the blocks of the shortest way from the first station by the others back to it, or None."""
        stations = tuple(dict.fromkeys(stations))
        parts = [self.way(*ends) for ends in zip(stations, (*stations[1:], stations[0]), strict=True)]
        return None if None in parts else [place for part in parts if part for place in part]

    def way(self, start: int, goal: int) -> list[int] | None:
        """Return the blocks after `start` up to `goal` on the way with the fewest instructions, by Dijkstra's rule."""
        ahead, left = [(0, [start])], set(range(len(self.blocks)))
        while ahead:
            length, way = heapq.heappop(ahead)
            if way[-1] == goal and len(way) > 1:
                return way[1:]
            if way[-1] in left:
                left.remove(way[-1])
                for place in self.successors[way[-1]]:
                    heapq.heappush(ahead, (length + self.length([place]), [*way, place]))
        return None
