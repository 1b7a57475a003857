"""Figures of a folder of results: time and memory against vocabulary, rows and share of response; a roofline.

Drawn from stored rows alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

from bench.figures import dress, pyplot, save
from bench.gpu.folder import Folder
from bench.gpu.parts import DRY_WORKLOADS, LARGE, MAIN, OTHER_MODELS, OTHER_ROWS, SHARE_SWEEP, VOCAB_SWEEP
from bench.gpu.summary import tflops
from bench.measure import Row
from bench.plots import STYLES
from bench.roofline import Ceilings, Point, draw_roofline, intensity

GPU_STYLES = STYLES | {
    "ours-cached": ("fastpref, cached", "#f4a261", "d"),
    "cce-kernel": ("Apple CCE", "#2a9d8f", "^"),
    "liger-ce": ("Liger cross entropy, Triton", "#b08900", "x"),
    "liger-ce-scaled": ("Liger scaled cross entropy", "#7a5c00", "X"),
    "quack": ("quack cross entropy", "#457b9d", "*"),
}
AXES: dict[str, tuple[tuple[str, ...], str, Callable[[Row], float]]] = {
    "vocab": (VOCAB_SWEEP, "vocabulary", lambda shape: shape["vocab"]),
    "rows": ((OTHER_ROWS[0], MAIN, OTHER_ROWS[1]), "response rows", lambda shape: shape["rows"]),
    "share": (SHARE_SWEEP, "response rows / positions", lambda shape: shape["rows"] / shape["positions"]),
}
"""File name -> (workloads, label, position on the axis)."""
Rows = dict[str, dict[str, Row]]


def draw_all(out: Path, images: Path) -> Iterator[Path]:
    """Draw what a folder has rows for, and yield the files."""
    folder = Folder(out, 0.0, {})
    for axis, (workloads, *_) in AXES.items():
        rows = _right_rows(folder, workloads)
        if len(rows) > 1:
            yield _draw_axis(rows, axis, images / f"gpu-head-{axis}.png")
    rows = _right_rows(folder, (MAIN, LARGE, *OTHER_MODELS, *OTHER_ROWS, *VOCAB_SWEEP, *DRY_WORKLOADS))
    device = folder.rows("sanity.json").get("device", {})
    if rows and device.get("status") == "ok":
        yield _draw_roofline(rows, device, images / "gpu-roofline.png")


def _right_rows(folder: Folder, workloads: tuple[str, ...]) -> Rows:
    found = {workload: folder.rows(f"head-{workload}.json") for workload in workloads}
    right = {workload: {n: row for n, row in rows.items() if row["status"] == "ok"} for workload, rows in found.items()}
    return {workload: rows for workload, rows in right.items() if rows}


def _draw_axis(rows: Rows, axis: str, file: Path) -> Path:
    _, label, position = AXES[axis]
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for name, (title, colour, marker) in GPU_STYLES.items():
        found = sorted((each[name] for each in rows.values() if name in each), key=lambda row: position(row["shape"]))
        if not found:
            continue
        x = [position(row["shape"]) for row in found]
        style = {"label": title, "color": colour, "marker": marker, "markersize": 5}
        left.plot(x, [median(row["times_ms"]["both"][name]) for row in found], **style)
        right.plot(x, [row["extra_peak_mib"]["both"] / 1024 for row in found], **style)
    for panel, title in ((left, "Time, forward + backward (ms)"), (right, "Extra peak memory (GiB)")):
        dress(panel, title, label)
        if axis != "share":
            panel.set_xscale("log", base=2)
    save(figure, f"Preference head on {_device(rows)}", file, left)
    return file


def _draw_roofline(rows: Rows, device: Row, file: Path) -> Path:
    points = [
        Point(name, intensity(row["shape"], 2, is_backward=kind == "both"), tflops(row, kind, name))
        for each in rows.values()
        for name, row in each.items()
        for kind in row["times_ms"]
    ]
    ceilings = Ceilings(device["gemm_tflops"], device["copy_tb_per_s"], "T")
    draw_roofline(points, GPU_STYLES, ceilings, f"Preference head on {_device(rows)}", file)
    return file


def _device(rows: Rows) -> str:
    row = next(iter(next(iter(rows.values())).values()))
    return str(row.get("gpu") or "a CPU, dry")
