"""The tables of README.md and docs/results.md, from the stored results; no number in them is typed by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median

from bench.demo import TITLES, make_command
from bench.implementations import BARE, IMPLEMENTATIONS
from bench.measure import Row
from bench.report import paired_ratio, peak_mib, ratio, read_rows, seconds
from bench.train import SETTINGS
from bench.train_report import TUNED, step_seconds, stored_files, times_faster
from bench.train_rows import ANCHOR

OPEN = "<!-- table: python -m bench readme -->"
OURS, EXACT, NAIVE = "ours-active", "ours-exact", "naive-rows"
SCREENED, SHARED = "ours-screened", "ours-screened-shared"
BEST = "shared-precomputed"
HEADS = {"gemma3-270m": "Gemma-3-270m", "smollm2-135m": "SmolLM2-135M"}
Line = tuple[str, str, str]
"""What was measured, the result, the command."""
Section = Callable[[Path], Iterator[Line]]


def headline(results: Path) -> str:
    """Return the few lines of README.md, as Markdown.

    Args:
        results: directory of the stored results; what has no file there has no line.
    """
    lines = [*_head_headline(results), *_train_headline(results), *_dropin_headline(results)]
    checked = {
        "training steps of SmolLM2-135M beside TRL's": _parity_trl,
        "every parallel layout against one process": _parity_layouts,
        "SIGKILL at every step and every file operation of a save": _kill_matrix,
    }
    for what, section in checked.items():
        lines += [(what, re.split(r";| \(\[", result)[0]) for _, result, _ in section(results)]
    return "\n".join(["| what | result |", "|---|---|", *(f"| {what} | {result} |" for what, result in lines)])


def table(results: Path) -> str:
    """Return the tables of docs/results.md, a line for each thing measured.

    Args:
        results: directory of the stored results; what has no file there has no line.
    """
    timed = (_heads, _scores, _trains, _packings, _references, _dropins, _saves, _save_memory, _demos)
    checked = (_parity_trl, _parity_layouts, _parity_te, _kill_matrix, _soak)
    return f"{_table(timed, results)}\n\nChecked, not timed:\n\n{_table(checked, results)}"


def _table(sections: Sequence[Section], results: Path) -> str:
    lines = [line for section in sections for line in section(results)]
    rows = [f"| {what} | {result} | `{command}` |" for what, result, command in lines]
    return "\n".join(["| what | result | command |", "|---|---|---|", *rows])


def _right_rows(file: Path) -> dict[str, Row]:
    rows = read_rows(file) if file.exists() else {}
    return {name: row for name, row in rows.items() if row["status"] == "ok"}


def _head_headline(results: Path) -> Iterator[tuple[str, str]]:
    rows = _right_rows(results / "head-gemma3-270m.json")
    if {OURS, EXACT, NAIVE} <= set(rows):
        ours, exact, naive = rows[OURS], rows[EXACT], rows[NAIVE]
        shape, error = ours["shape"], ours["errors"]["d_hidden"]["relative_l2"]
        yield (
            f"DPO head of Gemma-3-270m ({shape['vocab']:,} tokens), forward and backward",
            f"naive torch on the same rows takes **{ratio(naive, NAIVE, OURS):.1f} x** the time and "
            f"{naive['extra_peak_mib'] / ours['extra_peak_mib']:.0f} x the memory; our gradients are off by "
            f"{error:.1e}. Exact ones take {ratio(exact, EXACT, NAIVE):.2f} of its time, "
            f"{exact['extra_peak_mib'] / naive['extra_peak_mib']:.2f} of its memory",
        )
    if SCREENED in rows:
        yield (
            "the same, screened",
            f"**{ratio(rows[SCREENED], SCREENED, BARE):.2f} x** one product `X @ W.T`; log-probs off by "
            f"{rows[SCREENED]['errors']['token_logps']['rms']:.1e} nat",
        )
    scores = _right_rows(results / "score-gemma3-270m.json")
    if SHARED in scores:
        yield (
            "its log-probs alone, screened",
            f"**{ratio(scores[SHARED], SHARED, BARE):.2f} x** one product",
        )


def _token_error(row: Row) -> str:
    tokens = row["errors"]["token_logps"]
    return f"log-prob of a token off by {tokens['rms']:.1e} nat (root mean square), {tokens['max']:.1e} at most"


def _train_headline(results: Path) -> Iterator[tuple[str, str]]:
    for file in stored_files(results):
        rows = _timed_rows(json.loads(file.read_text(encoding="utf-8")))
        if {ANCHOR, TUNED, BEST} <= set(rows):
            best = rows[BEST]
            yield (
                "DPO step of SmolLM2-135M: packed, prompts shared, reference precomputed",
                f"**{times_faster(best, rows[ANCHOR]):.1f} x** the pairs per second of TRL's defaults, which recompute "
                f"activations; {times_faster(best, rows[TUNED]):.1f} x those of TRL tuned, which keeps them as we do",
            )


def _timed_rows(content: Row) -> dict[str, Row]:
    return {name: row for name, row in content["rows"].items() if row.get("runs")}


def _dropin_headline(results: Path) -> Iterator[tuple[str, str]]:
    for _, result, _ in _dropins(results):
        yield "TRL's own `DPOTrainer` with this op inside, one changed import", result.partition(";")[0]


def _heads(results: Path) -> Iterator[Line]:
    """Ours on each head, then the others that were timed on it."""
    for workload, model in HEADS.items():
        rows = _right_rows(results / f"head-{workload}.json")
        if OURS not in rows:
            continue
        command, ours = f"python -m bench head --workload {workload}", rows[OURS]
        shape, errors = ours["shape"], ours["errors"]
        yield (
            f"head of {model} (V={shape['vocab']}, H={shape['hidden']}, fp32) on {shape['sequences'] // 2} real pairs, "
            f"{shape['rows']} response rows; DPO loss, forward and backward; active plan",
            f"**{seconds(ours, OURS):.2f} s**, {ratio(ours, OURS, BARE):.2f} x the bare product "
            f"`X @ W.T`; peak +{ours['extra_peak_mib']:.0f} MiB; error of the gradients "
            f"{errors['d_hidden']['relative_l2']:.1e} (hidden), {errors['d_weight']['relative_l2']:.1e} (weight)",
            command,
        )
        if EXACT in rows and NAIVE in rows:
            exact, naive = rows[EXACT], rows[NAIVE]
            yield (
                "- with exact gradients",
                f"{seconds(exact, EXACT):.2f} s, {ratio(exact, EXACT, NAIVE):.2f} x naive torch; "
                f"{exact['extra_peak_mib'] / naive['extra_peak_mib']:.2f} of its peak memory",
                command,
            )
        yield from _screened(rows, command)
        for name, row in rows.items():
            if not IMPLEMENTATIONS[name].is_ours:
                yield (
                    f"- by {IMPLEMENTATIONS[name].title}",
                    f"{ratio(row, name, OURS):.1f} x the time, "
                    f"{row['extra_peak_mib'] / ours['extra_peak_mib']:.1f} x the memory",
                    command,
                )


def _screened(rows: dict[str, Row], command: str) -> Iterator[Line]:
    """The head with a screened forward pass; `rows` has ours."""
    for name, what in ((SCREENED, "screened forward pass"), (SHARED, "the same, int8 copy of the weight shared")):
        if name in rows:
            row, errors = rows[name], rows[name]["errors"]
            yield (
                f"- with a {what}" if name == SCREENED else f"- {what}",
                f"{seconds(row, name):.2f} s, **{ratio(row, name, BARE):.2f} x** the bare product, "
                f"{ratio(row, name, OURS):.2f} x the active plan; peak +{peak_mib(row):.0f} MiB; {_token_error(row)}; "
                f"error of the gradients {errors['d_hidden']['relative_l2']:.1e} (hidden), "
                f"{errors['d_weight']['relative_l2']:.1e} (weight)",
                command,
            )


def _scores(results: Path) -> Iterator[Line]:
    """Passes without a gradient."""
    for workload, model in HEADS.items():
        rows = _right_rows(results / f"score-{workload}.json")
        for name, row in rows.items():
            anchor = "" if name == row["ours"] else f", {ratio(row, name, row['ours']):.2f} x the time of exact"
            yield (
                f"head of {model}, log-probs without a gradient, by {IMPLEMENTATIONS[name].title}",
                f"{seconds(row, name):.2f} s, {ratio(row, name, BARE):.2f} x the bare product{anchor}; peak "
                f"+{peak_mib(row):.0f} MiB; {_token_error(row)}",
                f"python -m bench score --workload {workload}",
            )


def _packings(results: Path) -> Iterator[Line]:
    for file in sorted(results.glob("packing-*.json")):
        row = json.loads(file.read_text(encoding="utf-8"))
        lengths, shapes = row["lengths"], row["shapes"]
        taken = [median(row["times"][kind]["wall_s"]) / shape["pairs"] for kind, shape in shapes.items()]
        positions = [shape["positions_per_pair"] for shape in shapes.values()]
        padding = [shape["padding_fraction"] for shape in shapes.values()]
        packed, shared = list(shapes)[1:]
        sharing = paired_ratio(row["times"][packed]["wall_s"], row["times"][shared]["wall_s"])
        yield (
            f"SmolLM2-135M, DPO steps on real pairs of a file with {lengths['prompt']:.0f} prompt, "
            f"{lengths['chosen']:.0f} chosen and {lengths['rejected']:.0f} rejected tokens in the mean: "
            f"{'; '.join(shapes)}",
            f"{', '.join(f'{value:.1f}' for value in taken)} s a pair; "
            f"{', '.join(f'{value:.0f}' for value in positions)} positions a pair, of which padding "
            f"{', '.join(f'{value:.1%}' for value in padding)}; sharing **{sharing:.2f} x** over packing",
            row["command"],
        )


def _references(results: Path) -> Iterator[Line]:
    for file in sorted(results.glob("reference-*.json")):
        row = json.loads(file.read_text(encoding="utf-8"))
        share = paired_ratio(*(row["times"][kind]["cpu_s"] for kind in ("precomputed", "model")))
        saved_mib = row["memory"]["model"]["peak_mib"] - row["memory"]["precomputed"]["peak_mib"]
        yield (
            "the same model, a step without the reference's forward pass (precomputed)",
            f"{share:.2f} x the CPU time; {saved_mib:.0f} MiB less at the peak",
            row["command"],
        )


def _trains(results: Path) -> Iterator[Line]:
    """Steps of the trainer over those of TRL's."""
    for file in stored_files(results):
        content = json.loads(file.read_text(encoding="utf-8"))
        rows, pairs = _timed_rows(content), content["sizes"]["pairs"]
        for name, row in rows.items() if ANCHOR in rows else ():
            yield (
                f"DPO step of SmolLM2-135M, fp32, equal metrics: {SETTINGS[name].title}",
                f"{step_seconds(row) / pairs:.1f} s a pair, **{times_faster(row, rows[ANCHOR]):.2f} x** the pairs per "
                f"second of TRL; peak {max(run['peak_mib'] for run in row['runs']):.0f} MiB, activations "
                f"{SETTINGS[name].activations} ({content['machine']['cpu']})",
                content["command"],
            )


def _dropins(results: Path) -> Iterator[Line]:
    """TRL's trainer with the op inside over the same without it."""
    for file in sorted(results.glob("dropin-*.json")):
        row = json.loads(file.read_text(encoding="utf-8"))
        theirs_s, ours_s = (median(row["times"][kind]["wall_s"]) for kind in ("trl", "fastpref"))
        memory = row["memory"]
        theirs_mib, ours_mib = (memory[kind]["peak_mib"] - memory[kind]["before_mib"] for kind in ("trl", "fastpref"))
        worst = max(row["differences"].values())
        yield (
            f"TRL's own `DPOTrainer` on SmolLM2-135M, {row['shape']['precision']}, {row['shape']['pairs']} pairs, "
            "with this op for the log-probs",
            f"{theirs_s:.1f} s -> **{ours_s:.1f} s** a pass, peak {theirs_mib:.0f} -> **{ours_mib:.0f} MiB** above the "
            f"models; every metric within {worst:.1e}",
            row["command"],
        )


def _saves(results: Path) -> Iterator[Line]:
    """What a checkpoint makes training wait for."""
    for file in sorted(results.glob("save-*.json")):
        row = json.loads(file.read_text(encoding="utf-8"))
        total_s, blocked_s = min(row["sync"]["total_s"]), min(row["async"]["blocked_s"])
        yield (
            f"checkpoint of SmolLM2-135M with AdamW's moments, {row['bytes'] / 2**30:.2f} GiB: save that training "
            "waits for; with `async_save`",
            f"{total_s:.2f} s; training stands still for {blocked_s:.2f} s",
            row["command"],
        )


def _save_memory(results: Path) -> Iterator[Line]:
    """Host memory of a save by data-parallel ranks."""
    if (file := results / "memory-of-saves.json").exists():
        content = json.loads(file.read_text(encoding="utf-8"))
        most: dict[str, list[str]] = {}
        for row in content["rows"]:
            peak = max(rank["peak_mib"] * 2**20 / rank["parameters"] for rank in row["ranks"])
            most.setdefault(row["way"], []).append(f"{peak:.1f}")
        ranks = ", ".join(str(len(row["ranks"])) for row in content["rows"] if row["way"] == "owned")
        yield (
            f"host memory of a save, bytes a parameter of the fullest of {ranks} data-parallel ranks (bf16, sharded "
            "optimizer)",
            f"{', '.join(most['owned'])}; where the optimizer is gathered, as in earlier versions: "
            f"{', '.join(most['gathered'])}",
            content["command"],
        )


def _demos(results: Path) -> Iterator[Line]:
    """The demo with each of its losses."""
    for loss, title in TITLES.items():
        if (file := results / f"demo-{loss}.json").exists():
            row = json.loads(file.read_text(encoding="utf-8"))
            before, after = row["accuracies"]
            minutes, rest = divmod(round(row["seconds"]), 60)
            yield (
                f"demo, {title}: held-out `rewards/accuracies`",
                f"{before:.3f} -> **{after:.3f}** in {row['steps']} steps; the whole demo {minutes} min {rest} s",
                make_command(row),
            )


def _parity_trl(results: Path) -> Iterator[Line]:
    if (file := results / "parity_trl.json").exists():
        content = json.loads(file.read_text(encoding="utf-8"))
        counts = [
            f"{run['name']} {sum(found['agrees'] for found in run['comparisons'])} of {len(run['comparisons'])}"
            for run in content["runs"]
        ]
        worst = max(run["worst"]["relative_difference"] for run in content["runs"])
        same = all(run["tokens_identical"] for run in content["runs"])
        yield (
            f"SmolLM2-135M, {content['runs'][0]['settings']['steps']} steps against TRL {content['versions']['trl']}",
            f"{' and '.join(counts)} values within {content['limit']:g} relative (largest {worst:.1e}), tokens "
            f"{'identical' if same else 'not identical'} ([parity-trl.md](parity-trl.md))",
            "make parity-trl",
        )


def _parity_layouts(results: Path) -> Iterator[Line]:
    if (file := results / "parity_layouts.json").exists():
        rows = json.loads(file.read_text(encoding="utf-8"))
        exact = [row for row in rows if row["precision"] == "fp32"]
        most = {name: max(row[name] for row in exact) for name in ("loss", "grad_norm", "metrics", "updates")}
        yield (
            "every layout of TP, SP, PP, VPP, CP, EP and DP against one process, padded, packed and with shared "
            "prompts, DPO and ORPO, 3 steps each",
            f"{sum(row['agrees'] for row in rows)} of {len(rows)} train like one process; the {len(exact)} in fp32: "
            f"loss within {most['loss']:.1e}, `grad_norm` {most['grad_norm']:.1e}, any metric {most['metrics']:.1e}, "
            f"any weight's update {most['updates']:.1e} ([parallelism.md](parallelism.md))",
            "make parity",
        )


def _parity_te(results: Path) -> Iterator[Line]:
    """Models of Transformer Engine's layers against Megatron's own; a file for each pair of versions."""
    contents = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(results.glob("parity_te-*.json"))]
    if contents:
        cases = [case for content in contents for case in content["cases"]]
        exact = [case for case in cases if case.get("precision") == "fp32" and "loss" in case]
        most = {name: max(case[name] for case in exact) for name in ("loss", "grad_norm", "metrics", "updates")}
        versions = {
            f"{name} {', '.join(sorted({content['versions'][package] for content in contents}))}"
            for name, package in (("Transformer Engine", "transformer-engine"), ("Megatron-Core", "megatron-core"))
        }
        yield (
            "layers of Transformer Engine over a stand-in for its extension against Megatron's own: every layout, "
            f"adapters, resuming, resharding ({'; '.join(sorted(versions))})",
            f"{sum(case['agrees'] for case in cases)} of {len(cases)} train alike; the {len(exact)} in fp32: loss "
            f"within {most['loss']:.1e}, `grad_norm` {most['grad_norm']:.1e}, any metric {most['metrics']:.1e}, "
            f"any weight's update {most['updates']:.1e} ([parallelism.md](parallelism.md))",
            "make parity-te",
        )


def _kill_matrix(results: Path) -> Iterator[Line]:
    if (file := results / "kill_matrix.json").exists():
        runs = json.loads(file.read_text(encoding="utf-8"))["runs"]
        equal = sum(run["result"] == "bitwise equal" for run in runs)
        yield (
            "SIGKILL of one rank or all at every step and every file operation of a save, then continued: DP2 with a "
            "sharded optimizer, TP2, PP2, and DP2 with asynchronous saves",
            f"{equal} of {len(runs)} runs end bit for bit like the undisturbed one ([reliability.md](reliability.md))",
            "make kill-matrix",
        )


def _soak(results: Path) -> Iterator[Line]:
    """Random kills, with saves that training waits for and with saves beside it."""
    beside = "python -m checks.soak --seed 1 --output bench/results/soak_async.json training.async_save=true"
    for name, how, command in (("soak", "", "make soak"), ("soak_async", " while it saves beside training", beside)):
        if (file := results / f"{name}.json").exists():
            row = json.loads(file.read_text(encoding="utf-8"))
            yield (
                f"{row['steps']} steps of the demo on {row['ranks']} ranks, {len(row['hits'])} times killed at random "
                f"and started again{how}",
                f"the end is {row['result']} to that of the undisturbed run ([reliability.md](reliability.md))",
                command,
            )
