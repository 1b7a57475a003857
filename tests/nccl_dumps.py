"""Dumps of the flight recorder as a job on GPUs writes them, by the format's description."""

import pickle
from pathlib import Path
from typing import Any

FRAMES = [
    {"name": "all_reduce", "filename": "/env/torch/distributed/distributed_c10d.py", "line": 2900},
    {"name": "train_step", "filename": "/job/train.py", "line": 41},
]


def entry(
    record: int,
    group: str,
    op: str,
    seq: int,
    state: str = "completed",
    *,
    shape: tuple[int, ...] = (8, 4),
    dtype: str = "Float",
    p2p: bool = False,
    description: str = "TENSOR_MODEL_PARALLEL_GROUP",
    out: tuple[int, ...] | None = None,
) -> dict[str, Any]:
    is_done = state == "completed"
    return {
        "frames": FRAMES,
        "record_id": record,
        "pg_id": int(group),
        "process_group": (group, description),
        "collective_seq_id": 0 if p2p else seq,
        "p2p_seq_id": seq if p2p else 0,
        "op_id": record,
        "profiling_name": f"nccl:{op}",
        "time_created_ns": 1_700_000_000_000_000_000 + record,
        "input_sizes": [list(shape)],
        "input_dtypes": [dtype],
        "output_sizes": [list(out or shape)],
        "output_dtypes": [dtype],
        "state": state,
        "time_discovered_started_ns": 1 if state != "scheduled" else None,
        "time_discovered_completed_ns": 2 if is_done else None,
        "retired": is_done,
        "timeout_ms": 600_000,
        "is_p2p": p2p,
    }


def dump(entries: list[dict], groups: dict[str, list[int]], version: str = "2.10") -> dict[str, Any]:
    config = {
        name: {"name": name, "desc": description_of(entries, name), "ranks": str(ranks)}
        for name, ranks in groups.items()
    }
    return {"version": version, "pg_config": config, "comm_lib_version": "2.29.3", "pg_status": {}, "entries": entries}


def description_of(entries: list[dict], group: str) -> str:
    return next((entry["process_group"][1] for entry in entries if entry["process_group"][0] == group), "undefined")


def write(folder: Path, dumps: dict[int, dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for rank, content in dumps.items():
        (folder / f"trace_rank_{rank}").write_bytes(pickle.dumps(content, protocol=2))
    return folder
