"""What a rank leaves when the job hangs: PyTorch's record of its collectives, and where it is itself.

Under NCCL the watchdog writes the record of every rank that still runs, and ends them; the settings below see to it
that it does, and where. Under gloo a rank writes its own when a collective has failed. `fastpref diagnose` reads both.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from fastpref.errors import CheckpointError
from fastpref.files import write_durably
from fastpref.run.record.hang import FOLDER, REPORT, STATE, TRACE, describe_hang, has_traces, read_hang

_PREFIX_NAMES = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
SETTINGS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"), "2000"),
    (("TORCH_NCCL_DUMP_ON_TIMEOUT",), "1"),
    (("TORCH_NCCL_ENABLE_MONITORING",), "1"),
    (("TORCH_NCCL_ASYNC_ERROR_HANDLING", "NCCL_ASYNC_ERROR_HANDLING"), "3"),
    (("TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC",), "60000"),
)
"""Variables of PyTorch, newest name first, and what they are set to where none of the names is set."""
# What an earlier run of this process set, as the folder of its dumps, is no wish of the user's.
_set_here: dict[str, str] = {}
_DUMPERS = ("_dump_fr_trace", "_dump_nccl_trace")


def record_collectives(report_dir: Path) -> None:
    """Have PyTorch record collectives and write the record to `report_dir` when one is not answered.

    Call it before the process group is made. What the user has set stays.
    """
    for names, value in (*SETTINGS, (_PREFIX_NAMES, os.path.abspath(report_dir / FOLDER / TRACE))):
        if not any(name in os.environ and os.environ[name] != _set_here.get(name) for name in names):
            os.environ[names[0]] = _set_here[names[0]] = value


def make_folder(report_dir: Path) -> None:
    """Make the folder of the dumps, which the watchdog does not; where it cannot be made, it writes none."""
    with contextlib.suppress(OSError):
        (report_dir / FOLDER).mkdir(parents=True, exist_ok=True)


def remove_empty_folder(report_dir: Path) -> None:
    """Leave nothing where nothing hung."""
    with contextlib.suppress(OSError):
        (report_dir / FOLDER).rmdir()


def set_aside_earlier(report_dir: Path) -> Path | None:
    """Move what an earlier start left, with a report on it, before this one can leave anything.

    One rank of each node calls it before the process group is made; where they share the directory, one of them acts.

    Returns:
        The folder that holds it now; None where there was nothing.
    """
    folder = report_dir / FOLDER
    with contextlib.suppress(OSError):
        if not has_traces(folder):
            return None
        newest = max(path.stat().st_mtime for path in folder.iterdir())
        aside = folder.with_name(f"{FOLDER}-{time.strftime('%Y%m%d-%H%M%S', time.localtime(newest))}")
        number = 1
        while aside.exists():
            number += 1
            aside = aside.with_name(f"{aside.name.rsplit('.', 1)[0]}.{number}")
        os.rename(folder, aside)
        with contextlib.suppress(CheckpointError):
            write_durably(aside / REPORT, describe_hang(read_hang(aside)).encode())
        return aside
    return None


def write_dump(report_dir: Path) -> None:
    """Write this rank's record, as the watchdog of NCCL would; nothing where PyTorch keeps none or the disk is full."""
    dumpers = [getattr(torch._C._distributed_c10d, name, None) for name in _DUMPERS]
    dump = next((dumper for dumper in dumpers if dumper is not None), None)
    if dump is not None:
        _write(report_dir, TRACE, dump())


def write_state(report_dir: Path, state: Mapping[str, Any]) -> None:
    """Write where this rank is; nothing where the disk is full.

    Args:
        report_dir: of the run.
        state: step, phase, seconds in it, and stack, innermost line first.
    """
    whole = {
        **state,
        "host": socket.gethostname(),
        "time": time.time(),
        "world_size": torch.distributed.get_world_size(),
        "groups": dict(_groups()),
    }
    _write(report_dir, STATE, json.dumps(whole).encode())


def remove_state(report_dir: Path) -> None:
    """Take back what `write_state` wrote: the rank goes on."""
    with contextlib.suppress(OSError):
        _path(report_dir, STATE).unlink()
        (report_dir / FOLDER).rmdir()


def stack_of(thread: int) -> list[str]:
    """Where a thread of this process is, innermost line first."""
    frame = sys._current_frames().get(thread)
    lines = [] if frame is None else traceback.extract_stack(frame)
    return [f"{line.filename}:{line.lineno} in {line.name}" for line in reversed(lines)]


def _path(report_dir: Path, prefix: str) -> Path:
    return report_dir / FOLDER / f"{prefix}{torch.distributed.get_rank()}"


def _write(report_dir: Path, prefix: str, content: bytes) -> None:
    make_folder(report_dir)
    with contextlib.suppress(OSError):
        write_durably(_path(report_dir, prefix), content)


def _groups() -> Iterator[tuple[str, list[int]]]:
    """Names and ranks of this rank's process groups, which the recorder knows under NCCL alone."""
    world = torch.distributed.distributed_c10d._world
    for group, name in world.pg_names.items():
        yield name, torch.distributed.get_process_group_ranks(group)
