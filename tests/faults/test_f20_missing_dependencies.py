"""Fault 20: `import fastpref` needs nothing but PyTorch; what needs more says which extra."""

import subprocess
import sys

BLOCKED = """
import importlib.abc, importlib.util, sys
BLOCKED = {"triton", "megatron", "transformers", "transformer_engine", "click", "rich", "liger_kernel", "apex"}
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in BLOCKED else find_spec(name, package)
import torch
from fastpref import linear_logps
from fastpref.errors import MissingDependencyError
hidden, weight = torch.randn(2, 3, 4, requires_grad=True), torch.randn(7, 4)
labels = torch.tensor([[1, 2, -100], [-100, 0, 6]])
linear_logps(hidden, weight, labels).logps.sum().backward()
assert hidden.grad.any()
try:
    linear_logps(hidden, weight, labels, backend="triton")
except MissingDependencyError as error:
    assert isinstance(error, ImportError)
    print(error)
else:
    raise SystemExit("backend='triton' did not say what it lacks")
"""


def test_import_and_use_without_optional_dependencies() -> None:
    result = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "pip install 'fastpref[triton]'" in result.stdout
