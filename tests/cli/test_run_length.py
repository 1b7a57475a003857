"""A run is as long as its settings say: resumed beyond its end it is refused, resumed at its end it does nothing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file
from test_train import squeezed

LATEST = "training.resume_from_checkpoint=latest"
SHORTER = "training.resume_allow_changes=[total_steps]"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first test leaves its run for the others."""
    return tmp_path_factory.mktemp("trained") / "run"


@pytest.fixture
def four_steps(project: Path, run_cli: Callable[..., Result], trained: Path) -> Path:
    """The project with a run of 4 steps, which saved steps 2 and 4, and its model in `model`."""
    if not trained.exists():
        settings = ["training.max_steps=4", "training.save_steps=2"]
        result = run_cli("train", "run.yaml", *settings, "--export", "model")
        assert result.exit_code == 0, result.output
        for name in ("out", "model"):
            shutil.copytree(project / name, trained / name)
    shutil.copytree(trained, project, dirs_exist_ok=True)
    return project


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same_weights(ours: Path, theirs: Path) -> bool:
    one, two = (load_file(path / "model.safetensors") for path in (ours, theirs))
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("wanted", "length"),
    [
        ("latest", "training.max_steps=3"),
        ("latest-valid", "training.max_steps=3"),
        ("out/checkpoints/step-4", "training.num_train_epochs=1"),
    ],
)
def test_a_checkpoint_beyond_the_end_is_refused(
    four_steps: Path, run_cli: Callable[..., Result], wanted: str, length: str
) -> None:
    before = files(four_steps / "out")
    settings = [f"training.resume_from_checkpoint={wanted}", length, SHORTER]
    result = run_cli("train", "run.yaml", *settings, "--export", "never")
    assert result.exit_code == 4, result.output
    assert "step-4 is at step 4, but this run ends at step 3" in result.stderr
    assert "Give the run at least 4 steps" in result.stderr and "that saved it has 4" in result.stderr
    assert files(four_steps / "out") == before and not (four_steps / "never").exists()
    assert run_cli("check", "run.yaml", *settings).exit_code == (0 if wanted == "latest-valid" else 4)


def test_every_remedy_of_that_error_works(four_steps: Path, run_cli: Callable[..., Result]) -> None:
    refused = run_cli("train", "run.yaml", LATEST, "training.max_steps=3")
    assert refused.exit_code == 4
    for remedy in (
        "at least 4 steps (training.max_steps",
        "continue from out/checkpoints/step-2 in another output_dir",
        "fastpref export --checkpoint out/checkpoints/step-4",
    ):
        assert remedy in refused.stderr
    assert run_cli("train", "run.yaml", LATEST, "training.max_steps=4").exit_code == 0
    earlier = ["training.resume_from_checkpoint=out/checkpoints/step-2", "training.output_dir=other", SHORTER]
    result = run_cli("train", "run.yaml", *earlier, "training.max_steps=3")
    assert result.exit_code == 0 and "optimizer steps 3 (1 of them now)" in squeezed(result.stdout)
    assert (four_steps / "other" / "checkpoints" / "step-3").is_dir()
    exported = run_cli("export", "run.yaml", "--checkpoint", "out/checkpoints/step-4", "--output", "exported")
    assert exported.exit_code == 0 and same_weights(four_steps / "exported", four_steps / "model")


def test_the_directory_of_a_run_names_its_newest_checkpoint(four_steps: Path, run_cli: Callable[..., Result]) -> None:
    for folder in ("out", "out/checkpoints"):
        refused = run_cli("train", "run.yaml", f"training.resume_from_checkpoint={folder}")
        assert refused.exit_code == 4
        assert refused.stderr.endswith("; name one that it holds, such as out/checkpoints/step-4\n")


def test_what_does_not_fit_is_said_without_rank_and_step(four_steps: Path, run_cli: Callable[..., Result]) -> None:
    refused = run_cli("train", "run.yaml", LATEST, "training.max_steps=4", "data.max_length=8")
    assert (
        "train_data_sha256 (the tokens of the training pairs, so files, tokenizer, template or limits)"
        in refused.stderr
    )
    assert refused.stderr.endswith("Use the saved settings or start a new run\n")


def test_a_finished_run_does_nothing_and_says_so(four_steps: Path, run_cli: Callable[..., Result]) -> None:
    before = files(four_steps / "out")
    result = run_cli(
        *("train", "run.yaml", LATEST, "training.max_steps=4", "training.eval_on_start=true"),
        *("training.disable_progress=false", "--export", "again"),
    )
    assert result.exit_code == 0, result.output
    shown = squeezed(result.stdout)
    assert "Step 4 of 4 was done before: nothing was left to train." in shown
    assert "optimizer steps 4 (0 of them now)" in shown and "out/checkpoints/step-4" in shown
    assert "Evaluation" not in shown and "Evaluating" not in result.stderr and "Saving" not in result.stderr
    assert "Step 4 of 4 is done: nothing is left to train" in result.stderr
    after = files(four_steps / "out")
    assert {name for name in after if after[name] != before.get(name)} == {"config.yaml"}
    assert same_weights(four_steps / "again", four_steps / "model")


def test_later_checkpoints_of_other_settings_are_not_taken_for_the_runs(
    four_steps: Path, run_cli: Callable[..., Result]
) -> None:
    """A finished checkpoint is never written again, so step 4 would stay that of the first run."""
    settings = [
        *("training.resume_from_checkpoint=out/checkpoints/step-2", "training.max_steps=4"),
        *("training.learning_rate=0.1", "training.resume_allow_changes=[learning_rate]"),
    ]
    refused = run_cli("train", "run.yaml", *settings)
    assert refused.exit_code == 4
    assert "checkpoints of steps after 2 that were saved with other settings (step-4)" in refused.stderr
    elsewhere = run_cli("train", "run.yaml", *settings, "training.output_dir=other", "--export", "other-model")
    assert elsewhere.exit_code == 0, elsewhere.output
    latest = run_cli("export", "run.yaml", "training.output_dir=other", "--output", "latest")
    assert latest.exit_code == 0 and same_weights(four_steps / "latest", four_steps / "other-model")
    assert not same_weights(four_steps / "latest", four_steps / "model")


@pytest.mark.filterwarnings("ignore:out/checkpoints/step-4 is damaged")
def test_latest_valid_names_its_step_and_saves_the_damaged_one_again(
    four_steps: Path, run_cli: Callable[..., Result]
) -> None:
    root = four_steps / "out" / "checkpoints"
    (shard,) = (root / "step-4").glob("__0_0.distcp")
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    valid = "training.resume_from_checkpoint=latest-valid"
    evaluated = run_cli("eval", "run.yaml", valid)
    assert evaluated.exit_code == 0 and "at step 2" in evaluated.stdout
    record = json.loads((four_steps / "out" / "eval.json").read_text())
    assert (record["checkpoint"], record["step"]) == ("latest-valid", 2)
    assert record["checkpoint_directory"] == "out/checkpoints/step-2"
    with pytest.warns(UserWarning, match=r"step-4 is damaged; it is now .*step-4\.damaged-"):
        resumed = run_cli("train", "run.yaml", valid, "training.max_steps=4")
    assert resumed.exit_code == 0, resumed.output
    latest = run_cli("export", "run.yaml", "--checkpoint", "latest", "--output", "latest")
    assert latest.exit_code == 0 and same_weights(four_steps / "latest", four_steps / "model")
