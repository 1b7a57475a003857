"""`python -m bench dropin` compares every metric before it times anything."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

pytest.importorskip("trl", reason="the trainer beside ours is TRL's (extra trl)")

from bench import dropin
from bench.__main__ import main


def test_dropin_measures_both_trainers(tmp_path: Path) -> None:
    arguments = ["dropin", "--dry", "--pairs", "2", "--max-length", "64", "--repeats", "2", "--out", str(tmp_path)]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    row = json.loads((tmp_path / "dropin-dry-fp32.json").read_text())
    assert set(row["times"]) == set(row["memory"]) == set(row["metrics"]) == {"trl", "fastpref"}
    assert all(len(taken["wall_s"]) == 2 and min(taken["wall_s"]) > 0 for taken in row["times"].values())
    assert all(memory["peak_mib"] >= memory["before_mib"] > 0 for memory in row["memory"].values())
    assert row["differences"].keys() == row["metrics"]["trl"].keys() >= {"entropy", "rewards/margins", "grad_norm"}
    assert row["metrics"]["trl"]["rewards/margins"] != 0.0


@pytest.mark.parametrize(
    ("name", "change", "agrees"),
    [
        ("entropy", 0.9e-4, True),
        ("entropy", 1.1e-4, False),
        ("rewards/chosen", 2e-6, True),
        ("rewards/chosen", 1e-5, False),
    ],
)
def test_compare_allows_rewards_a_bit_of_each_log_prob(name: str, change: float, agrees: bool) -> None:
    theirs = {"logps/chosen": -100.0, "logps/rejected": -90.0, "entropy": 1.0, "rewards/chosen": 1e-4}
    metrics = {"trl": theirs, "fastpref": theirs | {name: theirs[name] + change}}
    if agrees:
        assert dropin._compare(metrics, "fp32")[name] > 0
    else:
        with pytest.raises(RuntimeError, match=f"{name} is .* in TRL"):
            dropin._compare(metrics, "fp32")


def test_compare_refuses_a_missing_metric() -> None:
    with pytest.raises(RuntimeError, match=r"logged by one trainer alone: \['entropy'\]"):
        dropin._compare({"trl": {"loss": 1.0, "entropy": 1.0}, "fastpref": {"loss": 1.0}}, "fp32")
