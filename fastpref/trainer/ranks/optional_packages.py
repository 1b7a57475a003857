"""Packages that Megatron uses where they are there: each is usable as a whole, or is not there at all.

Megatron asks for them over and over, in pieces, and takes an ImportError alone for an answer. A package that is half
there would be used in some of these places and not in others, and one that fails in another way ends the import.

Import this module before anything of Megatron.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ExtensionFileLoader, ModuleSpec, PathFinder, SourceFileLoader, SourcelessFileLoader
from types import ModuleType
from typing import NamedTuple

import torch


class Failure(NamedTuple):
    """What kept a package from being imported."""

    reason: str
    """The error, in words."""
    package: str
    """The package that is at fault: itself, or one that it imports."""


def failure_of(package: str, modules: Sequence[str]) -> Failure | None:
    """Import what is used of a package; what kept it from being imported, None where nothing did or it is not there."""
    for name in modules:
        try:
            importlib.import_module(name)
        except KeyboardInterrupt:
            raise
        except ModuleNotFoundError as error:
            return None if error.name == package else Failure(str(error), _at_fault(error, package))
        # missing libraries, versions that differ, an empty package, one that exits or panics: each has its own class
        except BaseException as error:
            return Failure(f"{type(error).__name__}: {error}", _at_fault(error, package))
    return None


def _at_fault(error: BaseException, package: str) -> str:
    """The package whose code fails, or lacks what is asked of it; `package` where that is only known to be in it."""
    names = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    if isinstance(error, ImportError):
        name = error.name or ""
        # An extension fails without a frame of its own. A package that is not there at all is missed by the last of
        # these, which must have it; FlashAttention alone is asked for only because its record is there.
        if not isinstance(error, ModuleNotFoundError) or "." in name or name.startswith("flash_attn"):
            names.append(name)
    others = sys.stdlib_module_names | {"fastpref", "torch", ""}
    tops = [top for top in (name.split(".")[0] for name in names) if top not in others]
    return tops[-1] if tops and not tops[-1].startswith(f"{package}_") else package


def hide(*packages: str) -> None:
    """Have every import of these packages, or of a module of theirs, end as if they were not installed."""
    for name in [name for name in sys.modules if name.split(".")[0] in packages]:
        del sys.modules[name]
    for package in packages:
        sys.modules[package] = None  # type: ignore[assignment]


def _load_apex() -> str | None:
    """Hide Apex unless its kernels are there and can run: without them its optimizer refuses to be made."""
    if PathFinder.find_spec("apex") is None:
        return None
    failure = failure_of("apex", ("apex", "amp_C", "apex.multi_tensor_apply", "apex.optimizers"))
    if failure is not None or not torch.cuda.is_available():
        hide("apex", "amp_C")
    return None if failure is None else failure.reason


apex_failure = _load_apex()
"""Why an installed Apex cannot be used; None where it can, or is not installed."""


class _BrokenIsAbsent(MetaPathFinder):
    """Finds what the other finders find; what a module outside of `trusted` raises becomes an ImportError."""

    def __init__(self, trusted: frozenset[str]) -> None:
        self._trusted = trusted

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name.split(".")[0] in self._trusted:
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in others if spec is not None), None)
        # These are made for one module each; others may be shared, or the finder itself.
        if spec is not None and isinstance(spec.loader, SourceFileLoader | SourcelessFileLoader | ExtensionFileLoader):
            spec.loader.exec_module = _or_be_absent(spec.loader.exec_module)  # type: ignore[method-assign,assignment]
        return spec


def _or_be_absent(execute: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
    def exec_module(module: ModuleType) -> None:
        try:
            execute(module)
        except ImportError:
            raise
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            text = f"{module.__name__} cannot be imported: {type(error).__name__}: {error}"
            raise ImportError(text, name=module.__name__) from error

    return exec_module


@contextmanager
def broken_is_absent() -> Iterator[None]:
    """Inside, a package that cannot be imported answers as one that is not installed, in whichever way it fails.

    Those of which an error is an error everywhere are left alone: the interpreter's, PyTorch, Megatron and this one.
    """
    finder = _BrokenIsAbsent(sys.stdlib_module_names | {"torch", "megatron", "fastpref"})
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
