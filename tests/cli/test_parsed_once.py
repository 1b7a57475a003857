"""One `config.json` is translated once in a run, whoever needs to know the model."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import megatron_runs
import pytest
from click.testing import Result
from megatron_runs import Layout
from tiny_project import MODEL

from fastpref.run.architecture.architecture import Architecture
from fastpref.trainer import LoraConfig, add_lora, build_models, load_models, save_hf


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[Mapping[str, Any]]:
    """The configs that were translated."""
    configs: list[Mapping[str, Any]] = []
    from_hf = Architecture.from_hf.__func__

    def counting(cls: type[Architecture], config: Mapping[str, Any]) -> Architecture:
        configs.append(config)
        return from_hf(cls, config)

    monkeypatch.setattr(Architecture, "from_hf", classmethod(counting))
    return configs


def write_model(path: Path, seed: int) -> Path:
    with megatron_runs.parallel(Layout()):
        save_hf(build_models(MODEL, seed=seed), path, MODEL)
    return path


@pytest.mark.parametrize("lora", [(), ("lora.r=2", "--merge")], ids=["whole", "lora"])
def test_train_and_export_translate_one_config(
    lora: tuple, project: Path, run_cli: Callable[..., Result], parsed: list
) -> None:
    result = run_cli("train", "run.yaml", *lora, "--export", "model")
    assert result.exit_code == 0, result.output
    assert len(parsed) == 1


def test_train_translates_the_config_of_a_reference_of_its_own_once_more(
    project: Path, run_cli: Callable[..., Result], parsed: list
) -> None:
    policy, reference = (write_model(project / name, seed) for seed, name in enumerate(("policy", "reference")))
    settings = json.loads((reference / "config.json").read_text()) | {"initializer_range": 0.5}
    (reference / "config.json").write_text(json.dumps(settings))
    parsed.clear()
    text = (project / "run.yaml").read_text()
    start, stop = text.index("  config:"), text.index("data:")
    (project / "run.yaml").write_text(f"{text[:start]}  path: {policy}\n{text[stop:]}")
    for reference_path, count in ((policy, 1), (reference, 2)):
        name = reference_path.name
        output = (f"reference.path={reference_path}", f"training.output_dir=out-{name}", "--export", f"model-{name}")
        result = run_cli("train", "run.yaml", *output)
        assert result.exit_code == 0, result.output
        assert len(parsed) == count
        assert {config.get("initializer_range") for config in parsed} == ({None, 0.5} if count == 2 else {None})
        parsed.clear()


def test_export_of_a_checkpoint_translates_one_config(
    project: Path, run_cli: Callable[..., Result], parsed: list
) -> None:
    assert run_cli("train", "run.yaml", "training.save_steps=2", "lora.r=2").exit_code == 0
    parsed.clear()
    result = run_cli("export", "run.yaml", "training.save_steps=2", "lora.r=2", "--output", "model", "--merge")
    assert result.exit_code == 0, result.output
    assert len(parsed) == 1


def test_models_are_built_from_an_architecture(tmp_path: Path, parsed: list) -> None:
    path = write_model(tmp_path / "model", seed=3)
    arch = Architecture.from_hf(MODEL)
    parsed.clear()
    with megatron_runs.parallel(Layout()):
        for number, models in enumerate((build_models(arch, seed=3), load_models(path, architecture=arch))):
            add_lora(models, arch, LoraConfig(r=2), seed=0)
            save_hf(models, tmp_path / str(number), MODEL, architecture=arch)
    assert not parsed
    for name in ("0", "1"):
        for file in path.iterdir():
            assert (tmp_path / name / file.name).read_bytes() == file.read_bytes()
