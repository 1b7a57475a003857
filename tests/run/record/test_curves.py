"""Reading `metrics.jsonl` and drawing it."""

import json
import struct
from pathlib import Path

import pytest

from fastpref.errors import ConfigError, DataError
from fastpref.run.record.curves import draw_curves, read_metrics

RECORDS = [
    {
        "step": 0,
        "eval_loss": 0.69,
        "eval_rewards/margins": 0.0,
        "eval_rewards/accuracies": 0.5,
        "eval_logps/chosen": -9.0,
    },
    {"step": 1, "loss": 0.6, "rewards/margins": 0.1, "rewards/accuracies": 0.7, "logps/chosen": -8.0},
    {"step": 2, "loss": 0.5, "rewards/margins": 0.3, "rewards/accuracies": 0.9, "logps/chosen": -7.0},
]


def write(folder: Path, text: str) -> Path:
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    return folder


def test_read_metrics_keeps_the_order(tmp_path: Path) -> None:
    assert read_metrics(write(tmp_path, "".join(json.dumps(record) + "\n" for record in RECORDS))) == RECORDS


def test_read_metrics_leaves_out_a_cut_last_line(tmp_path: Path) -> None:
    assert read_metrics(write(tmp_path, json.dumps(RECORDS[0]) + '\n{"step": 1, "lo')) == RECORDS[:1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no record yet"),
        ('{"step": 1, "lo', "holds no record yet"),
        ('{"step"\n{"step": 1}\n', "metrics.jsonl:1: is not JSON"),
        ("[1]\n", "metrics.jsonl:1: must be a JSON object"),
        ('{"loss": 1.0}\n', 'metrics.jsonl:1: must be a JSON object with a whole "step"'),
    ],
)
def test_read_metrics_refuses(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        read_metrics(write(tmp_path, text))
    assert message in str(caught.value)


def test_draw_curves_writes_a_picture_of_its_size(tmp_path: Path) -> None:
    draw_curves(RECORDS, tmp_path / "deep" / "curves.png", title="a run")
    header = (tmp_path / "deep" / "curves.png").read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    assert struct.unpack(">II", header[16:]) == (1500, 960)


def test_draw_curves_shows_every_series(tmp_path: Path) -> None:
    records = [*RECORDS, {"step": 3, "logps/rejected": -11.0, "eval_logps/rejected": -12.0}]
    draw_curves(records, tmp_path / "curves.svg")
    svg = (tmp_path / "curves.svg").read_text()
    # text is drawn as paths; the comments keep it readable
    for label in (
        "Loss",
        "Reward margin",
        "Reward accuracy",
        "Log-prob of the answers",
        "train",
        "evaluation",
        "chosen",
    ):
        assert f"<!-- {label} -->" in svg
    for label in ("rejected", "chosen, evaluation", "rejected, evaluation"):
        assert f"<!-- {label} -->" in svg


def test_draw_curves_without_anything_to_draw(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no record has a loss"):
        draw_curves([{"step": 1, "lr": 0.1}], tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_draw_curves_refuses_another_format(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must end in \.png, \.pdf, \.svg"):
        draw_curves(RECORDS, tmp_path / "curves.jpg")
