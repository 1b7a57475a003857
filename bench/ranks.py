"""The head cut over ranks of tensor parallelism on a CPU: ours beside Megatron's own, one thread a rank.

Four ranks share two cores here, so what is compared is CPU time and memory of the busiest rank, not wall time.

Dims: see `workloads`; `v` are the vocabulary rows of a rank.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from bench.figures import dress, pyplot, save
from bench.implementations import IMPLEMENTATIONS
from bench.measure import Row, extra_peak_mib, fresh_hidden, return_memory
from bench.oracle import Errors, errors, truth, verdict
from bench.plots import STYLES
from bench.registry import call
from bench.workloads import Case, build
from fastpref.testing.workers import RankPool

NAMES = ("ours-active", "ours-exact", "megatron")
SIZES = (1, 2, 4)
LABELS = {**STYLES, "megatron": ("Megatron, all positions", "#1d3557", "v")}


def measure_on_ranks(size: int, workload: str, repeats: int) -> list[dict[str, Row]]:
    """Errors, peak memory and times of every implementation on every rank.

    Args:
        size: ranks of tensor parallelism, one process each.
        workload: a name of `workloads.build`.
        repeats: timed passes after the one that is checked.

    Returns:
        By rank, the row of each implementation.

    Raises:
        WorkerError: a rank failed.
    """
    truth(build(workload))  # which is then on the disk for all
    with RankPool(size, timeout_s=600.0) as pool:
        return pool.run(measure_shard, workload, repeats)


def measure_shard(workload: str, repeats: int) -> dict[str, Row]:
    """Measures this rank's part of the head; every rank of the group calls it."""
    from megatron.core import parallel_state

    from fastpref.trainer import TrainingArguments, initialize_megatron
    from fastpref.trainer.ranks import platform

    size = torch.distributed.get_world_size()
    initialize_megatron(TrainingArguments(tensor_model_parallel_size=size, report_to=()))
    try:
        case, shard = _shard(build(workload), parallel_state.get_tensor_model_parallel_group())
        expected = truth(build(workload))
        expected["d_weight"] = expected["d_weight"][shard]
        rows: dict[str, Row] = {}
        for name in NAMES:
            call(IMPLEMENTATIONS[name], case, case.hidden_SLH, case.weight_VH)  # collectives and threads are awake
            result, peak_mib = extra_peak_mib(
                lambda name=name: call(IMPLEMENTATIONS[name], case, case.hidden_SLH, case.weight_VH)
            )
            found = _of_all_parts(errors(result, expected), expected["d_weight"])
            wrong = verdict(found, None, is_exact=False)
            rows[name] = {"errors": found, "wrong": wrong, "extra_peak_mib": round(peak_mib, 1)}
            rows[name] |= {"wall_s": [], "cpu_s": []}
        del result
        _time(case, rows, repeats)
        return rows
    finally:
        platform.destroy()


def _shard(case: Case, group: torch.distributed.ProcessGroup) -> tuple[Case, slice]:
    """This rank's rows of the weight, in equal parts."""
    height = case.weight_VH.shape[0] // group.size()
    shard = slice(group.rank() * height, (group.rank() + 1) * height)
    return replace(case, weight_VH=case.weight_VH[shard].clone(), tp_group=group), shard


def _of_all_parts(found: Errors, expected_vH: Tensor) -> Errors:
    """Errors with that of the whole weight in place of this rank's part; the others are of what every rank has."""
    part, norm = found["d_weight"], float(expected_vH.norm())
    squares = torch.tensor([(part["relative_l2"] * norm) ** 2, norm**2], dtype=torch.float64)
    largest = torch.tensor([part["max"], part["scale"]], dtype=torch.float64)
    torch.distributed.all_reduce(squares)
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    whole = {"max": float(largest[0]), "relative_l2": math.sqrt(squares[0] / squares[1]), "scale": float(largest[1])}
    return found | {"d_weight": whole}


def _time(case: Case, rows: dict[str, Row], repeats: int) -> None:
    """Adds the times of `repeats` turns to what passed, which is the same on every rank."""
    generator = torch.Generator().manual_seed(4)
    for _ in range(repeats):
        hidden_SLH = fresh_hidden(case, generator)
        for name, row in rows.items():
            if row["wrong"]:
                continue
            return_memory()
            torch.distributed.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            call(IMPLEMENTATIONS[name], case, hidden_SLH, case.weight_VH)
            row["wall_s"].append(round(time.perf_counter() - wall, 4))
            row["cpu_s"].append(round(time.process_time() - cpu, 4))


def busiest(ranks: Sequence[dict[str, Row]], name: str) -> tuple[float, float, float]:
    """(CPU seconds, wall seconds, MiB) of the rank that takes most of each; medians of its passes.

    Raises:
        ValueError: a rank's result was wrong; names what.
    """
    for number, rank in enumerate(ranks):
        if rank[name]["wrong"]:
            raise ValueError(f"{name} on rank {number} of {len(ranks)}: {rank[name]['wrong']}")
    rows = [rank[name] for rank in ranks]
    cpu_s, wall_s = (max(median(row[kind]) for row in rows) for kind in ("cpu_s", "wall_s"))
    return cpu_s, wall_s, max(row["extra_peak_mib"] for row in rows)


def table(row: Row) -> str:
    """Markdown of a measured row."""
    lines = ["| implementation | ranks | CPU of a rank, s | wall, s | extra peak of a rank, MiB |"]
    lines.append("|---|---:|---:|---:|---:|")
    for name in NAMES:
        for size, ranks in row["sizes"].items():
            cpu_s, wall_s, peak_mib = busiest(ranks, name)
            lines.append(f"| {LABELS[name][0]} | {size} | {cpu_s:.2f} | {wall_s:.2f} | {peak_mib:.0f} |")
    return "\n".join(lines)


def draw(row: Row, file: Path) -> None:
    """Draw CPU time and memory of the busiest rank against their number.

    Args:
        row: what the command stores.
        file: the PNG to write.
    """
    sizes = [int(size) for size in row["sizes"]]
    figure, panels = pyplot().subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name in NAMES:
        label, colour, marker = LABELS[name]
        cpu_s, _, peaks_mib = zip(*(busiest(ranks, name) for ranks in row["sizes"].values()), strict=True)
        for panel, values in zip(panels, (cpu_s, peaks_mib), strict=True):
            panel.plot(sizes, values, label=label, color=colour, marker=marker, markersize=5, linewidth=2)
            panel.plot(sizes, [values[0] / size for size in sizes], color=colour, linestyle=":", linewidth=1)
    for panel, title in zip(panels, ("CPU time of a rank (s)", "Extra peak memory of a rank (MiB)"), strict=True):
        ticks = {size: str(size) for size in sizes}
        dress(panel, f"{title}; dotted: the first over the ranks", "ranks of tensor parallelism", ticks)
    shape = row["shape"]
    title = (
        f"DPO head on a CPU: R = {shape['rows']} response rows of {shape['positions']} positions, "
        f"V = {shape['vocab']:,}, H = {shape['hidden']}, fp32"
    )
    save(figure, title, file, panels[0])
