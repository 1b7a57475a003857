"""No tensor of the package takes its dtype or device from a setting of the caller's process, read from the calls."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "fastpref"
MODULES = sorted(PACKAGE.rglob("*.py"))
# `torch.<name>` whose result follows `set_default_dtype`, `set_default_device` or `with torch.device(...)`. Integers
# too: their device does, and whether a list holds integers is for a reader to know, not for this test.
FACTORIES = {
    *("arange", "as_tensor", "asarray", "bartlett_window", "blackman_window", "empty", "empty_permuted"),
    *("empty_strided", "eye", "full", "hamming_window", "hann_window", "kaiser_window", "linspace", "logspace"),
    *("normal", "ones", "rand", "randint", "randn", "randperm", "range", "scalar_tensor", "sparse_coo_tensor"),
    *("tensor", "tril_indices", "triu_indices", "zeros"),
}
# Constructors with the dtype in their name, or with none: the legacy way to the default dtype.
LEGACY = {f"{kind}Tensor" for kind in ("", "Bool", "Byte", "BFloat16", "Double", "Float", "Half", "Int", "Long")}


def torch_calls(source: str) -> list[tuple[int, str, set[str]]]:
    """(line, name, keywords) of every call of a function that is named in `torch`, by whatever name it was imported."""
    tree, names, modules, calls = ast.parse(source), {}, {"torch"}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.asname for alias in node.names if alias.name == "torch" and alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module == "torch":
            names |= {alias.asname or alias.name: alias.name for alias in node.names}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = None
        if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
            name = node.func.attr if node.func.value.id in modules else None
        elif isinstance(node.func, ast.Name):
            name = names.get(node.func.id)
        if name is not None:
            calls.append((node.lineno, name, {keyword.arg or "**" for keyword in node.keywords}))
    return calls


def unspecified(source: str, wanted: set[str]) -> list[str]:
    """What every factory call of a module leaves to the process, a line each."""
    problems = []
    for line, name, keywords in torch_calls(source):
        missing = sorted(wanted - keywords) if name in FACTORIES else []
        if name in LEGACY:
            problems.append(f"line {line}: torch.{name} takes no dtype and device; call a factory with both")
        elif missing:
            problems.append(f"line {line}: torch.{name} without {' and '.join(missing)}; name it, or use new_{name}")
    return problems


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_factories_name_dtype_and_device(path: Path) -> None:
    """A buffer in the default dtype, which C++ took for fp32, overran the heap where that was bf16."""
    assert not unspecified(path.read_text(encoding="utf-8"), {"dtype", "device"})


@pytest.mark.parametrize(
    ("source", "num_problems"),
    [
        ("import torch\ntorch.empty(3)", 1),
        ("import torch as t\nt.zeros(3, dtype=t.float32)", 1),
        ("from torch import ones as one\none(3, device='cpu')", 1),
        ("import torch\ntorch.FloatTensor(3)", 1),
        ("import torch\ntorch.full((2,), 1.0, dtype=torch.float32, device='cpu')\ntorch.zeros_like(x)", 0),
        ("import numpy as np\nnp.empty(3)", 0),
    ],
)
def test_unnamed_factories_are_found(source: str, num_problems: int) -> None:
    assert len(unspecified(source, {"dtype", "device"})) == num_problems
