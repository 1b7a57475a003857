"""What the tests of the stand-in for Transformer Engine's extension share: where it is, and what they compare with."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref.testing.numerics import assert_within_rule
from fastpref.trainer.ranks.cpu_platform import install_cpu_platform
from fastpref.trainer.ranks.transformer_engine import computes_here

DTYPES = (torch.float32, torch.bfloat16)
Tensors = dict[str, Tensor]
Function = Callable[..., Tensor]


def transformer_engine() -> ModuleType:
    """Its modules for torch over the stand-in; where they are not on the path, the asking test module is skipped."""
    if torch.cuda.is_available() or not computes_here():
        reason = "needs Transformer Engine's Python code and tests/te_stub on the path, and no GPU (`make test-te`)"
        pytest.skip(reason, allow_module_level=True)
    install_cpu_platform()
    import transformer_engine.pytorch

    return transformer_engine.pytorch


@contextmanager
def attention_in_fp32() -> Iterator[None]:
    """Within it, attention in fp32 takes the path of 16 bits where Transformer Engine has no other for it."""
    os.environ["TE_STUB_FP32_ATTENTION"] = "1"
    try:
        yield
    finally:
        del os.environ["TE_STUB_FP32_ATTENTION"]


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, none of them 0, that `dtype` can hold."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def perturb(module: torch.nn.Module, seed: int = 1) -> None:
    """Move every parameter off its initial value: biases that are 0 and scales that are 1 hide errors."""
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter.add_(0.3 * numbers(*parameter.shape, seed=1000 * seed + number, dtype=parameter.dtype))


def values_of(module: torch.nn.Module) -> Tensors:
    """The parameters by name, without their history."""
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def with_gradients(function: Function, inputs: Mapping[str, Tensor], dtype: torch.dtype) -> list[tuple[str, Tensor]]:
    """The output of `function(**inputs)` and the gradients of all inputs, computed in `dtype`.

    The output's gradient is the same numbers for every dtype.
    """
    leaves = {name: value.detach().to(dtype).requires_grad_() for name, value in inputs.items()}
    output = function(**leaves)
    output.backward(_gradient_of(output, next(iter(inputs.values())).dtype).to(dtype))
    return [("output", output.detach()), *((name, _gradient(leaf)) for name, leaf in leaves.items())]


def module_with_gradients(
    module: torch.nn.Module, inputs: Mapping[str, Tensor], *others: Any, **settings: Any
) -> list[tuple[str, Tensor]]:
    """As `with_gradients` for a module: its output, the gradients of its inputs and those of its parameters."""
    module.zero_grad()
    leaves = {name: value.detach().clone().requires_grad_() for name, value in inputs.items()}
    output = module(*leaves.values(), *others, **settings)
    output.backward(_gradient_of(output, output.dtype))
    parameters = dict(module.named_parameters())
    return [("output", output.detach()), *((name, _gradient(leaf)) for name, leaf in {**leaves, **parameters}.items())]


def assert_same(
    actual: list[tuple[str, Tensor]], plain: Function, inputs: Mapping[str, Tensor], allow_zero: bool = False
) -> None:
    """Assert that outputs and gradients are within the numeric rule of `plain(**inputs)` in torch.

    Args:
        actual: what `module_with_gradients` or `with_gradients` returned.
        plain: the same function of torch's own operations.
        inputs: its inputs, parameters included, in the dtype under test and in the order of `actual`.
        allow_zero: whether a gradient may be 0 everywhere.
    """
    dtype = actual[0][1].dtype
    in_torch = dict(with_gradients(plain, inputs, dtype))
    oracle = dict(with_gradients(plain, inputs, torch.float64))
    assert [name for name, _ in actual] == list(oracle)
    for name, value in actual:
        assert allow_zero or oracle[name].any(), f"{name} is 0 everywhere, which shows nothing"
        try:
            assert_within_rule(value, in_torch[name], oracle[name], kind="output" if name == "output" else "gradient")
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Attention in torch: [..., H, S, D] of [..., H, S, D] and [..., G, K, D], `visible` [S, K]."""
    key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], dim=-3) for x in (key, value))
    scores = (query @ key.mT * scale).masked_fill(~visible, float("-inf"))
    return scores.softmax(-1) @ value


def visible_keys(num_queries: int, num_keys: int, mask: str, window: tuple[int, int] = (-1, -1)) -> Tensor:
    """[S, K]: by the mask's name, and a window (keys to the left, to the right), aligned at the last row.

    Causal masks are aligned at the first row unless they say bottom_right.
    """
    from_end = num_keys - num_queries if "bottom_right" in mask or "causal" not in mask else 0
    distance = torch.arange(num_queries)[:, None] + from_end - torch.arange(num_keys)
    visible = distance >= 0 if "causal" in mask else torch.ones_like(distance, dtype=torch.bool)
    return visible if window[0] < 0 else visible & (distance <= window[0]) & (distance >= -window[1])


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def _gradient_of(output: Tensor, dtype: torch.dtype) -> Tensor:
    return numbers(*output.shape, seed=99, dtype=dtype)
