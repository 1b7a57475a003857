"""TRL's trainers and ours, from the same files: same tokens, and every metric of every step the same."""

import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="the other trainer of these tests is TRL (extra trl)")

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from checks.trl_parity.runs import (
    Comparison,
    ParityRun,
    TrainerRecord,
    check_tokens,
    compare,
    run_fastpref,
    run_trl,
    worst,
    write_text_form,
)
from fastpref.data import DataConfig, TokenizedPair, load_dataset, load_tokenizer
from fastpref.errors import DataError
from fastpref.losses import DPOConfig

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
# Longer than every prompt, shorter than some answers.
MAX_LENGTH = 300
CASES = {
    "sigmoid": {"loss": DPOConfig(pref_loss="sigmoid", tie_value=0.0)},
    "ipo": {"loss": DPOConfig(pref_loss="ipo", tie_value=0.0)},
    "hinge": {"loss": DPOConfig(pref_loss="hinge", beta=0.5, tie_value=0.0), "max_grad_norm": 0.0},
    "sigmoid+sft": {
        "loss": DPOConfig(pref_loss=("sigmoid", "sft"), loss_weights=(1.0, 0.2), tie_value=0.0),
        "token_stats": True,
    },
    "orpo": {"loss": DPOConfig(pref_loss="orpo", orpo_nll="prompt_and_response", tie_value=0.0)},
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with the tokenizer of the examples, as a Hugging Face model directory."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(EXAMPLES / "tokenizer")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        # Wide enough that log-probs differ between tokens, and so rewards between the sides of a pair.
        initializer_range=0.2,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve conversational pairs of one question each: three steps of four."""
    lines = (EXAMPLES / "data_real/pairs.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join([line for line in lines if len(json.loads(line)["prompt"]) == 1][:12]), encoding="utf-8")
    return path


@pytest.mark.parametrize("case", CASES)
def test_trainer_metrics_equal_trl(case: str, model_dir: Path, pairs_file: Path, tmp_path: Path) -> None:
    if case == "orpo":
        pairs_file = write_text_form(pairs_file, load_tokenizer(model_dir), tmp_path / "pairs.jsonl")
    settings = {"steps": 3, "learning_rate": 1e-3, "weight_decay": 0.1, "max_length": MAX_LENGTH} | CASES[case]
    run = ParityRun(model_dir=model_dir, data_file=pairs_file, work_dir=tmp_path, **settings)
    trl, ours = run_trl(run), run_fastpref(run)
    rows = compare(run, trl, ours)
    assert not [row for row in rows if not row.agrees]
    # Nothing above is a comparison of standstills or of untouched answers.
    assert len({round(row.fastpref, 4) for row in rows if row.metric == "loss"}) == 3
    assert any(len(pair.chosen_input_ids) == MAX_LENGTH for pair in ours.pairs)


def test_write_text_form_keeps_the_tokens(model_dir: Path, pairs_file: Path, tmp_path: Path) -> None:
    # This template ends a turn with the end-of-sequence token and nothing else, so both forms are one text.
    tokenizer, config = load_tokenizer(model_dir), DataConfig(max_length=None)
    text_file = write_text_form(pairs_file, tokenizer, tmp_path / "text.jsonl")
    assert json.loads(text_file.read_text(encoding="utf-8").splitlines()[0])["prompt"].endswith("<|assistant|>")
    conversational = load_dataset(pairs_file, tokenizer, config)
    assert check_tokens(conversational, load_dataset(text_file, tokenizer, config)) > 1000


def pair(chosen: int = 7) -> TokenizedPair:
    return TokenizedPair(
        pair_id=0,
        chosen_input_ids=[1, 2, chosen],
        chosen_labels=[-100, -100, chosen],
        rejected_input_ids=[1, 2, 3, 4],
        rejected_labels=[-100, -100, 3, 4],
    )


def test_check_tokens_names_the_first_difference() -> None:
    assert check_tokens([pair()], [pair()]) == 7
    with pytest.raises(DataError, match="pair 1: chosen_input_ids of TRL and fastpref differ at position 2"):
        check_tokens([pair(), pair()], [pair(), pair(chosen=8)])
    with pytest.raises(DataError, match="TRL keeps 2 pairs and fastpref 1"):
        check_tokens([pair(), pair()], [pair()])


def test_check_tokens_sees_a_longer_side() -> None:
    longer = TokenizedPair(
        pair_id=0,
        chosen_input_ids=[1, 2, 7, 5],
        chosen_labels=[-100, -100, 7, 5],
        rejected_input_ids=[1, 2, 3, 4],
        rejected_labels=[-100, -100, 3, 4],
    )
    with pytest.raises(DataError, match="differ at length 3 and 4"):
        check_tokens([pair()], [longer])


@pytest.mark.parametrize(
    ("trl", "ours", "difference", "agrees"),
    [
        (0.0, 0.0, 0.0, True),
        (0.0, 1e-12, 1.0, False),
        (-2.0, -2.001, 0.001 / 2.001, True),
        (-2.0, -1.997, 0.003 / 2.0, False),
        (1.0, -1.0, 2.0, False),
    ],
)
def test_comparison_is_relative(trl: float, ours: float, difference: float, agrees: bool) -> None:
    row = Comparison("loss", 1, trl, ours)
    assert row.relative_difference == pytest.approx(difference, rel=1e-9)
    assert row.agrees is agrees


def test_compare_allows_one_bit_of_the_logps_in_differences_of_logps_only(tmp_path: Path) -> None:
    run = ParityRun(model_dir=tmp_path, data_file=tmp_path, work_dir=tmp_path, loss=DPOConfig(beta=0.5), steps=1)
    # The reward of log-probs around -1000 moves in steps of beta * 1000 * 2^-23 = 6.0e-5.
    trl = dict.fromkeys(run.metrics, 1e-3) | {"logps/chosen": -1000.0, "logps/rejected": -800.0}
    agreed = {}
    for shift in (5.9e-5, 6.1e-5):
        ours = {name: value + shift * (not name.startswith("logps/")) for name, value in trl.items()}
        records = [TrainerRecord(pairs=[pair()], steps=[steps], seconds=0.0) for steps in (trl, ours)]
        agreed[shift] = {row.metric for row in compare(run, *records) if row.agrees}
    logps = {"logps/chosen", "logps/rejected"}
    assert agreed == {5.9e-5: logps | {"rewards/chosen", "rewards/rejected", "rewards/margins"}, 6.1e-5: logps}


def test_comparison_with_nan_never_agrees() -> None:
    rows = [Comparison("loss", 1, 1.0, 1.5), Comparison("loss", 2, math.nan, 1.0), Comparison("loss", 3, 1.0, 9.0)]
    assert not rows[1].agrees
    assert not Comparison("loss", 1, math.nan, math.nan).agrees
    assert worst(rows) is rows[1]


def test_compare_refuses_runs_of_other_lengths(tmp_path: Path) -> None:
    run = ParityRun(model_dir=tmp_path, data_file=tmp_path, work_dir=tmp_path, loss=DPOConfig(), steps=2)
    step = dict.fromkeys(run.metrics, 1.0)
    records = [TrainerRecord(pairs=[pair()], steps=[step] * count, seconds=0.0) for count in (2, 1)]
    with pytest.raises(DataError, match="asked for 2 steps, TRL did 2 and fastpref 1"):
        compare(run, *records)
