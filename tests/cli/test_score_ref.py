"""`fastpref score-ref`, and `train`, `eval` and `check` with reference.mode=precomputed."""

import json
import resource
import signal
from functools import partial
from pathlib import Path

import pytest
from test_check import squeezed
from tiny_project import TEMPLATE, write_pairs

from fastpref.run.config.run_file import load_run_config
from fastpref.run.plan import preview
from fastpref.run.plan.prepare import prepare
from fastpref.trainer import build
from fastpref.trainer.reference import scoring

PRECOMPUTED = "reference={mode: precomputed}"
SHARED = "reference={mode: precomputed, cache: cache}"


def records(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_metrics(ours: Path, theirs: Path) -> None:
    assert len(records(ours)) == len(records(theirs)) > 0
    for mine, other in zip(records(ours), records(theirs), strict=True):
        assert mine.keys() == other.keys()
        for name, value in other.items():
            if not name.startswith(("perf/", "memory/")):
                assert mine[name] == pytest.approx(value, rel=2e-5, abs=2e-6), name


@pytest.fixture
def scored(project: Path, run_cli) -> Path:
    """The project with a cache for its run file in `cache`."""
    result = run_cli("score-ref", "run.yaml", "--output", "cache")
    assert result.exit_code == 0, result.output
    assert "Scored 14 pairs in" in result.output
    return project


def test_score_ref_train_eval_equal_the_model_in_memory(scored: Path, run_cli, monkeypatch) -> None:
    settings = ["train", "run.yaml", "training.eval_on_start=true"]
    assert run_cli(*settings, "training.output_dir=online").exit_code == 0

    monkeypatch.setattr(scoring, "_score_shard", None)  # nothing is scored again
    trained = run_cli(*settings, SHARED, "training.output_dir=cached")
    assert trained.exit_code == 0, trained.output
    assert_same_metrics(scored / "cached", scored / "online")
    first = records(scored / "cached")[0]
    assert first["step"] == 0 and first["eval_loss"] == pytest.approx(0.6931471805599453, rel=1e-6)

    evaluated = run_cli(
        *("eval", "run.yaml", SHARED, "training.output_dir=cached", "training.resume_from_checkpoint=latest")
    )
    assert evaluated.exit_code == 0, evaluated.output
    metrics = json.loads((scored / "cached" / "eval.json").read_text())["metrics"]
    last = records(scored / "cached")[-1]
    assert metrics == {name: value for name, value in last.items() if name != "step"}


def test_train_makes_the_cache_that_is_not_there(project: Path, run_cli) -> None:
    plan = squeezed(run_cli("check", "run.yaml", PRECOMPUTED).output)
    assert "precomputed: training first scores 14 pairs into out/reference-cache" in plan
    assert run_cli("train", "run.yaml", PRECOMPUTED).exit_code == 0
    assert run_cli("train", "run.yaml", "training.output_dir=online").exit_code == 0
    assert_same_metrics(project / "out", project / "online")

    fits = squeezed(run_cli("check", "run.yaml", PRECOMPUTED, "training.resume_from_checkpoint=latest").output)
    assert "precomputed in out/reference-cache, which fits" in fits
    before = (project / "out" / "reference-cache" / "MANIFEST.json").read_bytes()
    again = run_cli("score-ref", "run.yaml")
    assert again.exit_code == 0 and "is there and fits" in squeezed(again.output)
    assert (project / "out" / "reference-cache" / "MANIFEST.json").read_bytes() == before


def test_cut_score_ref_goes_on(project: Path, run_cli, monkeypatch) -> None:
    monkeypatch.setattr(build, "score_reference", partial(scoring.score_reference, shard_pairs=4))
    score_shard, scored_pairs = scoring._score_shard, []

    def cut(reference, dataset, pairs, *rest):
        if len(scored_pairs) == 2:
            raise KeyboardInterrupt
        scored_pairs.append(pairs)
        return score_shard(reference, dataset, pairs, *rest)

    monkeypatch.setattr(scoring, "_score_shard", cut)
    assert run_cli("score-ref", "run.yaml", "--output", "cache").exit_code != 0
    assert not (project / "cache").exists()

    def count(reference, dataset, pairs, *rest):
        scored_pairs.append(pairs)
        return score_shard(reference, dataset, pairs, *rest)

    monkeypatch.setattr(scoring, "_score_shard", count)
    assert run_cli("score-ref", "run.yaml", "--output", "cache").exit_code == 0
    assert scored_pairs == [range(0, 4), range(4, 8), range(8, 10), range(0, 4)]
    assert run_cli("train", "run.yaml", SHARED).exit_code == 0
    assert {path.name for path in project.iterdir() if "cache" in path.name} == {"cache"}


def test_full_disk_leaves_what_is_whole_and_the_pass_goes_on(project: Path, run_cli) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        result = run_cli("score-ref", "run.yaml", "--output", "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert result.exit_code == 7, result.output
    assert "writing the reference cache failed" in result.stderr
    assert not (project / "cache").exists()
    assert run_cli("score-ref", "run.yaml", "--output", "cache").exit_code == 0
    assert run_cli("check", "run.yaml", SHARED).exit_code == 0


def test_adapters_train_from_the_cache_of_their_base(scored: Path, run_cli) -> None:
    settings = ["train", "run.yaml", "lora={r: 4}"]
    online = run_cli(*settings, "training.output_dir=online")
    assert online.exit_code == 0, online.output
    assert run_cli(*settings, SHARED, "training.output_dir=cached").exit_code == 0
    assert_same_metrics(scored / "cached", scored / "online")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ("training.seed=7", "training.seed: saved 42, now 7"),
        ("training.bf16=true", "params_dtype: saved 'float32', now 'bfloat16'"),
        ("data.max_length=24", "data.max_length: saved 32, now 24"),
        ("data.truncation=keep_end", "data.truncation: saved 'keep_start', now 'keep_end'"),
        ("model.config.rms_norm_eps=0.01", "model_config_sha256: saved "),
        ("data.eval=pairs.jsonl", None),
        ("data.train=more.jsonl", "training pairs: saved "),
        (f"data.chat_template={json.dumps(TEMPLATE + '{# the same text #}')}", "chat_template_sha256: saved "),
    ],
)
@pytest.mark.parametrize("command", ["check", "train", "score-ref"])
def test_cache_of_other_numbers_is_refused(scored: Path, run_cli, command: str, change: str, field: str | None) -> None:
    write_pairs(scored / "more.jsonl", 10, start=1)
    result = run_cli(command, "run.yaml", SHARED, change)
    if field is None:  # pairs that are in the cache, under another name
        assert result.exit_code == 0, result.output
        return
    assert result.exit_code == 4, result.output
    assert f"cache holds reference log-probs of another run:\n  {field}" in result.stderr
    assert "score again into another directory" in result.stderr


def test_cache_of_other_weights_is_refused(project: Path, run_cli) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        arguments = ["training.max_steps=1", f"training.output_dir=out-{name}", f"training.seed={seed}"]
        assert run_cli("train", "run.yaml", *arguments, "--export", name).exit_code == 0
    reference = "reference={mode: precomputed, cache: cache, path: %s}"
    assert run_cli("score-ref", "run.yaml", reference % "a").exit_code == 0
    assert run_cli("check", "run.yaml", reference % "a").exit_code == 0
    refused = run_cli("check", "run.yaml", reference % "b")
    assert refused.exit_code == 4 and "weights_sha256: saved " in refused.stderr
    assert "model_config_sha256" not in refused.stderr
    # one flipped bit of a weight
    file = project / "a" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    refused = run_cli("train", "run.yaml", reference % "a")
    assert refused.exit_code == 4 and "weights_sha256: saved " in refused.stderr


def test_eval_does_not_make_a_cache(project: Path, run_cli) -> None:
    result = run_cli("eval", "run.yaml", SHARED)
    assert result.exit_code == 4
    assert "cache is no reference cache: it has no MANIFEST.json; score-ref makes one where nothing is" in result.stderr


def test_damaged_cache_stops_training(scored: Path, run_cli) -> None:
    shard = next((scored / "cache").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-4])
    result = run_cli("train", "run.yaml", SHARED)
    assert result.exit_code == 4
    assert f"{shard.name} has " in result.stderr and "MANIFEST.json says" in result.stderr


def test_settings_that_make_no_sense_are_refused(project: Path, run_cli) -> None:
    for settings, text in (
        (["reference={cache: cache}"], "reference.cache ('cache') is read in mode precomputed only"),
        (["reference={mode: cached}"], "reference.mode must be 'model' or 'precomputed', got \"cached\""),
        ([PRECOMPUTED, "loss.pref_loss=orpo"], "reference is given, but pref_loss orpo reads none"),
        (
            ["reference={mode: precomputed, cache: run.yaml}"],
            "reference.cache: 'run.yaml' exists and is not a directory",
        ),
    ):
        result = run_cli("check", "run.yaml", *settings)
        assert result.exit_code == 2 and text in result.stderr, result.stderr
    result = run_cli("score-ref", "run.yaml", "loss.pref_loss=orpo")
    assert result.exit_code == 2 and "pref_loss orpo reads no reference; there is nothing to score" in result.stderr


def test_memory_estimate_counts_no_reference_weights(project: Path) -> None:
    online, cached = (
        preview.estimate_memory(prepare(load_run_config("run.yaml", overrides), 1)) for overrides in ([], [PRECOMPUTED])
    )
    assert (online.reference, cached.reference) == (online.weights, 0)
    assert cached.total == online.total - online.weights


def test_check_names_the_model_in_memory(project: Path, run_cli) -> None:
    assert "reference a frozen copy of the policy" in squeezed(run_cli("check", "run.yaml").output)
    none = squeezed(run_cli("check", "run.yaml", "loss.pref_loss=orpo").output)
    assert "reference none, the loss reads none" in none
