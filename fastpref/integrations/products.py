"""The product of a linear layer, however it is spelled, answered by something else than its value.

An output layer may call `linear` by position or by keyword, `matmul`, `@`, `mm`, `addmm` or `einsum`. They all come
through PyTorch's function modes. DeepSpeed's ZeRO-3 is the exception: it puts a function of its own in the place of
`torch.nn.functional.linear`, which hides its product from modes; while a product is waited for, PyTorch's own is back.

Dims: `H` inputs, `V` outputs of the layer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_LINEAR = torch._C._nn.linear
_place_of_linear = threading.RLock()


class Product(NamedTuple):
    """The operands of `hidden @ weight.T + bias`.

    Attributes:
        hidden: [..., H].
        weight_VH: [V, H]; a view where the layer multiplies with a transposed one.
        bias_V: [V], or None.
    """

    hidden: Tensor
    weight_VH: Tensor
    bias_V: Tensor | None = None


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Product:
    return Product(input, weight, bias)


def _matmul(*args: Any, **kwargs: Any) -> Product | None:
    first, second = _in_order(args, kwargs, ("self", "input"), ("other", "tensor2", "mat2"))
    return Product(first, second.t()) if second.dim() == 2 else None


def _addmm(*args: Any, beta: float = 1, alpha: float = 1, **kwargs: Any) -> Product | None:
    bias, first, second = _in_order(args, kwargs, ("self", "input"), ("mat1",), ("mat2",))
    return Product(first, second.t(), bias) if bias.dim() == 1 and beta == alpha == 1 else None


def _einsum(equation: str, *operands: Any) -> Product | None:
    """Read `...h,vh->...v`, in any letters, either operand first, the weight transposed or not."""
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    terms, arrow, result = equation.replace(" ", "").partition("->")
    names = terms.split(",")
    if len(operands) != 2 or not arrow or len(names) != 2:
        return None
    for (hidden, hidden_name), (weight, weight_name) in (
        zip(operands, names, strict=True),
        zip(operands[::-1], names[::-1], strict=True),
    ):
        rest, inner, outer = hidden_name[:-1], hidden_name[-1:], result[-1:]
        if inner != outer and result == rest + outer and weight_name in (outer + inner, inner + outer):
            return Product(hidden, weight if weight_name == outer + inner else weight.t())
    return None


def _in_order(args: tuple[Any, ...], kwargs: dict[str, Any], *names: tuple[str, ...]) -> list[Any]:
    """Return a call's operands, of which the first ones came by position and each may have several names."""
    named = [next(kwargs[name] for name in aliases if name in kwargs) for aliases in names[len(args) :]]
    return [*args, *named]


_SPELLINGS: dict[Any, Callable[..., Product | None]] = {
    _LINEAR: _linear,
    torch.einsum: _einsum,
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm), _matmul),
    **dict.fromkeys((torch.addmm, Tensor.addmm), _addmm),
}


class AnsweredProduct(TorchFunctionMode):
    """While active, products with `width` outputs are answered by `answer` instead of being multiplied out.

    Attributes:
        num_answered: how many were.
    """

    def __init__(self, width: int, answer: Callable[[Product], Tensor]) -> None:
        super().__init__()
        self._width, self._answer = width, answer
        self.num_answered = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Answer the product that was waited for; let everything else be computed."""
        kwargs = kwargs or {}
        read = _SPELLINGS.get(func)
        product = None if read is None else read(*args, **kwargs)
        if product is None or product.weight_VH.shape[0] != self._width:
            return func(*args, **kwargs)
        self.num_answered += 1
        return self._answer(product)


@contextmanager
def own_linear() -> Iterator[None]:
    """Put PyTorch's own `linear` back in its place for a while, where another library has replaced it."""
    if torch.nn.functional.linear is _LINEAR:
        yield
        return
    with _place_of_linear:
        replaced = torch.nn.functional.linear
        torch.nn.functional.linear = _LINEAR
        try:
            yield
        finally:
            torch.nn.functional.linear = replaced
