"""The op in one graph whose sizes and numbers stay open: the eager results, whatever they turn out to be."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastpref import linear_logps

BACKENDS = ("torch", "reference")
# per call: hidden [S, L, H], V
SIZES = ((2, 6, 8, 40), (3, 7, 8, 50), (4, 9, 8, 61))


def inputs(num_sequences: int, length: int, hidden_size: int, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(vocab_size)
    labels_SL = torch.randint(0, vocab_size, (num_sequences, length), generator=generator)
    labels_SL[0, ::3] = -100
    return (
        torch.randn(num_sequences, length, hidden_size, generator=generator).requires_grad_(),
        torch.randn(vocab_size, hidden_size, generator=generator).requires_grad_(),
        labels_SL,
    )


def assert_compiles(
    scored: Callable[..., Tensor], calls: list[tuple], with_grad: bool = True, **options: object
) -> None:
    """One graph per compilation, and for every call the values and gradients of eager mode."""
    torch._dynamo.reset()
    compiled = torch.compile(scored, fullgraph=True, **options)
    for arguments in calls:
        actual, expected = compiled(*arguments), scored(*arguments)
        torch.testing.assert_close(actual, expected)
        found = torch.autograd.grad(actual.sum(), arguments[:2])
        for gradient, wanted in zip(found, torch.autograd.grad(expected.sum(), arguments[:2]), strict=True):
            torch.testing.assert_close(gradient, wanted)


# options that stay, and numbers that each call has others of
NUMBERS = {
    "fused": ({}, {"logit_scale": (1.0, 0.9, 2), "softcap": (30.0, 20.0, 10.0), "ignore_index": (-100, 3, 7)}),
    "reference": ({"backend": "reference"}, {"logit_scale": (1.0, 0.9, 0.8), "softcap": (30.0, 20.0, 10.0)}),
    "active": ({"backward": "active"}, {"active_eps": (0.1, 0.2, 0.3)}),
    "cached": ({"backward": "cached"}, {"cache_bytes": (10_000, 20_000, 30_000)}),
}


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("case", NUMBERS)
def test_linear_logps_compiled_with_numbers_that_change(case: str, dynamic: bool | None) -> None:
    """`math.isfinite` of a number that the compiler leaves open broke the graph: a temperature per step."""
    fixed, numbers = NUMBERS[case]

    def scored(hidden: Tensor, weight: Tensor, labels: Tensor, given: tuple[float, ...]) -> Tensor:
        options = dict(zip(numbers, given, strict=True))
        labels = torch.where(labels == -100, options.get("ignore_index", -100), labels)
        return linear_logps(hidden, weight, labels, **fixed, **options).logps

    calls = [(*inputs(*SIZES[0]), given) for given in zip(*numbers.values(), strict=True)]
    assert_compiles(scored, calls, backend="eager", dynamic=dynamic)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_logps_compiled_with_sizes_that_change(backend: str, dynamic: bool | None) -> None:
    def scored(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return linear_logps(hidden, weight, labels, backend=backend).logps

    calls = [inputs(*sizes) for sizes in SIZES]
    assert_compiles(scored, calls, backend="eager", dynamic=dynamic)


def test_linear_logps_compiled_with_marked_sizes() -> None:
    def scored(hidden: Tensor, weight: Tensor, labels: Tensor, rows: Tensor, cu_rows: Tensor) -> Tensor:
        flat, labels = hidden.flatten(0, 1), labels.flatten()
        result = linear_logps(flat, weight, labels, rows=rows, cu_rows=cu_rows, stats=("token_logps", "entropy"))
        return result.token_logps.sum() + result.logps.sum() + result.entropy.sum()

    calls = []
    for sizes, num_rows in zip(SIZES, (4, 5, 9), strict=True):
        hidden, weight, labels = inputs(*sizes)
        rows, cu_rows = torch.arange(num_rows), torch.tensor([0, 2, num_rows])
        for tensor, axes in ((hidden, (0, 1)), (labels, (0, 1)), (weight, (0,)), (rows, (0,))):
            for axis in axes:
                torch._dynamo.mark_dynamic(tensor, axis)
        calls.append((hidden, weight, labels, rows, cu_rows))
    assert_compiles(scored, calls, backend="aot_eager")


def test_linear_logps_compiled_refuses_a_number() -> None:
    """The checks are part of the graph's guards, not lost in it."""
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda hidden, weight, labels, softcap: linear_logps(hidden, weight, labels, softcap=softcap).logps,
        backend="eager",
    )
    for softcap in (30.0, 20.0):
        compiled(*inputs(*SIZES[0]), softcap)
    for wrong, message in ((-1.0, "softcap must be > 0"), (float("inf"), "softcap must be finite")):
        with pytest.raises(ValueError, match=message):
            compiled(*inputs(*SIZES[0]), wrong)


class Scorer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(inputs(*SIZES[0])[1].detach())

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return linear_logps(hidden, self.weight, labels, softcap=20.0).logps


def test_linear_logps_exported() -> None:
    scorer = Scorer()
    hidden, _, labels = inputs(*SIZES[0])
    axes = {0: torch.export.Dim("sequences"), 1: torch.export.Dim("length")}
    program = torch.export.export(
        scorer, (hidden.detach(), labels), dynamic_shapes={"hidden": axes, "labels": axes}, strict=False
    )
    hidden, _, labels = inputs(*SIZES[1][:3], 40)
    torch.testing.assert_close(program.module()(hidden.detach(), labels), scorer(hidden.detach(), labels))
