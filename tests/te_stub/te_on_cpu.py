"""Lets the Python code of Transformer Engine run without a GPU, on top of the stand-in for its compiled extension.

Three things stand in its way and are answered when the modules in question are imported, not before: the loader that
looks for shared objects, the checks that CUDA and tensors on it are there, and questions about the device, whose
answers are a Hopper's. What tensors compute is not touched; where they are made is the business of
`fastpref.trainer.ranks.cpu_platform`.

Where a process asks for it (`FP32_ATTENTION` in its environment), attention in fp32 for which Transformer Engine finds
nothing, as with context parallelism, takes the path of 16 bits: its arithmetic shows what 16 bits round away.
"""

import ast
import dataclasses
import functools
import importlib.abc
import importlib.machinery
import os
import sys
import typing
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

HOPPER = SimpleNamespace(major=9, minor=0, multi_processor_count=132, name="H100 (stand-in)", total_memory=80 << 30)
LOADER = "transformer_engine.common"
FP32_ATTENTION = "TE_STUB_FP32_ATTENTION"
CHOICE_OF_ATTENTION = "transformer_engine.pytorch.attention.dot_product_attention.utils"
CONTEXT_PARALLEL = "transformer_engine.pytorch.attention.dot_product_attention.context_parallel"
# More modules that ask whether CUDA or a tensor on it is there, and refuse where it is not.
WANT_CUDA = (
    "transformer_engine.pytorch.module.base",
    "transformer_engine.pytorch.attention.dot_product_attention.backends",
    "transformer_engine.pytorch.attention.dot_product_attention.dot_product_attention",
    "transformer_engine.pytorch.permutation",
)


class _OnCuda(ast.NodeTransformer):
    """Code that takes every tensor to be on CUDA, which is there, and fp32 where 16 bits are asked for."""

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        is_question = node.attr == "is_cuda" and isinstance(node.ctx, ast.Load)
        return ast.copy_location(ast.Constant(True), node) if is_question else node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "to":
            self._stay(node)
        is_question = ast.unparse(node) == "torch.cuda.is_available()"
        return ast.copy_location(ast.Constant(True), node) if is_question else node

    @staticmethod
    def _stay(node: ast.Call) -> None:
        for keyword in node.keywords:
            if keyword.arg == "device" and ast.unparse(keyword.value) == "'cuda'":
                keyword.value = ast.copy_location(ast.Constant("cpu"), keyword.value)

    def visit_List(self, node: ast.List) -> ast.AST:
        if ast.unparse(node) == "[torch.float16, torch.bfloat16]":
            return ast.copy_location(
                ast.parse("[torch.float16, torch.bfloat16, torch.float32]", mode="eval").body, node
            )
        return self.generic_visit(node)


class _CudaLoader(importlib.machinery.SourceFileLoader):
    def path_stats(self, path: str) -> dict[str, Any]:
        raise OSError("no byte code is read or kept: it would not be that of the file")

    def source_to_code(self, data: Any, path: Any, *, _optimize: int = -1) -> Any:
        return compile(_OnCuda().visit(ast.parse(data)), path, "exec", dont_inherit=True, optimize=_optimize)


class _WithoutSharedObjects(importlib.machinery.SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        module.load_framework_extension = lambda framework: None  # type: ignore[attr-defined]


class _ChoiceInFp32(_CudaLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        choose = module.get_attention_backend

        @functools.wraps(choose)
        def choose_in_fp32(attention_params: Any) -> Any:
            import torch

            *choice, available = choose(attention_params)
            is_asked_for = attention_params.qkv_dtype == torch.float32 and FP32_ATTENTION in os.environ
            if any(available) or not is_asked_for:
                return *choice, available
            return choose(dataclasses.replace(attention_params, qkv_dtype=torch.bfloat16))

        module.get_attention_backend = choose_in_fp32  # type: ignore[attr-defined]


class _WaitsOnce:
    """A message that may be waited for again and again, as NCCL's may; gloo's second wait is for another one."""

    def __init__(self, work: Any) -> None:
        self._work = work

    def wait(self) -> None:
        work, self._work = self._work, None
        if work is not None:
            work.wait()


class _MessagesOverGloo(_CudaLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        send_and_receive = module.flash_attn_p2p_communicate

        @functools.wraps(send_and_receive)
        def waited_for_once(*args: Any, **kwargs: Any) -> list[_WaitsOnce]:
            return [_WaitsOnce(work) for work in send_and_receive(*args, **kwargs)]

        module.flash_attn_p2p_communicate = waited_for_once  # type: ignore[attr-defined]


class _Finder(importlib.abc.MetaPathFinder):
    """Finds what the path finds, and has some modules loaded in another way."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name == "transformer_engine":
            _answer_as_hopper()
        kind = _LOADERS.get(name)
        spec = kind and importlib.machinery.PathFinder.find_spec(name, path, target)
        if kind and spec and spec.origin:
            spec.loader = kind(name, spec.origin)
        return spec


_LOADERS: dict[str, type[importlib.machinery.SourceFileLoader]] = {
    **dict.fromkeys(WANT_CUDA, _CudaLoader),
    LOADER: _WithoutSharedObjects,
    CHOICE_OF_ATTENTION: _ChoiceInFp32,
    CONTEXT_PARALLEL: _MessagesOverGloo,
}


def _answer_as_hopper() -> None:
    import torch

    torch.cuda.get_device_properties = lambda *args, **kwargs: HOPPER
    torch.cuda.get_device_capability = lambda *args, **kwargs: (HOPPER.major, HOPPER.minor)
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.device = _SameDevice
    # Marks for a profiler of GPUs.
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *args: 0


class _SameDevice:
    """Takes the place of `torch.cuda.device`, which other libraries name as a class."""

    def __init__(self, device: object) -> None:
        """Take what it takes; there is one device."""

    def __enter__(self) -> None:
        """Enter."""

    def __exit__(self, *exc: object) -> None:
        """Leave."""


def install() -> None:
    """Prepare this interpreter; nothing is imported."""
    # Transformer Engine loads no shared libraries then.
    os.environ["NVTE_PROJECT_BUILDING"] = "1"
    # Its small functions are compiled, for seconds each, where this does not say otherwise.
    os.environ.setdefault("NVTE_TORCH_COMPILE", "0")
    if not hasattr(typing, "override"):  # it is of Python 3.12
        typing.override = lambda method: method
    sys.meta_path.insert(0, _Finder())
