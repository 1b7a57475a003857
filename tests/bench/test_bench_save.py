"""The benchmark of saves: its parts are what training waits for, and an export needs one more parameter at a time."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny_project import MODEL

from bench import __main__ as cli
from fastpref.trainer import TrainingArguments, build_models, initialize_megatron, save_hf
from fastpref.trainer.ranks.platform import destroy

# Large enough for its memory to be told from that of everything else.
WIDE = {**MODEL, "vocab_size": 65_536, "hidden_size": 64, "intermediate_size": 128, "tie_word_embeddings": True}


def test_save_bench(tmp_path: Path) -> None:
    initialize_megatron(TrainingArguments())
    try:
        save_hf(build_models(WIDE, seed=0), tmp_path / "model", WIDE)
    finally:
        destroy()
    paths = ["--model", tmp_path / "model", "--scratch", tmp_path / "scratch", "--out", tmp_path]
    arguments = ["save", "--dry", "--name", "tiny", "--repeats", 1, "--shard-mib", 16, "--threads", 1, *paths]
    result = CliRunner().invoke(cli.main, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    row = json.loads((tmp_path / "save-tiny.json").read_text())
    assert [*(tmp_path / "scratch").iterdir()] == []
    # weights and two moments in fp32, and little besides
    assert row["bytes"] == pytest.approx(12 * row["parameters"], rel=0.01)
    # The parts lie one after the other in the whole, however busy the machine is; seconds are rounded to 1e-4.
    ((total,), parts) = row["sync"].pop("total_s"), row["sync"].values()
    assert 0 < sum(seconds for (seconds,) in parts) < total + 1e-3
    beside = {name: seconds for name, (seconds,) in row["async"].items()}
    assert 0 < beside["list_s"] + beside["copy_s"] + beside["finish_s"] < beside["blocked_s"] + 1e-3
    assert beside["blocked_s"] < beside["total_s"] + 1e-3
    export = row["export"]
    assert len(export["shards_mib"]) >= 2 and export["largest_parameter_mib"] == 16.0
    assert export["peak_mib"] < 1.2 * max(export["shards_mib"])
    assert "| beside training |" in result.output


def test_save_ranks_bench(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.main, ["save-ranks", "--dry", "--out", str(tmp_path)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "memory-of-saves.json").read_text())["rows"]
    assert [(row["way"], len(row["ranks"])) for row in rows] == [
        ("gathered", 1),
        ("gathered", 2),
        ("owned", 1),
        ("owned", 2),
    ]
    written = [[rank["writes_mib"] for rank in row["ranks"]] for row in rows]
    assert written[1][1] == 0.0 and sum(written[3]) == pytest.approx(written[2][0], rel=0.01)
    assert max(written[3]) < 0.6 * written[2][0]
    assert "| owned | 2 |" in result.output
