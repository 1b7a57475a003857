"""The comparison of training runs: its pairs, its resumption, its distances, and what its tables say of them."""

import json
import math
import operator
import shutil
import threading
from pathlib import Path
from statistics import fmean

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from tiny_project import tokenizer_dir, write_pairs  # noqa: F401

# Imported before Megatron is made to run on a CPU, after which it cannot be.
from transformers import LlamaForCausalLM  # noqa: F401

from bench import __main__ as cli
from bench import training_effect
from bench.train import write_tiny_model
from bench.training_effect import RUNS as RUNS_OF
from bench.training_effect import Plan, compared, measure_runs, split_pairs
from bench.training_effect_report import OPEN, PARTS, SEEDS, comparisons, draw, tables
from bench.weight_distance import distance
from bench.workloads import ROOT

PAIRS = str(ROOT / "examples" / "data" / "demo_eval.jsonl")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    write_tiny_model(folder)
    return str(folder)


def plan_of(model: str, data: str = PAIRS, **sizes) -> Plan:
    defaults = {"steps": 3, "pairs": 2, "max_length": 64, "learning_rate": 1e-3}
    return Plan(model=model, data=data, **defaults | sizes)


def prompts_of(file: Path) -> list[str]:
    return [json.dumps(json.loads(line)["prompt"]) for line in file.read_text().splitlines()]


def test_split_holds_out_a_fifth_and_repeats_no_prompt(model: str, tmp_path: Path) -> None:
    lines = Path(PAIRS).read_text().splitlines()[:30]
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join([*lines, *(line.replace('"chosen"', '"chosen" ') for line in lines)]) + "\n")
    found = split_pairs(plan_of(model, str(data)), tmp_path)
    train, held_out = prompts_of(tmp_path / "train.jsonl"), prompts_of(tmp_path / "held_out.jsonl")
    assert (len(train), len(held_out)) == (found["train"], found["held_out"])
    assert len(held_out) == 12 and 48 - 12 <= len(train) <= 48
    assert not set(train) & set(held_out)


def test_split_leaves_out_long_prompts_and_cuts_long_answers(model: str, tmp_path: Path) -> None:
    records = [json.loads(line) for line in Path(PAIRS).read_text().splitlines()[:40]]
    long = "The kite was at the shop. " * 8  # 7 tokens each
    for record in records[:10]:
        record["prompt"][-1]["content"] = long + record["prompt"][-1]["content"]
    for record in records[10:20]:
        record["chosen"][-1]["content"] += long
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    found = split_pairs(plan_of(model, str(data)), tmp_path)
    assert (found["train"] + found["held_out"], found["held_out"]) == (30, 6)
    kept = prompts_of(tmp_path / "train.jsonl") + prompts_of(tmp_path / "held_out.jsonl")
    assert set(kept) == {json.dumps(record["prompt"]) for record in records[10:]}
    assert found["prompt_tokens"] < 20 and 6 < found["answer_tokens"] < (20 + 2 * 64) / 3


def test_split_names_what_is_needed(model: str, tmp_path: Path) -> None:
    with pytest.raises(training_effect.click.ClickException, match="0 of 200 pairs have a prompt of at most 15 tokens"):
        split_pairs(plan_of(model, max_length=20), tmp_path)


def test_runs_are_stored_resumed_and_reused(model: str, tmp_path: Path) -> None:
    plan, work, file = plan_of(model), tmp_path / "work", tmp_path / "out" / "rows.json"
    called = []

    def call(function, *arguments):
        called.append((function.__name__, arguments[-1]))
        if called[-1] == ("train_run", "seed-1") and called.count(called[-1]) == 1:
            raise RuntimeError("killed")
        return operator.call(function, *arguments)

    with pytest.raises(RuntimeError, match="killed"):
        measure_runs(plan, ["exact", "seed-1"], 1, work, file, call)
    first = json.loads(file.read_text())["runs"]["exact"]
    content = measure_runs(plan, ["exact", "seed-1"], 1, work, file, call)
    assert called.count(("train_run", "exact")) == 1
    assert content["runs"]["exact"] == first
    assert [len(first["curves"][name]) for name in ("loss", "margin")] == [3, 3]
    # Scored by themselves in padded rows they say what the trainer's evaluation says of all of them.
    for run in content["runs"].values():
        assert fmean(run["held_out_margins"]) == pytest.approx(run["evaluations"]["margin"][-1], abs=1e-5)
        assert fmean(m > 0 for m in run["held_out_margins"]) == pytest.approx(run["evaluations"]["accuracy"][-1])
    # From equal weights; the order of the pairs is another one.
    assert first["curves"]["loss"][0] == pytest.approx(math.log(2), abs=1e-5)
    assert content["apart"]["exact seed-1"]["all"] > 0.1 * content["travelled"]["exact"]["all"] > 0
    assert not (work / "exact" / "checkpoints").exists()


def test_the_screened_run_differs_in_its_head_alone(model: str, tmp_path: Path) -> None:
    plan, heads = plan_of(model), ("head_forward", "head_backward", "active_eps")
    configs = {name: training_effect.run_config(plan, RUNS_OF[name], tmp_path, "x") for name in ("exact", "screened")}
    found = {name: vars(config.training) for name, config in configs.items()}
    assert [found["screened"][field] for field in heads] == ["screened", "active", 2.0**-8]
    assert {key for key, value in found["exact"].items() if value != found["screened"][key]} == set(heads)
    assert not RUNS_OF["screened"].is_exact and RUNS_OF["exact"].is_exact
    assert [*compared(["exact", "screened", "seed-1"])] == [("exact", "screened"), ("exact", "seed-1")]


def test_a_run_goes_on_from_its_checkpoint(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastpref.trainer import DPOTrainer, export

    plan = plan_of(model, steps=4)
    whole = measure_runs(plan, ["exact"], 1, tmp_path / "whole", tmp_path / "whole.json", operator.call)
    monkeypatch.setattr(training_effect, "SAVE_STEPS", 2)

    def fail(*_):
        raise RuntimeError("killed while it wrote the weights")

    steps = []
    trained = DPOTrainer.train
    monkeypatch.setattr(DPOTrainer, "train", lambda self: [steps.append((r := trained(self)).steps_run), r][1])
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="wrote the weights"):
        patch.setattr(export, "export_models", fail)
        measure_runs(plan, ["exact"], 1, tmp_path / "cut", tmp_path / "cut.json", operator.call)
    shutil.rmtree(tmp_path / "cut" / "exact" / "checkpoints" / "step-4")
    cut = measure_runs(plan, ["exact"], 1, tmp_path / "cut", tmp_path / "cut.json", operator.call)
    assert steps == [4, 2]
    assert cut["runs"]["exact"]["curves"] == whole["runs"]["exact"]["curves"]
    assert cut["runs"]["exact"]["held_out_margins"] == whole["runs"]["exact"]["held_out_margins"]


def test_no_other_run_begins_after_an_interrupt() -> None:
    begun, may_end = [], threading.Event()

    def train(name: str) -> dict:
        begun.append(name)
        if name != "first":
            may_end.wait(10)
        return {}

    results = training_effect._results(["first", "second", "third", "fourth"], 2, train)
    assert next(results) == ("first", {})
    threading.Timer(0.2, may_end.set).start()
    with pytest.raises(KeyboardInterrupt):
        results.throw(KeyboardInterrupt())
    assert may_end.is_set() and "fourth" not in begun


def test_runs_of_another_plan_are_not_mixed(model: str, tmp_path: Path) -> None:
    measure_runs(plan_of(model), [], 1, tmp_path / "work", tmp_path / "rows.json", operator.call)
    with pytest.raises(training_effect.click.ClickException, match=r"rows.json holds runs of another plan"):
        measure_runs(plan_of(model, steps=9), [], 1, tmp_path / "new", tmp_path / "rows.json", operator.call)
    with pytest.raises(training_effect.click.ClickException, match=r"work holds runs of another plan"):
        measure_runs(plan_of(model, steps=9), [], 1, tmp_path / "work", tmp_path / "new.json", operator.call)


def test_distance_is_that_of_all_weights_and_of_parts_of_the_head(tmp_path: Path) -> None:
    head, norm = "model.embed_tokens.weight", "model.norm.weight"
    models = {
        "one": {head: torch.zeros(4, 2), norm: torch.ones(3, dtype=torch.bfloat16)},
        "two": {head: torch.tensor([[1.0, 2.0], [0.0, 3.0], [0.0, 0.0], [4.0, 0.0]]), norm: torch.tensor([1.0, 1, 3])},
    }
    for name, tensors in models.items():
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    found = distance(tmp_path / "one", tmp_path / "two", [0, 3])
    assert found == pytest.approx({"all": 34**0.5, "seen": 21**0.5, "unseen": 3.0, "others": 2.0}, rel=1e-6)


def test_seeds_are_compared_with_each_other_and_all_with_exact() -> None:
    assert [*compared(["exact", "active-8", "seed-1", "seed-2", "bf16"])] == [
        ("exact", "active-8"),
        ("exact", "seed-1"),
        ("exact", "seed-2"),
        ("exact", "bf16"),
        ("seed-1", "seed-2"),
    ]


def content_of(runs: dict[str, tuple[list[float], list[float]]]) -> dict:
    """Stored content of runs with these losses of steps and these held-out margins; all weights 0.5 apart."""
    content = {
        "plan": {"model": "m", "data": "d", "steps": 4, "pairs": 2, "max_length": 64, "learning_rate": 1e-3},
        "pairs": {"train": 8, "held_out": 2, "prompt_tokens": 5.0, "answer_tokens": 6.0},
        "command": "c",
        "runs": {
            name: {
                "curves": {"loss": losses, "margin": [0.0] * len(losses)},
                "evaluations": {"step": [4], "loss": [losses[-1]], "margin": [fmean(margins)], "accuracy": [0.5]},
                "held_out_margins": margins,
                "machine": {"cpu": "x"},
                "versions": {"torch": "y"},
                "commit": "z",
            }
            for name, (losses, margins) in runs.items()
        },
    }
    parts = {"all": 0.5, "others": 0.4, "seen": 0.3, "unseen": 0.2}
    content["travelled"] = {name: {part: 2 * value for part, value in parts.items()} for name in runs}
    content["apart"] = {" ".join(pair): parts for pair in compared([*runs])}
    return content


RUNS = {
    "exact": ([0.7, 0.6, 0.5, 0.4], [1.0, 2.0]),
    "active-8": ([0.7, 0.6, 0.5, 0.44], [1.0, 2.0]),
    "seed-1": ([0.7, 0.7, 0.7, 0.7], [4.0, 6.0]),
    "seed-2": ([0.7, 0.7, 0.7, 0.5], [1.0, 2.0]),
}


def test_comparisons_are_means_by_hand() -> None:
    found = comparisons(content_of(RUNS))
    active, seeds = found["active, 2^-8 and exact"], found[SEEDS]
    assert active == pytest.approx(
        {"loss": 0.01, "held_out_loss": 0.04, "held_out_margin": 0.0, **dict.fromkeys(PARTS, 0.5)}
    )
    # exact and seed-1, exact and seed-2, seed-1 and seed-2
    assert seeds["loss"] is None
    assert seeds["held_out_loss"] == pytest.approx((0.3 + 0.1 + 0.2) / 3)
    assert seeds["held_out_margin"] == pytest.approx((12.5**0.5 + 0.0 + 12.5**0.5) / 3)


@pytest.mark.parametrize("names", [["exact"], ["exact", "active-8"], ["seed-1"], list(RUNS)])
def test_partial_results_give_tables_and_a_figure(names: list[str], tmp_path: Path) -> None:
    content = content_of({name: RUNS[name] for name in names})
    text = tables(content)
    assert "Not done yet: " in text and ("exact, other order" in text)
    assert text.count("\n| exact |") == names.count("exact")
    draw(content, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 20_000


def test_into_puts_the_tables_between_the_marks(tmp_path: Path) -> None:
    (tmp_path / "training-effect-tiny.json").write_text(json.dumps(content_of(RUNS)))
    page = tmp_path / "page.md"
    page.write_text(f"before\n{OPEN}\nold\n<!-- end of tables -->\nafter\n")
    arguments = ["training-effect", "--name", "tiny", "--out", str(tmp_path), "--into", str(page)]
    result = CliRunner().invoke(cli.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    text = page.read_text()
    assert "active, 2^-8 and exact" in text and "old" not in text and text.endswith("after\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--data must name a file of preference pairs"),
        (["--only", "exakt"], "--only takes exact, active-8, active-6, screened, seed-1, seed-2, bf16; got exakt"),
        (["--into", "x", "--out", "nowhere"], "is not there: train first"),
    ],
)
def test_refusals_say_what_is_needed(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(cli.main, ["training-effect", *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
