"""Life without Triton, and without a device for it (fault 20)."""

import subprocess
import sys

import pytest
import torch

from fastpref.errors import MissingDependencyError
from fastpref.kernels import triton_engine
from fastpref.kernels.engine import Head
from fastpref.kernels.outputs import LOGP_FIELDS


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_triton_engine_imports_without_triton() -> None:
    """Nothing but the kernels themselves imports Triton; the engine then says what to install."""
    code = (
        "import sys; sys.modules['triton'] = None; sys.path_importer_cache.clear()\n"
        "import importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'triton' else real(name, *rest)\n"
        "from fastpref.kernels import triton_engine\n"
        "print(triton_engine.is_available(), triton_engine.unavailable_reason())"
    )
    assert run_python(code) == "False Triton is not installed; pip install 'fastpref[triton]'"


def test_triton_engine_does_not_import_triton_until_it_runs() -> None:
    assert run_python("import sys; import fastpref.kernels.triton_engine; print('triton' in sys.modules)") == "False"


def test_forward_rows_without_triton_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'fastpref\[triton\]'"):
        call_forward()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_forward_rows_on_cpu_tensors_names_the_remedies() -> None:
    pytest.importorskip("triton")
    assert "no CUDA device" in str(triton_engine.unavailable_reason())
    with pytest.raises(ValueError, match=r"got cpu; move them, use backend='torch'"):
        call_forward()


def call_forward() -> None:
    labels_R = torch.zeros(3, dtype=torch.int64)
    head = Head(torch.ones(5, 4), None, 1.0, None)
    triton_engine.forward_rows(torch.ones(3, 4), head, labels_R, fields=LOGP_FIELDS, bound_R=None, with_cache=False)
