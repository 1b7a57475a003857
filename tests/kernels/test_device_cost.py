"""What a call costs a GPU beside its products: host syncs, launches, bytes, compiled kernels; counted without one.

The counts are those of the launches that PyTorch's dispatcher and the Triton engine make (`bench/simulated_device.py`).
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple
from unittest import mock

import pytest
import torch

from bench.device_counts import Call, count
from bench.simulated_device import SimulatedDevice, simulated
from fastpref.kernels import active, ops, rows, screened, torch_tiles
from fastpref.kernels.registration import unflatten
from fastpref.kernels.tiles import CACHE_COLUMNS

triton = pytest.importorskip("triton")


class Budget(NamedTuple):
    """At most so many syncs in a call, and launches in its operators and around them."""

    syncs: int
    operators: int
    around: int


# As counted with PyTorch 2.13; other versions may take operators apart in other ways.
SMALL = {"num_columns": 8192, "hidden_size": 256}
SCREENED = {"forward": "screened", "num_rows": 1000, **SMALL}
STATS = ("entropy", "hits", "active_fraction", "cold_mass")
BUDGETS = {
    "no gradient": (Call(needs_grad=False), Budget(0, 9, 11)),
    "no gradient, rows on the device": (Call(needs_grad=False, device_rows=True), Budget(1, 9, 25)),
    "no gradient, in a graph": (Call(needs_grad=False, device_rows=True, is_capturing=True), Budget(0, 9, 26)),
    "no gradient, statistics": (Call(needs_grad=False, stats=("entropy", "hits")), Budget(0, 15, 19)),
    "recompute": (Call(backward="recompute"), Budget(0, 50, 20)),
    "cached": (Call(backward="cached"), Budget(0, 50, 20)),
    "active": (Call(), Budget(1, 59, 20)),
    "active, one chunk": (Call(num_rows=4096), Budget(1, 57, 20)),
    "active, statistics": (Call(stats=STATS), Budget(1, 65, 34)),
    "active, main_grad": (Call(has_main_grad=True), Budget(1, 58, 20)),
    "active, weight_sum": (Call(has_weight_sum=True), Budget(1, 58, 20)),
    # Whether to screen, and how many columns are active; the backward pass asks again.
    "screened, no gradient": (Call(**SCREENED, has_screened=True, needs_grad=False), Budget(2, 137, 11)),
    "screened": (Call(**SCREENED, has_screened=True), Budget(3, 165, 20)),
    "screened, form made by the call": (Call(**SCREENED), Budget(3, 152, 20)),
}


def assert_within(device: SimulatedDevice, budget: Budget) -> None:
    launches = {phase: device.count("launch", phase) for phase in ("api", "forward", "backward")}
    found = Budget(device.count("sync"), launches["forward"] + launches["backward"], launches["api"])
    assert all(is_ <= most for is_, most in zip(found, budget, strict=True)), (
        f"{found}, at most {budget}: {[event.name for event in device.events if event.is_sync]} wait for the device; "
        f"launched are {[f'{event.phase} {event.name}' for event in device.events]}"
    )


def test_counts_are_the_same_where_factories_are_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Megatron's CPU platform, which makes tensors on the CPU whatever is asked for."""
    real = torch.empty

    @functools.wraps(real)
    def on_cpu(*args: object, **options: object) -> torch.Tensor:
        return real(*args, **options | {"device": "cpu"})

    monkeypatch.setattr(torch, "empty", on_cpu)
    assert_within(count(BUDGETS["no gradient, statistics"][0]), BUDGETS["no gradient, statistics"][1])


@pytest.mark.parametrize("path", BUDGETS)
def test_syncs_and_launches_stay_within_their_budget(path: str) -> None:
    call, budget = BUDGETS[path]
    assert_within(count(call), budget)


@pytest.mark.parametrize(("num_rows", "num_columns"), [(1, 64), (1000, 50257), (65536, 32000), (65536, 262144)])
def test_syncs_do_not_grow_with_the_sizes(num_rows: int, num_columns: int) -> None:
    assert count(Call(num_rows=num_rows, num_columns=num_columns)).count("sync") == 1


@pytest.mark.parametrize("path", ["active", "screened", "no gradient, in a graph"])
@pytest.mark.parametrize("fault", ["sync", "launch", "copy"])
def test_what_is_added_is_found(path: str, fault: str) -> None:
    """A number that is looked at, an operator more, and a copy from memory that is not pinned."""
    call, budget = BUDGETS[path]

    def planted(body: Callable) -> Callable:
        def run(operands: ops.Operands, *others: object) -> object:
            if fault == "sync":
                int(operands.labels_R[0])
            elif fault == "launch":
                operands.labels_R.neg()
            else:
                torch.ones(call.num_rows, dtype=torch.int64, device="cpu").to(operands.labels_R.device)
            return body(operands, *others)

        return run

    with replaced_body(planted), pytest.raises(AssertionError, match="wait for the device"):
        assert_within(count(call), budget)


def replaced_body(wrap: Callable) -> "mock._patch_dict":
    """Put something in front of the forward operator's body."""
    from bench import simulated_device

    operator, run = ops.linear_logps_fwd._opoverload, ops.linear_logps_fwd._init_fn

    def planted(*values: object) -> object:
        return wrap(lambda _, *rest: run(*values))(unflatten(values, ops.FORWARD_INPUTS)[0])

    return mock.patch.dict(simulated_device.OPERATORS, {operator: planted})


def test_a_graph_takes_no_screened_pass() -> None:
    call = Call(**SCREENED, has_screened=True, needs_grad=False, device_rows=True, is_capturing=True)
    with pytest.raises(ValueError, match="which a CUDA graph cannot record; use forward='exact' in the graph"):
        count(call)


def test_a_screened_pass_waits_twice_whatever_the_sizes() -> None:
    """And makes three products: all columns, the active ones in int8, and these exactly."""
    for num_rows, num_columns in ((1, 4096), (5000, 8192), (1000, 20011)):
        given = SCREENED | {"num_rows": num_rows, "num_columns": num_columns}
        device = count(Call(**given, has_screened=True, needs_grad=False))
        assert device.count("sync", "forward") == device.count("sync") == 2
        products = [event.name for event in device.events if event.is_product]
        assert products == ["_screen_kernel", "_screen_kernel", "_linear_logps_fwd_kernel"]


def test_a_flat_distribution_is_told_by_one_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is multiplied in int8 then."""
    monkeypatch.setattr(screened, "MOST_EXPECTED", 0.0)
    device = count(Call(**SCREENED, has_screened=True, needs_grad=False))
    assert device.count("sync") == 1
    assert [event.name for event in device.events if event.is_product] == ["_linear_logps_fwd_kernel"]


def test_bytes_beside_the_products() -> None:
    """The active plan with everything handed over, as the trainer calls it: 9.5 GB before there was one set."""
    trainer = count(Call(has_weight_sum=True, has_main_grad=True))
    assert trainer.num_bytes(is_product=False) < 2.5e9
    assert count(Call(has_weight_sum=True)).num_bytes(is_product=False) < 3.1e9
    assert count(Call()).num_bytes(is_product=False) < 4.1e9


class Counting(NamedTuple):
    """Kernels that a run would have compiled, by name: the JIT's own keys."""

    keys: dict[str, set[str]]


@pytest.fixture
def compiled_keys() -> Iterator[Counting]:
    """A driver for a device that is not there, and a compiler that only notes what it is asked for."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from bench.gpu.carried.record import HopperDriver

    counting = Counting({})

    def note(kernel: object, key: str, *_: object) -> None:
        counting.keys.setdefault(kernel.__name__, set()).add(key)

    with mock.patch.object(driver, "_active", HopperDriver()), mock.patch.object(JITFunction, "_do_compile", note):
        yield counting


def ask_for_kernel(call: object) -> None:
    from bench.gpu.carried import record

    record.ask_for_kernel(call)


EDGES = [1, 2, 15, 16, 17, 127, 128, 129, 4095, 4096, 4097, 8192]
RAGGED = [*EDGES, *range(100, 8000, 210)]


def run_ragged(sizes: list[int], **options: object) -> None:
    for num_rows in sizes:
        count(Call(num_rows=num_rows, **SMALL, **options), on_kernel=ask_for_kernel)


@pytest.mark.parametrize("plan", ["active", "recompute", "cached", "screened"])
def test_ragged_numbers_of_rows_compile_nothing_anew(compiled_keys: Counting, plan: str) -> None:
    sizes = RAGGED if plan == "active" else EDGES
    assert len(RAGGED) == 50
    options = {"forward": plan, "has_screened": True} if plan == "screened" else {"backward": plan}
    run_ragged([5000], **options)
    first = {name: set(keys) for name, keys in compiled_keys.keys.items()}
    assert len(first) >= 3 and all(first.values())
    run_ragged(sizes, **options)
    assert {name: len(keys) for name, keys in compiled_keys.keys.items()} == {
        name: len(keys) for name, keys in first.items()
    }


@pytest.mark.parametrize(
    ("module", "name"), [("triton_forward", "_linear_logps_fwd_kernel"), ("triton_parts", "_merge_tiles_kernel")]
)
def test_a_size_that_is_compiled_for_is_found(compiled_keys: Counting, module: str, name: str) -> None:
    """The planted error: a kernel that is compiled for divisors of the number of rows, as all of them once were."""
    kernels = pytest.importorskip(f"fastpref.kernels.{module}")
    specialized = triton.jit(getattr(kernels, name).fn)
    with mock.patch.object(kernels, name, specialized):
        run_ragged(EDGES)
    numbers = {name: len(keys) for name, keys in compiled_keys.keys.items()}
    assert numbers.pop(name) > max(numbers.values())


@pytest.mark.parametrize("what", ["rows", "bounds"])
def test_a_graph_asserts_on_the_device_what_it_cannot_look_at(what: str) -> None:
    """While it is recorded nothing is looked at; the assertion is part of what is recorded."""
    device = SimulatedDevice()
    with simulated(device, is_capturing=True):
        asserted = mock.patch.object(torch, "_assert_async").start()
        try:
            rows_R = device.put(torch.tensor([0, 9 if what == "rows" else 3]))
            rows.check_rows(rows_R, device.put(torch.tensor([0, 1 if what == "bounds" else 2])), 5)
        finally:
            mock.patch.stopall()
    assert [bool(call.args[0].inner) for call in asserted.call_args_list] == [False]
    assert device.count("sync") == 0


def test_a_graph_takes_no_rows_from_the_host() -> None:
    with pytest.raises(ValueError, match="must be on the device of labels while a CUDA graph is recorded"):
        count(Call(needs_grad=False, is_capturing=True, **SMALL))


def test_the_pilot_on_a_device_is_as_wide_as_its_kernels_like() -> None:
    device = SimulatedDevice()
    with simulated(device):
        is_label_V = active.mark_labels(device.put(torch.tensor([5, 7])), 1000)
        pilot = active.pilot_columns(is_label_V, 100)
    assert pilot.shape[0] % torch_tiles.DEVICE_TILES.multiple == 0 == pilot.shape[0] % CACHE_COLUMNS
    assert pilot.inner[:4].tolist() == [5, 7, 0, 1] and len(set(pilot.inner.tolist())) == pilot.shape[0]
