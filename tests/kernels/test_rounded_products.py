"""Products that a GPU's library rounds to 16 bits itself: their sums stay fp32, whatever the process allows."""

import threading
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor

from bench.device_counts import Call, count
from fastpref.kernels import torch_tiles

FLAGS = torch.backends.cuda.matmul
NAMES = {
    torch.bfloat16: "allow_bf16_reduced_precision_reduction",
    torch.float16: "allow_fp16_reduced_precision_reduction",
}


def allowed(dtype: torch.dtype) -> tuple[bool, bool]:
    """Whether partial sums may have 16 bits, and whether there may be any."""
    return getattr(FLAGS, NAMES[dtype]), getattr(FLAGS, f"{NAMES[dtype]}_split_k")


def on_device(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.fixture(params=[(True, True), (False, True), (False, False)])
def before(request: pytest.FixtureRequest) -> Iterator[tuple[bool, bool]]:
    """What the process allows, in either dtype."""
    stored = {name: allowed(dtype) for dtype, name in NAMES.items()}
    for name in stored:
        setattr(FLAGS, name, request.param)
    yield request.param
    for name, value in stored.items():
        setattr(FLAGS, name, value)


@pytest.mark.parametrize(
    ("has_main_grad", "num_rows", "num_rounded"), [(False, 300, 1), (True, 300, 0), (False, 17000, 0)]
)
def test_gradient_of_the_weight_in_the_op(
    before: tuple[bool, bool], has_main_grad: bool, num_rows: int, num_rounded: int
) -> None:
    """One tile of rows writes 16 bits, under the flag; the products of the rows never do."""
    seen = []
    real = {name: getattr(torch, name) for name in ("mm", "addmm")}

    def spy(name: str) -> object:
        def run(*operands: Tensor, **options: object) -> Tensor:
            # Others are PyTorch's own, which takes some products apart where it has nothing but shapes.
            if operands[-1].dtype == torch.bfloat16 and "out" in options:
                seen.append((options["out"].dtype, allowed(torch.bfloat16)))
            return real[name](*operands, **options)

        return run

    call = Call(num_rows=num_rows, num_columns=2048, hidden_size=64, backward="recompute", has_main_grad=has_main_grad)
    with mock.patch.multiple(torch, **{name: spy(name) for name in real}):
        count(call)
    rounded = [flags for dtype, flags in seen if dtype == torch.bfloat16]
    assert rounded == [(False, before[1])] * num_rounded
    assert {dtype for dtype, _ in seen} - {torch.bfloat16} == {torch.float32}
    assert allowed(torch.bfloat16) == allowed(torch.float16) == before


@pytest.mark.parametrize("dtype", NAMES)
def test_flags_are_restored_also_after_errors(before: tuple[bool, bool], dtype: torch.dtype) -> None:
    a, b = on_device(3, 8, dtype=dtype), on_device(7, 5, dtype=dtype)
    with pytest.raises(RuntimeError, match="reduction dim"):
        torch_tiles.product(a, b, on_device(3, 5, dtype=dtype))
    assert allowed(dtype) == before


def test_a_cpu_and_wider_sums_leave_the_flags_alone() -> None:
    flags = []
    with mock.patch.object(torch, "mm", lambda *_, **__: flags.append(allowed(torch.bfloat16))):
        for device, dtype in (("cpu", torch.bfloat16), ("meta", torch.float32)):
            operands = [torch.ones(4, 4, dtype=torch.bfloat16, device=device) for _ in range(2)]
            torch_tiles.product(*operands, torch.empty(4, 4, dtype=dtype, device=device))
    assert flags == [(True, True)] * 2


def test_threads_do_not_restore_each_others_flags() -> None:
    """Autograd runs each GPU's backward pass in a thread of its own, and the flags are the process's."""
    is_inside, is_second_started = threading.Event(), threading.Event()
    seen = []

    def mm(*_: Tensor, **__: object) -> None:
        is_inside.set()
        is_second_started.wait(10)
        seen.append(allowed(torch.bfloat16))

    def run() -> None:
        operand = on_device(4, 4, dtype=torch.bfloat16)
        torch_tiles.product(operand, operand, torch.empty_like(operand))

    with mock.patch.object(torch, "mm", mm):
        threads = [threading.Thread(target=run) for _ in range(2)]
        threads[0].start()
        assert is_inside.wait(10)
        threads[1].start()
        # The second thread is at the lock, or (the error) inside as well, where it would take False for the default.
        threads[1].join(0.2)
        is_second_started.set()
        for thread in threads:
            thread.join(10)
    assert seen == [(False, True)] * 2
    assert allowed(torch.bfloat16) == (True, True)
