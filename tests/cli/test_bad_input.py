"""`fastpref train` on input that cannot work: one clear message, an exit code, and nothing written."""

import json
from pathlib import Path

import pytest


def edit_line(number: int, change: dict | str):
    """Changes fields of line `number` (1-based) of pairs.jsonl, or replaces the line."""

    def apply(project: Path) -> None:
        path = project / "pairs.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines()
        record = change if isinstance(change, str) else json.dumps(json.loads(lines[number - 1]) | change)
        path.write_text("\n".join([*lines[: number - 1], record, *lines[number:]]) + "\n", encoding="utf-8")

    return apply


def nothing(project: Path) -> None:
    pass


SAME = [{"role": "assistant", "content": "w1 w2"}]
CASES = {
    "empty response": (edit_line(3, {"chosen": ""}), (), 3, ["pairs.jsonl:3", "chosen"]),
    "chosen equals rejected": (edit_line(4, {"chosen": SAME, "rejected": SAME}), (), 3, ["pairs.jsonl:4", "equal"]),
    "prompt longer than the limit": (nothing, ("data.max_length=6",), 3, ["pairs.jsonl:1", "max_length"]),
    "broken JSON line": (edit_line(7, '{"prompt": "w1", "chosen": '), (), 3, ["pairs.jsonl:7:"]),
    "wrong key": (nothing, ("training.learning_rat=1.0",), 2, ["learning_rat", "did you mean", "learning_rate"]),
    "vocabulary smaller than a token id": (nothing, ("model.config.vocab_size=9",), 2, ["vocab", "9"]),
    "unknown loss": (nothing, ("loss.pref_loss=sigmod",), 2, ["sigmod", "did you mean sigmoid?"]),
    "reference given for ORPO": (
        nothing,
        ("loss.pref_loss=orpo", "reference={path: somewhere}"),
        2,
        ["reference", "orpo reads none"],
    ),
    "missing data file": (nothing, ("data.train=absent.jsonl",), 2, ["absent.jsonl", "does not exist"]),
    "option of another loss": (nothing, ("loss.simpo_gamma=1.0",), 2, ["loss.simpo_gamma is not read by sigmoid"]),
    "warm-up longer than the run": (nothing, ("training.warmup_steps=500",), 2, ["warm", "500"]),
}


@pytest.mark.parametrize("name", CASES)
def test_train_refuses(project: Path, run_cli, name: str) -> None:
    prepare, overrides, code, texts = CASES[name]
    prepare(project)
    result = run_cli("train", "run.yaml", *overrides)
    message = " ".join(result.stderr.split())
    assert result.exit_code == code, message
    for text in texts:
        assert text in message
    assert "Traceback" not in message
    assert not (project / "out").exists()
