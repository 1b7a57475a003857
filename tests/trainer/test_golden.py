"""Another trainer's recorded DPO run, reproduced through the public API (see tests/golden/README.md)."""

import json
from pathlib import Path

import pytest

from fastpref.data import TokenizedPair
from fastpref.trainer import DPOConfig, DPOTrainer, TrainingArguments, initialize_megatron, load_models
from fastpref.trainer.ranks.platform import destroy

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
RECORD = json.loads((GOLDEN / "seed_dpo.json").read_text())
RUN = RECORD["run"]
# The record rounds `loss` to 4 digits; everything else is full precision.
ROUNDED_LOSS = 0.5e-4
KEYS = [
    "logps/chosen",
    "logps/rejected",
    "rewards/accuracies",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "sft_loss",
]


def pairs(name: str) -> list[TokenizedPair]:
    return [
        TokenizedPair(
            pair_id=index,
            chosen_input_ids=pair["c"],
            chosen_labels=pair["cl"],
            rejected_input_ids=pair["r"],
            rejected_labels=pair["rl"],
        )
        for index, pair in enumerate(RECORD[name])
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):
    args = TrainingArguments(
        output_dir=str(tmp_path_factory.mktemp("golden")),
        per_device_train_batch_size=RUN["pairs_per_microbatch"],
        gradient_accumulation_steps=RUN["grad_accum"],
        shuffle=False,
        learning_rate=RUN["lr"],
        warmup_steps=1,
        weight_decay=RUN["weight_decay"],
        adam_beta1=RUN["betas"][0],
        adam_beta2=RUN["betas"][1],
        adam_epsilon=RUN["eps"],
        max_grad_norm=RUN["clip"],
        logging_steps=1,
        eval_on_start=True,
        save_on_end=False,
        report_to=(),
        disable_progress=True,
    )
    initialize_megatron(args)
    trainer = DPOTrainer(
        load_models(GOLDEN / "policy_init"),
        DPOConfig(beta=RUN["beta"], pref_loss=RUN["pref"], label_smoothing=RUN["label_smoothing"], tie_value=0.0),
        load_models(GOLDEN / "reference_init"),
        args,
        train_dataset=pairs("train_pairs"),
        eval_dataset=pairs("eval_pairs"),
    )
    trainer.train()
    yield trainer.log_history
    destroy()


def test_golden_training_steps(run: list[dict[str, float]]) -> None:
    steps = [record for record in run if "grad_norm" in record]
    assert len(steps) == len(RUN["steps"]) == 4
    for ours, theirs in zip(steps, RUN["steps"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=ROUNDED_LOSS)
        for key in (*KEYS, "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), f"step {theirs['step']}: {key}"
        assert ours["skipped_iter"] == theirs["skipped_iter"]
        assert ours["epoch"] == theirs["epoch"]


def test_golden_learning_rates_are_those_of_the_step(run: list[dict[str, float]]) -> None:
    # The record logs the rate after the scheduler moved on; the rate that a step used is the one before.
    used = [0.0, *(step["learning_rate"] for step in RUN["steps"][:-1])]
    assert [record["lr"] for record in run if "lr" in record] == pytest.approx(used, rel=1e-12)


@pytest.mark.parametrize(("index", "name"), [(0, "eval_before"), (-1, "eval_after")])
def test_golden_evaluation(run: list[dict[str, float]], index: int, name: str) -> None:
    ours = [record for record in run if "eval_loss" in record][index]
    for key in ("loss", *KEYS):
        assert ours[f"eval_{key}"] == pytest.approx(RUN[name][f"eval_{key}"], rel=1e-4), key
