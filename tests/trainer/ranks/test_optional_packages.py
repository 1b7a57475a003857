"""`import fastpref.trainer` beside broken packages that Megatron uses where they are there, each in its own process.

Every one fails as the real package does, with the class of error that its own code raises.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# Module -> its source; all others of a package are empty.
BROKEN_ENGINES = {
    "empty metapackage": {"transformer_engine": "raise RuntimeError('Found empty `transformer-engine` meta package')"},
    "no kernels": {"transformer_engine": "raise FileNotFoundError('Could not find shared object file')"},
    "versions that differ": {"transformer_engine": "assert False, 'Transformer Engine package version mismatch'"},
    "no cuDNN": {"transformer_engine": "raise OSError('libcudnn.so: cannot open shared object file')"},
    # Its __init__ forgives ImportErrors of the part for PyTorch: a plain `import transformer_engine` succeeds.
    "undefined symbol": {
        "transformer_engine": "try:\n    from . import pytorch\nexcept ImportError:\n    pass",
        "transformer_engine.pytorch": "import sys, types\n"
        "sys.modules['transformer_engine_torch'] = types.ModuleType('transformer_engine_torch')\n"
        "raise ImportError('undefined symbol: _ZN3c104cuda9SetDeviceEi')",
    },
    "cuDNN too old": {"transformer_engine.pytorch": "raise RuntimeError('Transformer Engine requires cuDNN 9.12.0')"},
    "dependency missing": {"transformer_engine.pytorch": "import a_module_that_is_not_there"},
    "FlashAttention of another PyTorch": {
        "transformer_engine.pytorch": "import flash_attn_2_cuda",
        "flash_attn_2_cuda": "raise ImportError('flash_attn_2_cuda.so: undefined symbol: _ZN3c10')",
    },
    "FlashAttention without its libraries": {
        # as the interpreter says it of an extension
        "transformer_engine.pytorch": "raise ImportError('libcudart.so.12: cannot open shared object file', "
        "name='flash_attn_2_cuda', path='flash_attn_2_cuda.so')",
    },
    "FlashAttention 3 of another PyTorch": {
        "transformer_engine.pytorch": "import flash_attn_interface",
        "flash_attn_interface": "raise OSError('_C.abi3.so: undefined symbol: _ZN3c10')",
    },
    # Its record is there, its code is not, or has moved.
    "FlashAttention 3 without its code": {
        "transformer_engine.pytorch": "import flash_attn_3.flash_attn_interface",
    },
    "onnx beside an old ml_dtypes": {
        "transformer_engine.pytorch": "import onnx",
        "onnx": "raise AttributeError('module ml_dtypes has no attribute float4_e2m1fn')",
    },
    "a dependency that lacks another": {
        "transformer_engine.pytorch": "import onnx",
        "onnx": "import a_module_that_is_not_there",
    },
    "a dependency of another version": {
        "transformer_engine.pytorch": "from onnx import a_name_that_is_not_there",
        "onnx": "",
    },
    "exits": {"transformer_engine": "import sys\nsys.exit('no GPU')"},
    "panics": {"transformer_engine.pytorch": "class Panic(BaseException): pass\nraise Panic('called unwrap on None')"},
    "kernels without the Python code": {"transformer_engine": None, "transformer_engine.wheel_lib": ""},
    "syntax of another Python": {"transformer_engine": "print 'of Python 2'"},
}
BROKEN_OTHERS = {
    "Apex without kernels": {"apex": "", "apex.optimizers": "class FusedAdam: pass\nclass FusedSGD: pass"},
    "Apex of another PyTorch": {"apex": "", "amp_C": "raise OSError('libcudart.so.12: cannot open')"},
    "Apex that raises": {"apex": "raise RuntimeError('Apex was built for another PyTorch')"},
    "another package named apex": {"apex": "raise AttributeError('module collections has no attribute Mapping')"},
    "FlashAttention that raises": {
        "flash_attn": "",
        "flash_attn.layers": "",
        "flash_attn.layers.rotary": "raise RuntimeError('operator flash_attn::_forward exists already')",
    },
    "FlashAttention that exits": {"flash_attn": "raise SystemExit(1)"},
    "FlashAttention 3 that raises": {"flash_attn_3": "raise OSError('libcudart.so.13: cannot open')"},
}
# What is at fault where that is not Transformer Engine itself, and what to do about it.
ELSEWHERE = {
    "no cuDNN": "install that library, or put its directory first in LD_LIBRARY_PATH",
    "cuDNN too old": "install that library",
    "FlashAttention of another PyTorch": "pip uninstall flash_attn_2_cuda, or build it for this PyTorch",
    "FlashAttention without its libraries": "pip uninstall flash_attn_2_cuda, or build it for this PyTorch",
    "FlashAttention 3 of another PyTorch": "pip uninstall flash_attn_interface, or build it for this PyTorch",
    "FlashAttention 3 without its code": "pip uninstall flash_attn_3, or build it for this PyTorch",
    "onnx beside an old ml_dtypes": "the fault is in onnx: install a version of it that fits the others (pip check)",
    "a dependency that lacks another": "the fault is in onnx: install",
    "a dependency of another version": "the fault is in onnx: install",
}
CPU_ONLY = {"transformer_engine": "", "transformer_engine.pytorch": "", "transformer_engine_torch": ""}
TOGETHER = {
    **BROKEN_ENGINES["undefined symbol"],
    **BROKEN_OTHERS["Apex without kernels"],
    **BROKEN_OTHERS["FlashAttention that raises"],
}
ANOTHER = {
    **BROKEN_ENGINES["empty metapackage"],
    **BROKEN_OTHERS["another package named apex"],
    **BROKEN_OTHERS["FlashAttention that exits"],
    **BROKEN_OTHERS["FlashAttention 3 that raises"],
}
# (folder of packages, whether there is a GPU, whether Megatron is imported too) -> what the process says
Case = tuple[str, bool, bool]
PROBE = """
import json, os, sys, types, warnings
import torch
import fastpref.run.plan.prepare

def probe(folder, on_gpu, with_megatron):
    sys.path.insert(0, folder)
    torch.cuda.is_available = lambda: on_gpu
    if with_megatron:
        import fastpref.trainer
        from megatron.core import optimizer
        from megatron.core.transformer import mlp, transformer_block
        engines = [transformer_block.HAVE_TE, mlp.HAVE_TE]
        megatron = [optimizer.USING_PYTORCH_OPTIMIZER, *engines, transformer_block.HAVE_APEX]
    else:
        megatron, package = None, types.ModuleType("fastpref.trainer")
        package.__path__ = [os.path.join(os.getcwd(), "fastpref", "trainer")]
        sys.modules["fastpref.trainer"] = package
    from fastpref.errors import ConfigError
    from fastpref.trainer.ranks import optional_packages, transformer_engine
    found = {"megatron": megatron, "apex": optional_packages.apex_failure, "reason": transformer_engine.import_failure}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for wanted in (None, None, "local", "transformer_engine"):
            try:
                found[str(wanted)] = transformer_engine.layer_implementation(wanted)
            except ConfigError as error:
                found[str(wanted)] = str(error)
    names = ("transformer_engine", "transformer_engine_torch")
    found["hidden"] = [sys.modules.get(name, "absent") is None for name in names]
    return found | {"warnings": [str(one.message) for one in caught]}

warnings.filterwarnings("ignore")
for case in json.load(sys.stdin):
    sys.stdout.flush()
    if os.fork() == 0:
        print(json.dumps(probe(*case)), flush=True)
        os._exit(0)
    os.wait()
"""


def write_packages(folder: Path, modules: dict[str, str | None]) -> str:
    """Packages of these modules; None for a folder without code, which Python takes for a namespace."""
    for name, source in modules.items():
        place = folder.joinpath(*name.split("."))
        place.mkdir(parents=True, exist_ok=True)
        for depth in range(name.count(".")):
            parent = folder.joinpath(*name.split(".")[: depth + 1])
            if modules.get(name.split(".")[0], "") is not None:
                (parent / "__init__.py").touch()
        if source is not None:
            (place / "__init__.py").write_text(source + "\n", encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each case says; one process imports PyTorch for all of them, and forks."""
    folder = tmp_path_factory.mktemp("packages")
    packages = {**BROKEN_ENGINES, **BROKEN_OTHERS, "none": {}, "for GPUs": CPU_ONLY, "1": TOGETHER, "2": ANOTHER}
    folders = {
        name: write_packages(folder / str(index), modules) for index, (name, modules) in enumerate(packages.items())
    }
    cases: dict[str, Case] = {name: (place, False, name in ("1", "2")) for name, place in folders.items()}
    cases |= {f"{name}, GPU": (place, True, False) for name, place in folders.items()}
    # Others of these packages are not on the path.
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "RANK": "0"}
    result = subprocess.run(
        [sys.executable, "-c", PROBE],
        input=json.dumps([*cases.values()]),
        capture_output=True,
        text=True,
        env=environment,
    )
    lines = result.stdout.splitlines()
    assert len(lines) == len(cases), result.stderr[-3000:]
    return {name: json.loads(line) for name, line in zip(cases, lines, strict=True)}


@pytest.mark.parametrize("kind", BROKEN_ENGINES)
def test_broken_engine_is_absent_on_a_cpu(said: dict[str, dict[str, Any]], kind: str) -> None:
    found = said[kind]
    assert found["None"] == found["local"] == "local" and found["hidden"] == [True, True]
    assert found["warnings"] == []
    assert f"is installed, but {found['reason']}; " in found["transformer_engine"]


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [
        *((kind, "pip uninstall -y transformer-engine transformer-engine-torch") for kind in BROKEN_ENGINES),
        *ELSEWHERE.items(),
    ],
)
def test_broken_engine_is_refused_on_a_gpu(said: dict[str, dict[str, Any]], kind: str, remedy: str) -> None:
    found = said[f"{kind}, GPU"]
    assert found["None"] == found["transformer_engine"]
    assert found["None"].startswith(
        f"transformer_impl cannot be used: Transformer Engine is installed, but {found['reason']};"
    )
    if remedy.startswith("pip uninstall -y") and kind in ELSEWHERE:
        assert remedy not in found["None"]
    else:
        assert remedy in found["None"]
    assert "training.transformer_impl: local" in found["None"] and found["local"] == "local"


def test_engine_for_gpus_is_hidden_from_megatron_on_a_cpu(said: dict[str, dict[str, Any]]) -> None:
    """Megatron would take its optimizer and its norms of gradients, which do not compute there."""
    assert said["for GPUs"]["hidden"] == [True, True] and said["for GPUs"]["None"] == "local"
    assert "it computes on GPUs and there is none" in said["for GPUs"]["transformer_engine"]
    assert said["for GPUs, GPU"]["None"] == said["for GPUs, GPU"]["transformer_engine"] == "transformer_engine"


def test_gpu_without_engine_is_told_once_what_is_slower(said: dict[str, dict[str, Any]]) -> None:
    (text,) = said["none, GPU"]["warnings"]
    assert said["none, GPU"]["None"] == "local" and said["none"]["warnings"] == []
    for part in ("experts", "attention", "norms", "optimizer", "pip install --no-build-isolation", "docs/cluster.md"):
        assert part in text
    (text,) = said["Apex of another PyTorch, GPU"]["warnings"]
    assert "nor can Apex be used: OSError: libcudart.so.12" in text


@pytest.mark.parametrize("case", ["1", "2"])
def test_megatron_is_imported_beside_broken_packages(said: dict[str, dict[str, Any]], case: str) -> None:
    """And uses none of them in any place: neither layers nor the optimizer, nor Apex's, which lack their kernels."""
    assert said[case]["megatron"] == [True, False, False, False] and said[case]["None"] == "local"
