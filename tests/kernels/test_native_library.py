"""The native library in a process: its build, its threads, and life without it."""

import multiprocessing
import platform
import shutil
import subprocess
import sys

import pytest
import torch
from native_problems import DTYPES, Problem, needs_library, problem, run_native

from fastpref.errors import ConfigError
from fastpref.kernels import native


def test_library_is_built_where_a_compiler_is() -> None:
    """A checkout that can build the engine must not quietly test the fallback."""
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64" or shutil.which("g++") is None:
        pytest.skip("the native engine needs x86-64 Linux and g++")
    assert native.LIBRARY.exists(), f"not built; run {native.REBUILD}"


ONE_RUNTIME = """
import os, torch
from fastpref.kernels import native
from fastpref.kernels.engine import Head
from fastpref.kernels.outputs import LOGP_FIELDS
torch.set_num_threads(2)
head = Head(torch.randn(2000, 64), None, 1.0, None)
before = len(os.listdir("/proc/self/task"))
native.forward_rows(
    torch.randn(64, 64), head, torch.zeros(64, dtype=torch.int64), fields=LOGP_FIELDS, bound_R=None, with_cache=False
)
print(len(os.listdir("/proc/self/task")) - before)
torch.randn(500, 500) @ torch.randn(500, 500)
print(len(os.listdir("/proc/self/task")) - before)
files = {line.split()[-1] for line in open("/proc/self/maps") if "/" in line}
print(sum(name in path for path in files for name in ("libgomp", "libomp", "libiomp")))
"""


@needs_library
def test_native_shares_the_openmp_runtime_of_torch() -> None:
    """One runtime is mapped; the thread that the engine adds is the one that PyTorch's products then use."""
    found = subprocess.run([sys.executable, "-c", ONE_RUNTIME], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["1", "1", "1"]


def token_logps_in_child(given: Problem) -> list[float]:
    return run_native(given).outputs["token_logps"].nan_to_num(nan=1.0).tolist()


@needs_library
def test_native_passes_in_a_forked_process() -> None:
    """As the worker ranks of this suite are: forked from a process that has loaded torch, one thread each."""
    given = problem(10, 16, 300)
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        assert pool.apply(token_logps_in_child, (given,)) == token_logps_in_child(given)


@pytest.mark.usefixtures("reloaded")
def test_native_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTPREF_NATIVE", "0")
    assert not native.is_available() and not native.supports(torch.float32)
    assert "FASTPREF_NATIVE=0; unset it" in native.unavailable_reason()


@pytest.mark.usefixtures("reloaded")
def test_native_with_unknown_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTPREF_NATIVE", "sse2")
    with pytest.raises(
        ConfigError, match=r"FASTPREF_NATIVE must be 0, 1 or one of avx512_bf16, avx512_vnni, .*, avx2, got 'sse2'"
    ):
        native.is_available()


@pytest.mark.usefixtures("reloaded")
def test_native_not_built(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.delenv("FASTPREF_NATIVE", raising=False)
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "libfastpref_cpu.so")
    assert not native.is_available()
    assert "is not built" in native.unavailable_reason() and "build_ext --inplace" in native.unavailable_reason()


@pytest.mark.usefixtures("reloaded")
def test_native_library_that_does_not_load(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.delenv("FASTPREF_NATIVE", raising=False)
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "libfastpref_cpu.so")
    native.LIBRARY.write_bytes(b"not a library")
    assert not native.is_available() and "does not load" in native.unavailable_reason()


@needs_library
@pytest.mark.usefixtures("reloaded")
def test_native_library_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTPREF_NATIVE", raising=False)
    monkeypatch.setattr(native, "ABI_VERSION", native.ABI_VERSION + 1)
    assert not native.is_available() and "another version" in native.unavailable_reason()


@needs_library
def test_native_supports_what_it_multiplies_in_fp32() -> None:
    assert all(native.supports(dtype) for dtype in DTYPES.values())
    assert not native.supports(torch.float64)
