"""Fault 23: odd sequences, unequal counts and impossible loss options are refused at construction, not in step 1000."""

import math
from pathlib import Path

import pytest
import torch

from fastpref.errors import ConfigError, DataError
from fastpref.losses import DPOConfig, PairLogps, split_pairs
from fastpref.trainer.step.batch import Microbatch


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": 0}, r"beta must be a finite number > 0, got 0"),
        ({"beta": -0.1}, r"beta must be .* got -0.1"),
        ({"beta": math.nan}, r"beta must be .* got nan"),
        ({"beta": math.inf}, r"beta must be .* got inf"),
        ({"beta": "0.1"}, r"beta must be .* got '0.1'"),
        ({"beta": True}, r"beta must be .* got True"),
        ({"beta": None}, r"beta must be .* got None"),
        ({"label_smoothing": -0.01}, r"label_smoothing must be in \[0, 0.5\].* got -0.01"),
        ({"label_smoothing": 0.51}, r"label_smoothing must be in \[0, 0.5\].* got 0.51"),
        ({"label_smoothing": math.nan}, r"label_smoothing must be .* got nan"),
        ({"pref_loss": "robust", "label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\), got 0.5; robust"),
        ({"pref_loss": "exo_pair"}, r"label_smoothing must be in \(0, 0.5\], got 0.0; exo_pair.*try 1e-3"),
    ],
    ids=str,
)
def test_config_refuses_beta_and_label_smoothing_that_no_loss_can_have(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DPOConfig(**arguments)


@pytest.mark.parametrize("command", ["check", "train"])
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("loss.beta=0", "beta must be a finite number > 0, got 0"),
        ("loss.label_smoothing=0.7", "label_smoothing must be in [0, 0.5]"),
    ],
)
def test_command_refuses_the_loss_before_anything_is_made(
    project: Path, run_cli, command: str, setting: str, message: str
) -> None:
    result = run_cli(command, "run.yaml", setting)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())
    assert not (project / "out").exists()


@pytest.mark.parametrize("shape", [(3,), (2, 2), ()])
def test_split_pairs_of_an_odd_number_of_sequences_raises(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"logps_S must be \(S,\) with S even.*got shape"):
        split_pairs(torch.zeros(shape), "logps_S")


def test_pair_logps_of_unequal_counts_of_responses_raises() -> None:
    one, two = torch.zeros(1), torch.zeros(2)
    with pytest.raises(ValueError, match=r"rejected must have one value per pair.*\(2,\), got \(1,\)"):
        PairLogps(chosen=two, rejected=one, chosen_counts=two, rejected_counts=two)
    with pytest.raises(ValueError, match=r"chosen must be \(B,\).*got shape \(2, 3\)"):
        PairLogps(chosen=torch.zeros(2, 3), rejected=two, chosen_counts=two, rejected_counts=two)
    with pytest.raises(ValueError, match="ref_chosen and ref_rejected go together"):
        PairLogps(chosen=two, rejected=two, chosen_counts=two, rejected_counts=two, ref_chosen=two)
    with pytest.raises(ValueError, match="nll and nll_counts go together"):
        PairLogps(chosen=two, rejected=two, chosen_counts=two, rejected_counts=two, nll=two)
    with pytest.raises(TypeError, match=r"chosen must be floating point, got torch\.int64"):
        PairLogps(chosen=two.long(), rejected=two, chosen_counts=two, rejected_counts=two)


def test_odd_rows_are_refused_by_the_trainer() -> None:
    """A batch from a user's own collator: chosen and rejected rows must come in equal numbers."""
    rows = torch.zeros(5, 8, dtype=torch.long)
    with pytest.raises(
        DataError, match=r"the n chosen rows first and the n rejected rows after them; got shape \(5, 8\)"
    ):
        Microbatch.from_dict({"input_ids": rows, "labels": rows})
