"""Every interleaving of what the Gluon kernel's warps do to their barriers and buffers.

The threads' events are recorded from the kernel's own source (`emulator`): they do not depend on the interleaving. The
states that any order of events can reach are then visited, one after the other, and in each it is checked that

- somebody can go on, or all are done and nothing is in flight;
- a copy begins where nobody reads and nothing is unread;
- a product reads what its step was meant to read, all of it there;
- a wait ends in the round that it was meant for, not in one of the same parity two rounds later.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from emulator import TILE, Event, Program

from fastpref.kernels import gluon_forward
from fastpref.kernels.engine import Head
from fastpref.kernels.triton_parts import TileParts

BLIND = ("reduce_tile", ("    bias_ptr, labels_ptr, bound_ptr", "    return acc\n    bias_ptr, labels_ptr, bound_ptr"))
BUFFERS = ("low", "high", "columns")


class Step(NamedTuple):
    """Events of one thread that nobody can come between, or whose order with others makes no difference."""

    events: tuple[Event, ...]
    meant: tuple[int, ...]
    """For a wait the round that it waits for; for a copy and a product the step of H, counted through all tiles."""


@dataclass(frozen=True)
class Protocol:
    """What the threads do, one list of steps each, and the barriers' counts."""

    threads: tuple[tuple[Step, ...], ...]
    counts: dict[tuple[str, int], int]


def record(stages: int, num_steps: int, num_tiles: int, edits: dict[str, tuple[str, str]] | None = None) -> Protocol:
    """Run the kernel's source with one program for all tiles, and keep the order of events of each thread."""
    tile = dataclasses.replace(TILE, stages=stages)
    x_RH = torch.zeros(TILE.rows * num_tiles, TILE.hidden * num_steps, dtype=torch.bfloat16)
    weight_VH = torch.zeros(1, x_RH.shape[1], dtype=torch.bfloat16)
    parts = TileParts.empty(x_RH, 1, (), tile)
    call = gluon_forward.forward_call(
        x_RH if num_tiles else torch.zeros(1, x_RH.shape[1], dtype=torch.bfloat16),
        Head(weight_VH, None, 1.0, None),
        torch.zeros(max(x_RH.shape[0], 1), dtype=torch.int64),
        parts,
        bound_R=None,
        mass_MV=None,
        cache=None,
        tile=tile,
        use_tma=True,
        num_sms=1,
    )
    # No tile for a program: one of a grid that is larger than the number of tiles.
    program = Program(0 if num_tiles else 1, max(call.num_programs, 1), None, dict([BLIND]) | (edits or {}))
    program.run(call)
    steps = tuple(_steps(thread.events) for thread in program.threads)
    return Protocol(steps, {name: barrier.count for name, barrier in program.barriers.items()})


def _steps(events: list[Event]) -> tuple[Step, ...]:
    """Number what events are meant for, and join a wait's followers up to the next event that others can notice."""
    seen: dict[tuple[str, tuple[str, int]], int] = {}
    products = 0
    loads: dict[str, int] = {}
    steps: list[Step] = []
    for event in events:
        meant = 0
        if event.kind == "wait":
            key = ("wait", event.names[0])
            meant = seen.get(key, 0)
            seen[key] = meant + 1
        elif event.kind == "copy":
            ring = event.names[1][0]
            meant = loads.get(ring, 0)
            loads[ring] = meant + 1
        elif event.kind == "multiply":
            meant, products = products, products + 1
        joins = steps and (steps[-1].events[-1].kind, event.kind) in JOINED
        if joins:
            steps[-1] = Step((*steps[-1].events, event), (*steps[-1].meant, meant))
        else:
            steps.append(Step((event,), (meant,)))
    return tuple(steps)


# An expectation and the copies that it is for; the end of a product and the arrival that tells of it.
JOINED = {("expect", "copy"), ("copy", "copy"), ("retire", "retire"), ("retire", "arrive")}


class Violation(AssertionError):
    """A state that must not be reached."""


def check(protocol: Protocol) -> int:
    """Visit every state that can be reached, and return their number.

    Raises:
        Violation: one of them is wrong.
    """
    model = Model(protocol)
    start = model.start()
    seen, open_states = {start}, [start]
    while open_states:
        state = open_states.pop()
        followers = list(model.followers(state))
        if not followers:
            model.check_end(state)
        for follower in followers:
            if follower not in seen:
                seen.add(follower)
                open_states.append(follower)
    return len(seen)


# (places of the threads; phase, pending arrivals and bytes of each barrier; contents of each buffer; copies in flight)
State = tuple[tuple[int, ...], tuple[tuple[int, int, int], ...], tuple[int, ...], tuple[tuple[int, int, int], ...]]
EMPTY, UNDERWAY = -1, -2


class Model:
    """The rules by which a state follows another."""

    def __init__(self, protocol: Protocol) -> None:
        self.threads, self.barriers = protocol.threads, list(protocol.counts)
        self.counts = [protocol.counts[name] for name in self.barriers]
        self.place = {name: place for place, name in enumerate(self.barriers)}
        names = {name for thread in self.threads for step in thread for event in step.events for name in event.names}
        self.reads = [self._read(thread) for thread in self.threads]
        for name in sorted(names - set().union(*self.reads)):
            if name[0] in BUFFERS:
                raise Violation(f"{name} is loaded and nobody reads it")
        self.buffers = sorted(name for name in names if name[0] in BUFFERS)
        self.buffer_place = {name: place for place, name in enumerate(self.buffers)}
        self.reading = [self._reading(thread) for thread in self.threads]
        self.has_read = [self._has_read(thread) for thread in self.threads]
        # By copy: the buffers that it fills, and for which step.
        self.landing: dict[tuple[int, int, int], tuple[tuple[tuple[str, int], int], ...]] = {}

    def start(self) -> State:
        barriers = tuple((0, count, 0) for count in self.counts)
        return (0,) * len(self.threads), barriers, (EMPTY,) * len(self.buffers), ()

    @staticmethod
    def _read(thread: tuple[Step, ...]) -> set[tuple[str, int]]:
        """The buffers that a thread's products read."""
        events = [event for step in thread for event in step.events]
        return {name for event in events if event.kind == "multiply" for name in event.names}

    @staticmethod
    def _reading(thread: tuple[Step, ...]) -> list[frozenset[tuple[str, int]]]:
        """By place: the buffers that products of this thread are reading."""
        reading: list[tuple[str, int]] = []
        places = [frozenset[tuple[str, int]]()]
        for step in thread:
            for event in step.events:
                if event.kind == "multiply":
                    reading += event.names
                elif event.kind == "retire":
                    for name in event.names:
                        reading.remove(name)
            places.append(frozenset(reading))
        return places

    @staticmethod
    def _has_read(thread: tuple[Step, ...]) -> list[int]:
        """By place: how many products have begun."""
        numbers = [0]
        for step in thread:
            numbers.append(numbers[-1] + sum(event.kind == "multiply" for event in step.events))
        return numbers

    def followers(self, state: State) -> Iterator[State]:
        places, barriers, contents, copies = state
        for number, thread in enumerate(self.threads):
            if places[number] < len(thread):
                follower = self._step(state, number, thread[places[number]])
                if follower is not None:
                    yield follower
        for place, (barrier, count, _) in enumerate(copies):
            left = copies[:place] + copies[place + 1 :]
            landed = list(contents)
            for name, content in self.landing[copies[place]]:
                landed[self.buffer_place[name]] = content
            yield places, self._change(barriers, barrier, 0, -count), tuple(landed), left

    def _step(self, state: State, number: int, step: Step) -> State | None:
        places, barriers, contents, copies = state
        moved = (*places[:number], places[number] + 1, *places[number + 1 :])
        pieces: list[tuple[tuple[str, int], int]] = []
        total, barrier = 0, -1
        new_contents = list(contents)
        for event, meant in zip(step.events, step.meant, strict=True):
            if event.kind == "wait":
                place = self.place[event.names[0]]
                phase = barriers[place][0]
                if phase & 1 == event.number:
                    return None
                # Consumers wait for the end of a round, the producer for the end of the one before.
                round_over = meant + (event.names[0][0] == "full")
                if phase != round_over:
                    raise Violation(f"thread {number} goes on at round {phase} of {event.names[0]}, not {round_over}")
            elif event.kind == "expect":
                barriers = self._change(barriers, self.place[event.names[0]], 1, event.number)
            elif event.kind == "arrive":
                barriers = self._change(barriers, self.place[event.names[0]], 1, 0)
            elif event.kind == "copy":
                self._check_free(places, new_contents, event.names[1])
                new_contents[self.buffer_place[event.names[1]]] = UNDERWAY
                pieces.append((event.names[1], meant))
                total, barrier = total + event.number, self.place[event.names[0]]
            elif event.kind == "multiply":
                for name in event.names:
                    found = new_contents[self.buffer_place[name]]
                    if found != meant:
                        raise Violation(f"thread {number} reads {name} for step {meant}, which holds {found}")
        if pieces:
            copy = (barrier, total, pieces[0][1])
            self.landing[copy] = tuple(pieces)
            copies = tuple(sorted((*copies, copy)))
        return moved, barriers, tuple(new_contents), copies

    def _check_free(self, places: tuple[int, ...], contents: list[int], name: tuple[str, int]) -> None:
        held = contents[self.buffer_place[name]]
        if held == UNDERWAY:
            raise Violation(f"{name} is loaded while it is being loaded")
        for number in range(len(self.threads)):
            if name not in self.reads[number]:
                continue
            if name in self.reading[number][places[number]]:
                raise Violation(f"{name} is loaded while thread {number} reads it")
            if held >= self.has_read[number][places[number]]:
                raise Violation(f"{name} is loaded before thread {number} has read it")

    def _change(
        self, barriers: tuple[tuple[int, int, int], ...], place: int, arrivals: int, count: int
    ) -> tuple[tuple[int, int, int], ...]:
        phase, pending, left = barriers[place]
        pending, left = pending - arrivals, left + count
        if pending < 0:
            raise Violation(f"more arrivals at {self.barriers[place]} than its count")
        if not pending and not left:
            phase, pending = phase + 1, self.counts[place]
        return (*barriers[:place], (phase, pending, left), *barriers[place + 1 :])

    def check_end(self, state: State) -> None:
        places, barriers, _, copies = state
        stuck = [number for number, thread in enumerate(self.threads) if places[number] < len(thread)]
        if stuck:
            at = [f"thread {number} at {self.threads[number][places[number]].events[0]}" for number in stuck]
            raise Violation("deadlock: " + ", ".join(at))
        reading = [number for number, place in enumerate(places) if self.reading[number][place]]
        if copies or reading:
            raise Violation(f"the kernel ends with copies {copies} and products of threads {reading} in flight")
        for name, (_, pending, left), count in zip(self.barriers, barriers, self.counts, strict=True):
            if pending != count or left:
                raise Violation(f"{name} is left in the middle of a round")
