"""The Python code of the Transformer Engine that is installed, as text."""

import ast
import functools
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any


@functools.cache
def python_code() -> str:
    """All of its modules for torch, one after another; empty where there are none."""
    spec = find_spec("transformer_engine")
    if spec is None or spec.origin is None:
        return ""
    modules = sorted((Path(spec.origin).parent / "pytorch").rglob("*.py"))
    return "\n".join(path.read_text(encoding="utf-8") for path in modules)


def names_asked_for() -> set[str]:
    """What it takes out of the extension."""
    names = set(re.findall(r"\btex\.([A-Za-z]\w*)", python_code()))
    imports = re.findall(r"from transformer_engine_torch import (?:([^(\n]+)|\(([^)]+)\))", python_code())
    for one_line, lines in imports:
        names.update(re.findall(r"[A-Za-z]\w*", re.sub(r"#.*|\bas \w+", "", one_line or lines)))
    return names


def bind(function: str, args: tuple[Any, ...]) -> dict[str, Any]:
    """Name the arguments of a call to the extension by the variables that the Python code passes there.

    Releases add arguments in the middle; the variables keep their names.
    """
    return dict(zip(_argument_names(function), args, strict=True))


@functools.cache
def _argument_names(function: str) -> tuple[str, ...]:
    """Of the first call; of an expression such as `Kinds[kind]` or `window[0]`, the last variable (and its index)."""
    start = re.search(rf"\btex\.{function}\(", python_code())
    if start is None:
        raise NotImplementedError(f"the Python code of Transformer Engine does not call {function}")
    code, end = python_code(), start.end()
    while code[start.start() : end].count("(") != code[start.start() : end].count(")"):
        end = code.index(")", end) + 1
    call = ast.parse(code[start.start() : end], mode="eval").body
    assert isinstance(call, ast.Call)
    return tuple(_name(argument) for argument in call.args)


def _name(argument: ast.expr) -> str:
    text = ast.unparse(argument)
    return text.split("[")[1].rstrip("]") if re.fullmatch(r"[A-Z]\w*\[\w+\]", text) else text
