"""Versions of what a run stands on, read from what is installed beside it; nothing of it is imported.

Megatron-Core and Transformer Engine are used through many names that they do not promise to keep, so each has a floor,
which is refused below, and a newest version that the tests of this project have run with. What lies above is remarked
on and not refused: most of it works, what does not work fails aloud, and only its users can try it.

Transformer Engine consists of three distributions that must be of one version: its Python code, the extension for
PyTorch, and the kernels for one major version of CUDA. It fits where Megatron-Core itself declares it, or where the
tests have run the two together.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path

import torch
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from fastpref.errors import Problem, raise_if_any
from fastpref.run.config.arguments import PrecisionArguments

MEGATRON_FLOOR, MEGATRON_TRIED = Version("0.16.1"), Version("0.19.2")
"""The oldest Megatron-Core that is taken, and the newest that the tests have run with."""
ENGINE_FLOOR, ENGINE_TRIED = Version("2.8"), Version("2.20.2")
"""The same of Transformer Engine, whose Python code has run with both of these versions of Megatron-Core."""
# The newest release in the range that Megatron-Core 0.16 declares; from 0.17 on it declares none.
_ENGINE_OF_OLD_MEGATRON = Version("2.11.0")
_MEGATRON, _ENGINE, _EXTENSION = "megatron-core", "transformer-engine", "transformer-engine-torch"
_KERNELS = {12: "transformer-engine-cu12", 13: "transformer-engine-cu13"}
SLOW_WITHOUT_ENGINE = (
    "Transformer Engine is not installed: attention and the optimizer are PyTorch's, norms are not fused with what "
    "follows them, and the experts of a mixture run one after the other"
)
"""What a GPU does without it."""
_LOCAL = "or set training.transformer_impl: local, for Megatron's own layers"


def installed(distribution: str) -> Version | None:
    """Return the version of what is installed; None where it is not, or where its record is not readable."""
    try:
        return Version(metadata.version(distribution))
    # ValueError: bytes that are no text, or text that is no version
    except (metadata.PackageNotFoundError, ValueError, TypeError, KeyError):
        return None


def is_recorded(distribution: str) -> bool:
    """Whether there is a record of it, which may be unreadable."""
    return next(iter(metadata.distributions(name=distribution)), None) is not None


def megatron_problems() -> Iterator[Problem]:
    """Yield why the installed Megatron-Core cannot be used; nothing where there is none."""
    found = installed(_MEGATRON)
    if found is not None and found < MEGATRON_FLOOR:
        text = f"{found} is installed, and at least {MEGATRON_FLOOR} is needed: pip install "
        yield Problem("", f"{_MEGATRON} {text}'{_MEGATRON}>={MEGATRON_FLOOR},<={MEGATRON_TRIED}'")


def engine_problems() -> Iterator[Problem]:
    """Yield why the installed Transformer Engine cannot be used; nothing where there is none of it.

    Nor where a record of it is unreadable, as an uninstallation that was cut leaves them: its import tells.
    """
    if any(is_recorded(name) and installed(name) is None for name in (_ENGINE, _EXTENSION, *_KERNELS.values())):
        return
    engine, extension = installed(_ENGINE), installed(_EXTENSION)
    kernels = {cuda: version for cuda, name in _KERNELS.items() if (version := installed(name)) is not None}
    found = {_ENGINE: engine, _EXTENSION: extension} | {_KERNELS[cuda]: version for cuda, version in kernels.items()}
    parts = {name: version for name, version in found.items() if version is not None}
    if not parts:
        return
    listed = ", ".join(f"{name} {version}" for name, version in parts.items())
    if engine is None:
        reason = f"parts of it are installed without {_ENGINE} itself ({listed})"
    elif len(set(parts.values())) > 1:
        reason = f"its distributions must be of one version, got {listed}"
    elif extension is None and not _has_extension():
        reason = f"{listed} is installed without its extension for PyTorch, {_EXTENSION}"
    elif extension is not None and not kernels:
        reason = f"{listed} is installed without its kernels, one of {', '.join(_KERNELS.values())}"
    elif len(kernels) > 1:
        reason = f"kernels for two versions of CUDA are installed, of which one overwrites the other ({listed})"
    elif (cuda := _cuda_of_torch()) is not None and kernels and cuda not in kernels:
        reason = f"its kernels are for CUDA {min(kernels)} and PyTorch is for CUDA {cuda} ({listed})"
    elif engine < ENGINE_FLOOR:
        reason = f"{engine} is installed, and at least {ENGINE_FLOOR} is needed"
    elif _is_newer(engine, ENGINE_TRIED) and engine not in _declared():
        reason = f"{engine} is installed, but {_MEGATRON} {installed(_MEGATRON)} declares {_declared()}"
    else:
        return
    yield Problem("", f"Transformer Engine cannot be used: {broken_engine(reason)}")


def check_software(args: PrecisionArguments) -> list[str]:
    """Compare the installed software with the settings; returns what is to be known of it and stops nothing.

    What is missing stops nothing where there is no GPU: such a machine checks runs for others.

    Raises:
        ConfigError: it cannot train the run.
    """
    problems, notes = [*megatron_problems()], [*remarks()]
    if args.transformer_impl != "local":
        problems += engine_problems()
    if not is_recorded(_ENGINE) and not problems and installed(_MEGATRON) is not None:
        is_wanted = args.transformer_impl == "transformer_engine"
        if is_wanted and torch.cuda.is_available():
            text = f"is transformer_engine, but it is not installed; {to_install()}, or leave the setting out"
            problems.append(Problem("training.transformer_impl", text))
        elif is_wanted:
            notes.append(f"Transformer Engine is not installed here; where the run trains, {to_install()}.")
        elif args.transformer_impl is None and torch.cuda.is_available():
            notes.append(f"{SLOW_WITHOUT_ENGINE}. {to_install()[0].upper()}{to_install()[1:]}.")
    raise_if_any(problems)
    return notes


def remarks() -> Iterator[str]:
    """Yield what nobody has tried, of what is installed."""
    megatron, engine = installed(_MEGATRON), installed(_ENGINE)
    if megatron is not None and _is_newer(megatron, MEGATRON_TRIED):
        yield f"{_MEGATRON} {megatron} is newer than {MEGATRON_TRIED}, the newest that was tried with this version."
    if engine is None:
        return
    if _is_newer(engine, ENGINE_TRIED):
        yield f"{_ENGINE} {engine} is newer than {ENGINE_TRIED}, the newest that was tried with this version."
    elif engine not in _declared():
        yield (
            f"{_MEGATRON} {megatron} declares {_ENGINE} {_declared()}, and {engine} is installed; Python code of "
            f"{ENGINE_FLOOR} to {ENGINE_TRIED} was tried with it, without a GPU."
        )


def to_install(*options: str) -> str:
    """Say how to install the Transformer Engine that fits; its extension is built where PyTorch is."""
    cuda = _cuda_of_torch()
    with_options = " ".join(("pip install --no-build-isolation", *options))
    command = f'{with_options} "{_ENGINE}[pytorch,core_cu{cuda if cuda in _KERNELS else 13}]=={fitting_engine()}"'
    if cuda is None:
        other = ", with core_cu12 for a PyTorch of CUDA 12"
    else:
        other = "" if cuda in _KERNELS else f" beside a PyTorch of CUDA 13, as it has no kernels for CUDA {cuda}"
    return f"install it with {command}{other} (docs/cluster.md)"


def broken_engine(reason: str, at_fault: str = "transformer_engine") -> str:
    """Say what is wrong with an installed Transformer Engine, and what to do about it.

    Args:
        reason: what is wrong.
        at_fault: the package, by the name that it is imported by, whose import fails.
    """
    if at_fault != "transformer_engine":
        names = " ".join(sorted(set(metadata.packages_distributions().get(at_fault, [at_fault]))))
        # It takes up FlashAttention wherever that is installed, of whichever generation, and fails with it.
        if at_fault.startswith("flash_attn"):
            return f"{reason}; pip uninstall {names}, or build it for this PyTorch, {_LOCAL}"
        return f"{reason}; the fault is in {names}: install a version of it that fits the others (pip check), {_LOCAL}"
    if "cannot open shared object file" in reason or "cuDNN" in reason:
        return f"{reason}; install that library, or put its directory first in LD_LIBRARY_PATH, {_LOCAL}"
    names = " ".join((_ENGINE, _EXTENSION, *_KERNELS.values()))
    # pip keeps the wheel of an extension that it has built, also for another PyTorch.
    return f"{reason}; pip uninstall -y {names}, then {to_install('--no-cache-dir')}, {_LOCAL}"


def fitting_engine() -> Version:
    """Return the release of Transformer Engine to install beside the installed Megatron-Core."""
    return ENGINE_TRIED if ENGINE_TRIED in _declared() else _ENGINE_OF_OLD_MEGATRON


def _is_newer(found: Version, tried: Version) -> bool:
    """Whether a release is newer than one that was tried; builds of one release, as containers have them, are not."""
    return Version(found.public) > tried


def _declared() -> SpecifierSet:
    """The versions of Transformer Engine that the installed Megatron-Core declares in any of its extras."""
    declared = SpecifierSet(prereleases=True)
    try:
        lines = metadata.requires(_MEGATRON) or []
    except (metadata.PackageNotFoundError, ValueError):
        return declared
    for line in lines:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        if requirement.name.lower().replace("_", "-") == _ENGINE:
            declared &= requirement.specifier
    return declared


def _has_extension() -> bool:
    """Whether there is an extension that was built with the Python code, or lies on the path."""
    if PathFinder.find_spec("transformer_engine_torch") is not None:
        return True
    package = PathFinder.find_spec("transformer_engine")
    folders = [] if package is None else [Path(place) for place in package.submodule_search_locations or ()]
    pattern = "transformer_engine_torch*.so"
    return any([*folder.glob(pattern), *folder.glob(f"wheel_lib/{pattern}")] for folder in folders)


def _cuda_of_torch() -> int | None:
    """The major version of CUDA that PyTorch is built for; None for a build without."""
    version = torch.version.cuda
    return None if version is None else int(version.split(".")[0])
