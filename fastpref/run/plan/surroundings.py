"""What a run needs of the machine: directories that are there, free and writable, packages, and variables left alone.

Only what rank 0 does is asked of rank 0: it alone writes logs and makes directories.
"""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

from fastpref.checkpoint import directory
from fastpref.checkpoint.lock import refuse_if_held
from fastpref.data.open_files import hub_hint
from fastpref.errors import MissingDependencyError, Problem, raise_if_any
from fastpref.run.config.arguments import MISSING_WRITERS, TrainingArguments
from fastpref.run.config.run_config import RunConfig

# Transformer Engine's switches of its attention, and the one value that Megatron takes with these settings.
_ATTENTION_SWITCHES = {
    **dict.fromkeys(("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"), "1"),
    "NVTE_APPLY_QK_LAYER_SCALING": "0",
}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def path_problems(config: RunConfig, *, for_training: bool) -> Iterator[Problem]:
    """Yield which of the paths of a run file cannot be used."""
    given = [(key, path) for key, path in _directories(config).items() if path is not None]
    files = [("data.train", path) for path in config.data.train_paths if for_training]
    files += [("data.eval", path) for path in config.data.eval_paths]
    unusable = [
        Problem(key, f": {path!r} begins with ~, which only a shell expands, or holds a NUL; write the path out")
        for key, path in [*given, *files, *_new_directories(config).items()]
        if path.startswith("~") or "\0" in path
    ]
    if unusable:
        yield from unusable
        return
    relative_to = f"relative paths start at the current directory, {Path.cwd()}"
    for key, path in given:
        if not Path(path).is_dir():
            yield Problem(key, f": {path!r} is not a directory; {relative_to}{_model_hint(path)}")
    for key, path in files:
        if not Path(path).exists():
            hint = hub_hint(path)
            yield Problem(key, f": {path!r} does not exist; {relative_to}{hint and f'; {hint}'}")
    for key, path in _new_directories(config).items():
        parent = _nearest_existing(Path(path))
        if not parent.is_dir():
            where = "" if parent == Path(path).absolute() else f"lies in {str(parent)!r}, which "
            yield Problem(key, f": {path!r} {where}exists and is not a directory; choose another")


def variable_problems() -> Iterator[Problem]:
    """Yield which environment variables Megatron would stumble over while it builds a model, of whichever layers."""
    for name, wanted in _ATTENTION_SWITCHES.items():
        value = os.environ.get(name, wanted)
        if value != wanted:
            text = f"is {value!r} in the environment, and Megatron builds no model where it is not {wanted}"
            text += f"; unset {name}"
            yield Problem(name, text)


def check_output(config: RunConfig) -> None:
    """Refuse an output directory that training could not write to, or where it would meet another run.

    Raises:
        ConfigError: it cannot be written, or holds checkpoints that the run does not continue.
        CheckpointError: another process holds it.
    """
    if launched_rank() == 0:
        refuse_if_held(Path(config.training.output_dir))
    raise_if_any(_output_problems(config))


def require_packages(args: TrainingArguments) -> None:
    """Refuse a run whose metrics nothing could write.

    Raises:
        MissingDependencyError: a package of `report_to` is not installed.
    """
    for target in args.report_to if launched_rank() == 0 else ():
        if not is_installed(target):
            raise MissingDependencyError(MISSING_WRITERS[target])


def is_installed(package: str) -> bool:
    """Whether a package can be found; it is not imported."""
    try:
        return find_spec(package) is not None
    except ValueError:  # an entry of sys.modules without a specification
        return False


def launched_rank() -> int:
    """Return this process's number in the process group, else among those of the launcher, else 0."""
    if torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    text = os.environ.get("RANK", "0")
    return int(text) if text.isdecimal() else 0


def _directories(config: RunConfig) -> dict[str, str | None]:
    """Directories that must be there."""
    return {
        "model.path": config.model.path,
        "model.tokenizer": config.model.tokenizer,
        "reference.path": None if config.reference is None else config.reference.path,
        "lora.path": None if config.lora is None else config.lora.path,
    }


def _new_directories(config: RunConfig) -> dict[str, str]:
    """Directories that the run makes where they are not there."""
    cache = {"reference.cache": str(config.reference_cache)} if config.precomputes_reference else {}
    return {"training.output_dir": config.training.output_dir, **cache}


def _model_hint(path: str) -> str:
    """Say what a path may have been meant to be that is no directory; empty where nothing suggests itself."""
    if Path(path).is_file():
        return "; give the directory that holds the file"
    if not _HUB_NAME.fullmatch(path) or Path(path).parent.exists():
        return ""
    name = Path(path).name
    return (
        f"; if this is a name on the Hugging Face Hub, which is not asked here, run `hf download {path} --local-dir "
        f"{name}` and give {name}"
    )


def _output_problems(config: RunConfig) -> Iterator[Problem]:
    args = config.training
    steps = directory.finished_steps(args.checkpoint_root)
    if args.resume_from_checkpoint is None and steps:
        yield Problem(
            "training.output_dir",
            f": {args.output_dir!r} holds the checkpoints of another run (up to step {steps[-1]}); continue it with "
            "training.resume_from_checkpoint=latest, or choose another directory",
        )
    for key, path in _new_directories(config).items() if launched_rank() == 0 else ():
        # a cache that is there is only read
        if key == "training.output_dir" or not Path(path).exists():
            yield from _write_problems(key, Path(path))


def _write_problems(key: str, path: Path) -> Iterator[Problem]:
    """Yield why nothing can be made in a directory, or where it would be made."""
    reason = None
    if not os.access(_nearest_existing(path), os.W_OK | os.X_OK):
        reason = os.strerror(errno.EACCES)
    elif path.is_dir():
        try:
            # what permissions say is not the last word where another machine serves the disk
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            reason = error.strerror
    if reason is not None:
        text = f": {str(path)!r} cannot be written: {reason}; change its permissions, or choose another directory"
        yield Problem(key, text)


def _nearest_existing(path: Path) -> Path:
    """The path, or the first of its parents that is there."""
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
