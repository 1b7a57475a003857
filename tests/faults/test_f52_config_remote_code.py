"""Fault 52: code that a model or tokenizer directory brings along is refused and never imported."""

import json
from pathlib import Path

import pytest
from tiny_project import MODEL

CODE = "from pathlib import Path\nPath('SENTINEL').write_text('x')\n"


@pytest.mark.parametrize("command", ["check", "train", "eval"])
def test_model_with_auto_map(project: Path, run_cli, tokenizer_dir: Path, command: str) -> None:
    model = project / "model"
    model.mkdir()
    (model / "modeling.py").write_text(CODE)
    config = {**MODEL, "auto_map": {"AutoModelForCausalLM": "modeling.Model", "AutoConfig": "modeling.Config"}}
    (model / "config.json").write_text(json.dumps(config))
    result = run_cli(command, "run.yaml", "model.config=null", "model.path=model")
    assert result.exit_code == 4
    assert "auto_map" in result.stderr and "never runs here" in result.stderr
    assert not (project / "SENTINEL").exists()


def test_model_config_in_the_run_file_with_auto_map(project: Path, run_cli) -> None:
    result = run_cli("check", "run.yaml", "model.config.auto_map={AutoConfig: modeling.Config}")
    assert result.exit_code == 2
    assert "auto_map" in result.stderr


@pytest.mark.parametrize(
    "change", [{"auto_map": {"AutoTokenizer": ["code.Words", None]}}, {"tokenizer_class": "Words"}]
)
def test_tokenizer_with_its_own_class(project: Path, run_cli, tokenizer_dir: Path, change: dict) -> None:
    words = project / "words"
    words.mkdir()
    for file in tokenizer_dir.iterdir():
        (words / file.name).write_bytes(file.read_bytes())
    (words / "code.py").write_text(CODE)
    path = words / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    result = run_cli("check", "run.yaml", "model.tokenizer=words")
    assert result.exit_code == 2
    assert "fastpref: config error:" in result.stderr
    assert not (project / "SENTINEL").exists()
