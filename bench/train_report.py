"""The Markdown tables of `python -m bench train`."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, median

from bench.measure import Row
from bench.report import BUSY_LOAD, paired_ratio
from bench.train import SETTINGS
from bench.train_rows import ANCHOR

TARGETS = {"packed": 1.2, "shared-precomputed": 2.0}
"""Pairs per second over those of TRL."""
TUNED = "trl-tuned"
OPEN = "<!-- tables: python -m bench train-table --into docs/trainer-benchmark.md -->"
HEADER = (
    "| trainer | activations | s a step | CPU s | pairs/s | tokens/s | response tokens/s | times TRL | times TRL tuned "
    "| MFU | peak, MiB | before training, s | load |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def stored_files(results: Path) -> list[Path]:
    """What `train` has measured, a file for each `--name`, that of the fewest words first."""
    return sorted(results.glob("train-*.json"), key=lambda file: file.stem)


def tables(results: Path) -> str:
    """The table of every stored file."""
    contents = [json.loads(file.read_text(encoding="utf-8")) for file in stored_files(results)]
    return "\n".join(table(content) for content in contents)


def table(content: Row) -> str:
    """What was measured on what, a line for each row, the targets, and the rows without times."""
    timed = {name: content["rows"][name] for name in SETTINGS if content["rows"].get(name, {}).get("runs")}
    lines = [_describe(content), "", HEADER, *(_line(content, timed, name) for name in timed), ""]
    for name, target in TARGETS.items():
        if name in timed:
            ratio = times_faster(timed[name], timed[ANCHOR])
            verdict = f"**{ratio:.2f}** >= {target}" if ratio >= target else f"{ratio:.2f} < {target}"
            lines.append(f"- {SETTINGS[name].title}, over TRL: {verdict}.")
    lines += [
        f"- {SETTINGS[name].title}, activations {SETTINGS[name].activations}: {row['status']}, {row['reason']}"
        for name, row in content["rows"].items()
        if row["status"] != "ok"
    ]
    return "\n".join(lines) + "\n"


def _describe(content: Row) -> str:
    sizes, machine = content["sizes"], content["machine"]
    prompt, chosen, rejected = (mean(pair[part] for pair in content["lengths"]) for part in range(3))
    versions = ", ".join(f"{package} {version}" for package, version in content["versions"].items())
    rates = [run["gflops"] for run in content["gemm"]]
    return (
        f"{sizes['model']}, fp32, DPO; steps of {sizes['pairs']} pairs of {sizes['data']} with {prompt:.0f} prompt, "
        f"{chosen:.0f} chosen and {rejected:.0f} rejected tokens in the mean, at most {sizes['max_length']} a side, "
        f"packed rows of at most {sizes['pack_length']} positions. {machine['cpu']} ({machine['cpu_capability']}), "
        f"{machine['cores']} cores, {machine['memory_gib']} GiB, {sizes['threads']} threads; bare matrix product "
        f"{median(rates):.0f} GFLOP/s ({min(rates):.0f} to {max(rates):.0f}); {versions}; commit {content['commit']}, "
        f"{content['date']}; `{content['command']}`."
    )


def _line(content: Row, timed: dict[str, Row], name: str) -> str:
    row, pairs = timed[name], content["sizes"]["pairs"]
    taken = [seconds for run in row["runs"] for seconds in run["wall_s"]]
    step_s = step_seconds(row)
    # The steps of a run take other pairs, so a rate is that of the mean step.
    steps = len(content["lengths"]) / pairs
    tokens = sum(2 * prompt + chosen + rejected for prompt, chosen, rejected in content["lengths"]) / steps
    response = sum(chosen + rejected for _, chosen, rejected in content["lengths"]) / steps
    load = max(max(run["load_average"]) for run in row["runs"])
    cells = [
        SETTINGS[name].title,
        SETTINGS[name].activations,
        f"{step_s:.2f} ({min(taken):.2f} to {max(taken):.2f})",
        f"{step_seconds(row, 'cpu_s'):.2f}",
        f"{pairs / step_s:.3f}",
        f"{tokens / step_s:.0f}",
        f"{response / step_s:.0f}",
        f"{times_faster(row, timed[ANCHOR]):.2f}",
        f"{times_faster(row, timed[TUNED]):.2f}" if TUNED in timed else "",
        f"{_use(content, name, step_s):.0%}",
        f"{max(run['peak_mib'] for run in row['runs']):.0f}",
        f"{median(run['build_s'] for run in row['runs']):.0f}",
        f"{load:.1f}, busy" if load > BUSY_LOAD else f"{load:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def step_seconds(row: Row, clock: str = "wall_s") -> float:
    """Seconds of the mean step of a run, the median over the runs."""
    return median(mean(run[clock]) for run in row["runs"])


def times_faster(row: Row, than: Row) -> float:
    """Seconds of a step of `than` over those of `row`: the median of the ratios within each turn."""
    return paired_ratio(*((mean(run["wall_s"]) for run in each["runs"]) for each in (than, row)))


def _use(content: Row, name: str, step_s: float) -> float:
    """Operations that a row's step needs over those that a bare product would have done in its time."""
    steps = len(content["lengths"]) / content["sizes"]["pairs"]
    rate = 1e9 * median(run["gflops"] for run in content["gemm"])
    return content["model_flops"][name] / steps / step_s / rate
