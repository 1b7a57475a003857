"""Tables made of numbers."""

import re

import pytest
from rich.console import Console, RenderableType

from fastpref.cli import tables


def shown(part: RenderableType) -> str:
    console = Console(width=100)
    with console.capture() as capture:
        console.print(part)
    return re.sub(r"\s+", " ", capture.get())


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.4, "59.4 s"), (60.0, "1 min 00 s"), (3599.6, "1 h 00 min 00 s"), (7384.0, "2 h 03 min 04 s")],
)
def test_duration(seconds: float, text: str) -> None:
    assert tables.duration(seconds) == text


def test_evaluation_changes_shows_the_first_and_the_last() -> None:
    history = [
        {"step": 0, "eval_loss": 0.7, "eval_rewards/margins": -1e-9},
        {"step": 5, "loss": 0.5},
        {"step": 5, "eval_loss": 0.6, "eval_rewards/margins": 0.1},
        {"step": 9, "eval_loss": 0.4, "eval_rewards/margins": 0.25, "eval_unlisted": 1.0},
    ]
    text = shown(tables.evaluation_changes(history))
    assert "step 0 step 9 change" in text
    assert "loss 0.7000 0.4000 -0.3000" in text
    assert "rewards/margins 0.0000 0.2500 +0.2500" in text
    assert "unlisted" not in text
    alone = shown(tables.evaluation_changes(history[:2]))
    assert "loss 0.7000" in alone and "change" not in alone
    assert tables.evaluation_changes(history[1:2]) is None


def test_summary_takes_the_median_rate() -> None:
    history = [{"step": step, "perf/tokens_per_second": rate} for step, rate in enumerate((10.0, 2000.4, 9e9))]
    text = shown(tables.summary(history, 3, 61.0, {"metrics": "out/metrics.jsonl"}))
    assert "optimizer steps 3 time 1 min 01 s tokens per second (median) 2,000 metrics out/metrics.jsonl" in text
    assert "tokens per second" not in shown(tables.summary([], 3, 61.0, {}))
