"""Operators of `torch.library` whose arguments and results have names.

Operators take and return flat tuples. Named tuples say what is in them: a schema is made from their fields, and
everybody but the dispatcher sees names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, get_type_hints

import torch
from torch import Tensor

_SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    int: "SymInt",
    float: "float",
    float | None: "float?",
    str: "str",
    str | None: "str?",
    Sequence[str]: "str[]",
}


def unflatten(values: Sequence[Any], groups: Iterable[Any]) -> list[Any]:
    """Cut a flat tuple into named ones, in this order."""
    named, start = [], 0
    for group in groups:
        stop = start + len(group._fields)
        named.append(group(*values[start:stop]))
        start = stop
    return named


def register(
    name: str,
    body: Callable[..., tuple[Tensor, ...]],
    fake: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    mutated: str | None = None,
) -> torch.library.CustomOpDef:
    """Register an operator whose body, and whose fake, take named tuples.

    Args:
        name: in the namespace of the package.
        body: runs as if autocast was off: its dtypes are its own business, forward and backward.
        fake: describes its results.
        inputs: the named tuples, in order.
        outputs: the same of its results, all of them tensors.
        mutated: the input that it writes to; never None.
    """

    def run(*values: Any) -> tuple[Tensor, ...]:
        with torch.autocast(values[0].device.type, enabled=False):
            return body(*unflatten(values, inputs))

    kinds = {field: _SCHEMA_TYPES[kind] for group in inputs for field, kind in get_type_hints(group).items()}
    if mutated is not None:
        kinds[mutated] = "Tensor(a!)"
    arguments = ", ".join(f"{kind} {field}" for field, kind in kinds.items())
    results = ", ".join("Tensor" for group in outputs for _ in group._fields)
    operator = torch.library.custom_op(
        f"fastpref::{name}",
        run,
        mutates_args=() if mutated is None else (mutated,),
        schema=f"({arguments}) -> ({results})",
    )
    operator.register_fake(lambda *values: fake(*unflatten(values, inputs)))
    return operator
