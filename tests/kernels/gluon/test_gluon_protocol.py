"""The barriers of the Gluon kernel: all interleavings of its warps on small rings, and errors planted in its source."""

import pytest
from protocol import Violation, check, record

SIZES = [(stages, steps, tiles) for stages in (2, 3, 4) for steps in range(1, 6) for tiles in range(4)]


@pytest.mark.parametrize(("stages", "steps"), sorted({(stages, steps) for stages, steps, _ in SIZES}))
def test_no_interleaving_goes_wrong(stages: int, steps: int) -> None:
    """Nobody waits for ever, overwrites what is unread, reads what is not there, or leaves anything in flight."""
    visited = [check(record(stages, steps, tiles)) for tiles in range(4)]
    assert visited[0] == 1 and visited == sorted(visited)
    # Two warpgroups out of step with each other and with the copies: far more states than events.
    events = sum(len(thread) for thread in record(stages, steps, 3).threads)
    assert visited[3] > 3 * events


def test_a_ring_of_one_buffer_would_stand_still() -> None:
    """A buffer is given back one step late; so tables with one stage are refused."""
    with pytest.raises(Violation, match="deadlock"):
        check(record(1, 2, 1))


def test_threads_are_the_producer_and_two_consumers() -> None:
    """What is recorded is what the kernel does: for each step three copies, and two products by halves."""
    first, second, producer = record(3, 4, 2).threads
    counts = {}
    for name, thread in (("first", first), ("second", second), ("producer", producer)):
        kinds = [event.kind for step in thread for event in step.events]
        counts[name] = {kind: kinds.count(kind) for kind in sorted(set(kinds))}
    consumer = {"arrive": 8, "multiply": 8, "retire": 8, "wait": 8}
    assert counts == {"first": consumer, "second": consumer, "producer": {"copy": 24, "expect": 8, "wait": 8}}


ERRORS = {
    "released while it is read": ("multiply", ("warpgroup_mma_wait(1,", "warpgroup_mma_wait(2,")),
    "released before it is read": ("multiply", ("step + k + STAGES - 1", "step + k")),
    "last buffer of a tile kept": (
        "multiply",
        ("mbarrier.arrive(empty.index(slot(step + num_steps - 1, STAGES)))", ""),
    ),
    "last buffer of a tile released twice": ("multiply", ("pred=k > 0", "pred=True")),
    "consumers wait for the other parity": ("multiply", ("phase(step + k, STAGES)", "phase(step + k, STAGES) ^ 1")),
    "consumers do not wait": ("multiply", ("mbarrier.wait(full.index(s), phase(step + k, STAGES))", "")),
    "producer waits for the other parity": ("produce", (" ^ 1", "")),
    "producer does not wait": ("produce", ("mbarrier.wait(empty.index(s), phase(step, STAGES) ^ 1)", "")),
    "producer expects too little": ("produce", ("HALVES * x_ref", "x_ref")),
    "producer starts the ring anew with each tile": ("produce", ("row0 = ", "step = 0\n        row0 = ")),
    "consumers start the ring anew with each tile": ("consume", ("step += num_steps", "")),
    "a round is one step longer": ("phase", ("step // STAGES", "step // (STAGES + 1)")),
    "a slot is skipped": ("slot", ("step % STAGES", "(step + step // STAGES) % STAGES")),
    "one consumer frees a buffer": ("linear_logps_kernel", ("count=HALVES", "count=1")),
    "a buffer is full after two arrivals": ("linear_logps_kernel", ("count=1", "count=2")),
    "both consumers take one half": ("linear_logps_kernel", ("(high, columns, ring", "(low, columns, ring")),
}


@pytest.mark.parametrize("error", ERRORS)
def test_a_planted_error_is_found(error: str) -> None:
    name, edit = ERRORS[error]
    with pytest.raises(Violation) as found:
        for stages, steps, tiles in ((2, 3, 2), (3, 4, 2)):
            check(record(stages, steps, tiles, {name: edit}))
    print(error, "->", found.value)
