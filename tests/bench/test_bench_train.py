"""The benchmark of training steps: rows that answer as TRL does, in turns, and what is counted as needed."""

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

pytest.importorskip("trl", reason="the other trainer of this benchmark is TRL (extra trl)")

# Imported before Megatron is made to run on a CPU, after which it cannot be.
from transformers import LlamaForCausalLM  # noqa: F401

from bench import __main__ as cli
from bench import pages, train, train_report, train_rows
from bench.commands.shared import RESULTS
from bench.measure import gemm_rate
from bench.train_rows import Plan
from bench.workloads import ROOT
from fastpref.data import Segments
from fastpref.data.segments import Segment
from fastpref.trainer import TrainingArguments
from fastpref.trainer.ranks.platform import destroy

PAIRS = ROOT / "examples" / "data_real" / "pairs.jsonl"
MAX_LENGTH = 640
"""Of tokens; the longest pair has 617."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    train.write_tiny_model(folder)
    return folder


def plan_of(model: Path, **changes: int) -> Plan:
    sizes = {"pairs": 2, "steps": 1, "max_length": MAX_LENGTH, "pack_length": 2048, "threads": 1} | changes
    return Plan(model=str(model), data=str(PAIRS), **sizes)


def test_train_bench_times_rows_that_answer_as_trl(tmp_path: Path) -> None:
    # Liger would put its kernels into transformers for the tests that follow; it runs in a process of its own only.
    names = ["trl-tuned", "padded", "shared-precomputed", "padded-recomputed", "shared-recomputed", "trl-padding-free"]
    sizes = ["--data", PAIRS, "--max-length", MAX_LENGTH, "--pack-length", 2048, "--turns", 1, "--threads", 1]
    arguments = ["train", "--dry", "--only", ",".join(names), "--out", tmp_path, *sizes]
    try:
        result = CliRunner().invoke(cli.main, [str(argument) for argument in arguments], catch_exceptions=False)
    finally:
        destroy()
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "train-dry.json").read_text())
    rows = content["rows"]
    refused = rows.pop("trl-padding-free")
    assert refused["status"] == "failed" and "padding_free=True and takes False" in refused["reason"]
    assert {name: row["status"] for name, row in rows.items()} == dict.fromkeys(["trl", *names[:-1]], "ok")
    runs = {name: row["runs"][0] for name, row in rows.items()}
    assert all(len(run["steps"]) == 3 and len(run["wall_s"]) == 1 and run["wall_s"][0] > 0 for run in runs.values())
    # Policy and reference are equal at the first step only.
    assert [step["rewards/margins"] != 0.0 for step in runs["padded"]["steps"]] == [False, True, True]
    assert "entropy" in runs["shared-precomputed"]["steps"][0] and "entropy" not in runs["trl-tuned"]["steps"][0]
    for activations in ("kept", "recomputed"):
        title = f"fastpref, packed, prompt shared, precomputed reference | {activations} | "
        assert title in result.output
    # What is recomputed has the bits of what is kept.
    assert runs["padded-recomputed"]["steps"] == runs["padded"]["steps"]
    document = tmp_path / "page.md"
    document.write_text(f"before\n{train_report.OPEN}\nold\n{pages.CLOSE}\nafter\n")
    CliRunner().invoke(cli.main, ["train-table", "--out", str(tmp_path), "--into", str(document)])
    table = document.read_text().removeprefix(f"before\n{train_report.OPEN}").removesuffix(f"{pages.CLOSE}\nafter\n")
    assert table.strip() and table.strip() in result.output


class Runs:
    """Stands for the processes of `measure_rows`: rows that took as long as their name has letters."""

    def __init__(self, margins: dict[str, float] | None = None) -> None:
        self.margins = margins or {}
        self.names: list[str] = []

    def __call__(self, function: Callable, *arguments: object) -> dict:
        if function is gemm_rate:
            return {"gflops": 100.0}
        assert function is train.run_row
        name = str(arguments[0])
        self.names.append(name)
        step = dict.fromkeys(train.parity_run(train.SETTINGS["trl"], "", "", 1, 1, 1, Path()).metrics, 1.0)
        step["rewards/margins"] = self.margins.get(name, 1.0)
        times = {"wall_s": [float(len(name))], "cpu_s": [2.0 * len(name)], "peak_mib": 9.0, "build_s": 1.0}
        return {"steps": [step] * 3, "threads": 1, **times}


def measure(model: Path, folder: Path, runs: Runs, turns: int = 2, minutes: float = 1.0, **changes: int) -> dict:
    names, file = ["trl", "padded", "packed"], folder / "rows.json"
    return train_rows.measure_rows(plan_of(model, **changes), names, turns, minutes, file, folder, runs)


def test_measure_rows_takes_turns_there_and_back(model: Path, tmp_path: Path) -> None:
    runs = Runs()
    content = measure(model, tmp_path, runs)
    assert runs.names == ["trl", "padded", "packed", "packed", "padded", "trl"]
    assert len(content["gemm"]) == 2
    table = train_report.table(content)
    assert "| fastpref, packed | kept | 6.00 (6.00 to 6.00) | 12.00 | 0.333 |" in table
    assert "- fastpref, packed, over TRL: 0.50 < 1.2." in table


def test_measure_rows_goes_on_where_it_stopped(model: Path, tmp_path: Path) -> None:
    assert measure(model, tmp_path, Runs(), minutes=0.0)["rows"] == {"trl": {"status": "ok", "runs": []}}
    measure(model, tmp_path, Runs(), turns=1)
    later = Runs()
    content = measure(model, tmp_path, later)
    assert later.names == ["packed", "padded", "trl"]
    assert all(len(row["runs"]) == 2 for row in content["rows"].values())
    with pytest.raises(click.ClickException, match="holds runs of another sizes"):
        measure(model, tmp_path, Runs(), pack_length=1024)


def test_measure_rows_keeps_no_times_of_other_answers(model: Path, tmp_path: Path) -> None:
    content = measure(model, tmp_path, Runs({"packed": 1.01}))
    assert content["rows"]["packed"] == {
        "status": "wrong",
        "reason": "rewards/margins of step 1 is 1.01, TRL's 1",
        "runs": [],
    }
    assert len(content["rows"]["padded"]["runs"]) == 2
    assert "- fastpref, packed, activations kept: wrong, rewards/margins" in train_report.table(content)


def test_difference_looks_at_rewards_of_the_first_step_where_they_are_exact() -> None:
    step = Runs()(train.run_row, "trl")["steps"][0]
    other = step | {"rewards/margins": 1.01}
    for name, at_first in (("shared", "rewards/margins of step 1"), ("shared-precomputed", None)):
        setting = train.SETTINGS[name]
        first = train_rows.difference(setting, [step] * 3, [other, step, step])
        assert first is None if at_first is None else first is not None and first.startswith(at_first)
        second = train_rows.difference(setting, [step] * 3, [step, other, step])
        assert second is not None and second.startswith("rewards/margins of step 2")


def test_order_pairs_times_neighbours_of_average_length(model: Path, tmp_path: Path) -> None:
    # A mean of 20.4 words: of the neighbours that are not among the shortest, 10 and 30 come nearest.
    words = [60, 1, 60, 1, 10, 1, 10, 30, 1, 30]
    parts = {"prompt": ("user", "the "), "chosen": ("assistant", "the "), "rejected": ("assistant", "a ")}
    lines = [
        json.dumps({name: [{"role": role, "content": word * count}] for name, (role, word) in parts.items()})
        for count in words
    ]
    data, ordered = tmp_path / "pairs.jsonl", tmp_path / "ordered.jsonl"
    data.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    plan = replace(plan_of(model), data=str(data))
    lengths = train_rows.order_pairs(plan, ordered)
    chosen = [json.loads(line)["chosen"][0]["content"] for line in ordered.read_text().splitlines()]
    assert [answer.count("the") for answer in chosen] == [1] * 4 + [10, 30]
    assert len(lengths) == 2 and all(long > 2 * short for short, long in zip(*lengths, strict=True))
    with pytest.raises(click.ClickException, match="10 lines and 10 usable pairs"):
        train_rows.order_pairs(replace(plan, steps=4), ordered)


def test_page_holds_what_was_measured() -> None:
    document = (ROOT / "docs" / "trainer-benchmark.md").read_text(encoding="utf-8")
    assert pages.replace_tables(document, train_report.tables(RESULTS), train_report.OPEN) == document


def test_settings_say_what_becomes_of_activations() -> None:
    import trl

    assert {field.name: field.default for field in fields(trl.DPOConfig)}["gradient_checkpointing"] is True
    assert TrainingArguments().recompute_granularity is None
    recomputed = {name for name, setting in train.SETTINGS.items() if setting.activations == "recomputed"}
    ours = {"padded-recomputed", "shared-recomputed"}
    assert recomputed == ours | {"trl", "trl-precomputed", "trl-padding-free", "trl-liger"}


@pytest.mark.parametrize("name", ["padded", "shared", "shared-precomputed"])
def test_model_flops_counts_each_position_and_what_it_sees(model: Path, name: str) -> None:
    arch, setting = train_rows.architecture(str(model)), train.SETTINGS[name]
    prompt, chosen, rejected = 50, 20, 30
    kept = prompt - 1 if setting.shares_prompts else 0
    if setting.shares_prompts:
        bounds = Segment(0, kept, kept + 1 + chosen, kept + 2 + chosen + rejected)
    else:
        bounds = Segment(0, 0, prompt + chosen, 2 * prompt + chosen + rejected)
    # Each product with a weight is two operations; so are a score and its value, for half of a position's own square.
    hidden, ffn, layers = 32, 64, 2
    weights = hidden * (hidden + 2 * 16 + hidden + 3 * ffn)
    allowed_LL = Segments((bounds,), bounds.stop).allowed_LL()
    seen = float(allowed_LL.sum()) - bounds.stop / 2
    forward = layers * (2 * bounds.stop * weights + 4 * seen * hidden)
    forward += 2 * (chosen + rejected) * hidden * arch.vocab_size
    passes = 3 if setting.precomputed else 4
    assert train_rows.model_flops(arch, [(prompt, chosen, rejected)], setting) == pytest.approx(passes * forward)
