"""Adapter directories as peft writes them: read where they are exactly the adapters that a run asks for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from fastpref.checkpoint.headers import listed
from fastpref.checkpoint.hf import AdapterDirectory
from fastpref.errors import CheckpointError
from fastpref.run.architecture.adapters import adapter_shapes
from fastpref.run.architecture.architecture import Architecture
from fastpref.run.architecture.layouts import Columns, GateUp, QueryKeyValue
from fastpref.run.architecture.lora_config import TARGETS, LoraConfig
from fastpref.run.architecture.model_files import empty_hint
from fastpref.run.architecture.names import EMBEDDING, HEAD, is_expert, parameter_table, unwrapped
from fastpref.run.architecture.peft_settings import MERGE, adapted_modules, setting_problems

_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_[AB]\.weight")
# peft reads a tensor with and without the name that it gives to an adapter unless it is told another.
_DEFAULT_NAME = re.compile(r"(\.lora_[AB])\.default\.(weight)$")
_PREFIX = "base_model.model."
_BEFORE = re.compile(r"^(?:.*\.)?(?=model\.layers\.)")
_OTHER_NAME = re.compile(r"\.lora_[AB]\.[^.]+\.weight$")


class AdapterFiles:
    """An adapter directory as a source of tensors.

    Args:
        path: a directory with `adapter_config.json` and `adapter_model.safetensors`.
        arch: the model that it must fit.
        lora: the settings that it must have been made with.

    Raises:
        CheckpointError: files are missing or damaged, settings differ or are not supported, or tensors do not fit;
            the message lists everything.
    """

    def __init__(self, path: str | Path, arch: Architecture, lora: LoraConfig) -> None:
        self._directory = AdapterDirectory(path)
        self._file_names: dict[str, str] = {}
        twice = []
        for file_name in self._directory.tensors:
            name = _DEFAULT_NAME.sub(r"\1.\2", file_name)
            if name in self._file_names:
                twice.append(name)
            self._file_names[name] = file_name
        self._modules = sorted({match["module"] for match in map(_TENSOR.fullmatch, self._file_names) if match})
        settings = list(setting_problems(self._directory.config, lora, self._modules))
        problems = [f"{name} is there twice, with and without the name of the adapter" for name in twice]
        problems += settings
        if misnamed := self._naming_problems(arch):  # what else is missing or unexpected follows from that
            problems += misnamed
        else:
            problems += self._scope_problems(arch)
            problems += self._tensor_problems(arch, lora, has_remedy=bool(settings))
        if problems:
            raise CheckpointError(f"{path}: {'; '.join(problems)}")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """List all tensors by name."""
        return {name: self._directory.tensors[file_name].shape for name, file_name in self._file_names.items()}

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """Read `[start:stop]` along `dim`."""
        return self._directory.read(self._file_names[name], dim, start, stop)

    def _naming_problems(self, arch: Architecture) -> list[str]:
        """Find tensors of layers that can be adapted under names that peft passes over without a word."""
        linear = _linear_tensors(arch)
        unread = [
            name
            for name in self._file_names
            if name not in linear and (_OTHER_NAME.search(name) or _BEFORE.sub(_PREFIX, unwrapped(name)) in linear)
        ]
        if not unread:
            return []
        return [
            f"tensors carry names under which peft does not read them: {listed(unread, 3)}; save the adapter with "
            "peft's `save_pretrained`, from the model that a wrapper holds"
        ]

    def _scope_problems(self, arch: Architecture) -> Iterator[str]:
        """Compare the layers that have tensors with those that peft would adapt: it reads no others."""
        config, linear = self._directory.config, _linear_modules(arch)
        if config.get("target_modules") is None:
            yield "target_modules is missing, and what peft then adapts depends on its version; add the layers' names"
            return
        try:
            adapted = adapted_modules(config, _modules(arch), linear)
        except ValueError as error:
            yield str(error)
            return
        impossible = sorted(adapted - set(linear))
        if impossible:
            yield f"target_modules names layers that cannot be adapted here: {_parts(impossible)}"
        without = sorted(adapted & set(linear) - set(self._modules))
        if without:
            yield f"adapter_config.json adapts layers of which there are no tensors: {listed(without, 3)}"
        unread = sorted(set(self._modules) & set(linear) - adapted)
        if unread:
            yield (
                f"adapter_config.json leaves out layers of which there are tensors, and peft would not read them: "
                f"{listed(unread, 3)}"
            )

    def _tensor_problems(self, arch: Architecture, lora: LoraConfig, *, has_remedy: bool) -> Iterator[str]:
        found, expected = self.shapes(), adapter_shapes(arch, lora)
        missing = sorted(set(expected) - set(found))
        unexpected = sorted(set(found) - set(expected))
        remedy = self._targets_remedy(arch)
        if missing:
            yield f"missing tensors: {listed(missing)}{remedy}"
        linear = _linear_tensors(arch)
        adaptable = [name for name in unexpected if name in linear]
        if adaptable:
            yield f"unexpected tensors: {listed(adaptable)}{remedy}"
        others = [name for name in unexpected if name not in linear]
        if others:
            yield (
                f"tensors of what cannot be adapted here, only {', '.join(TARGETS)} of dense layers can: "
                f"{listed(others)}{'' if has_remedy else f'; {MERGE}'}"
            )
        wrong = [
            f"{name} is {list(found[name])}, the model needs {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ]
        if wrong:
            yield f"wrong shapes: {listed(wrong)}{empty_hint(found.values())}"

    def _targets_remedy(self, arch: Architecture) -> str:
        """Name the setting that fits the tensors, where there is one."""
        projections = {name.rpartition(".")[2] for name in self._modules}
        whole = {name for name in _linear_modules(arch) if name.rpartition(".")[2] in projections}
        if not projections:
            return ""
        if whole != set(self._modules):
            return f"; an adapter of some layers alone is not supported: {MERGE}"
        return f"; set lora.target_modules to [{', '.join(name for name in TARGETS if name in projections)}]"


def _modules(arch: Architecture) -> list[str]:
    """Every layer with a weight, by its name in transformers; a tied head is a layer there, too."""
    names = [name for layout in parameter_table(arch).values() for name in layout.shapes]
    weights = dict.fromkeys(name for name in [*names, EMBEDDING, HEAD] if name.endswith(".weight"))
    return [name.removesuffix(".weight") for name in weights]


def _linear_modules(arch: Architecture) -> list[str]:
    """The layers that can be adapted, by their names in transformers."""
    return [
        file_name.removesuffix(".weight")
        for name, layout in parameter_table(arch).items()
        if isinstance(layout, Columns | GateUp | QueryKeyValue) and name.endswith(".weight") and not is_expert(name)
        for file_name in layout.shapes
    ]


def _linear_tensors(arch: Architecture) -> set[str]:
    """The names that peft's files can have for layers that can be adapted."""
    return {f"base_model.model.{name}.lora_{kind}.weight" for name in _linear_modules(arch) for kind in "AB"}


def _parts(modules: Iterable[str]) -> str:
    """Name layers of one kind once, as their number does not matter."""
    kinds = dict.fromkeys(re.sub(r"\.\d+", "", name).rpartition("layers.")[2] for name in modules)
    return listed(kinds)
