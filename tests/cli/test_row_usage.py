"""What `check` says about rows against what a run logs that lays them out."""

import json
from pathlib import Path

import pytest

from fastpref.trainer.config_file import load_run_config
from fastpref.trainer.prepare import prepare
from fastpref.trainer.row_usage import KINDS, row_usages

SETTINGS = {
    "padded": (),
    "packed": ("training.packing=true", "training.pack_length=48"),
    "packed, prompt shared": ("training.packing=true", "training.prefix_sharing=true"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_row_usages_are_what_a_run_logs(project: Path, run_cli, kind: str) -> None:
    lines = [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()]
    for index, line in enumerate(lines):
        line["prompt"][0]["content"] += " w9" * (5 * index % 7)
        line["chosen"][0]["content"] += " w8" * (3 * index % 5)
    Path("pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    overrides = (*SETTINGS[kind], "training.logging_steps=3")
    (usage,) = (usage for usage in row_usages(prepare(load_run_config("run.yaml", overrides))) if usage.is_used)
    assert usage.kind == kind
    assert run_cli("train", "run.yaml", *overrides).exit_code == 0
    record = json.loads((project / "out" / "metrics.jsonl").read_text().splitlines()[0])
    assert record["step"] == 3
    assert usage.padding_fraction == pytest.approx(record["perf/padding_fraction"], rel=1e-9)
    assert usage.positions_per_pair == pytest.approx(record["perf/positions_per_pair"], rel=1e-9)


def test_row_usages_leave_out_rows_that_pairs_do_not_fit(project: Path) -> None:
    overrides = ("training.packing=true", "training.prefix_sharing=true", "training.pack_length=16")
    usages = row_usages(prepare(load_run_config("run.yaml", overrides)))
    # 12 positions with the prompt shared, 17 without
    assert [usage.kind for usage in usages] == ["padded", "packed, prompt shared"]
