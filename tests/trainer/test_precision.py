"""Half precision with fp32 master weights, loss scaling, and recomputed activations."""

import math
from pathlib import Path

import pytest
import torch

from fastpref.testing.tiny import tiny_pairs
from fastpref.trainer import DPOConfig, DPOTrainer, ModelOptions, load_models

POLICY = Path(__file__).resolve().parents[1] / "golden" / "policy_init"
PAIRS = tiny_pairs(8)


def trained(args, options: ModelOptions) -> list[dict[str, float]]:
    trainer = DPOTrainer(load_models(POLICY, options), DPOConfig(), None, args, train_dataset=PAIRS)
    trainer.train()
    return trainer.log_history


def test_bf16_starts_at_ln_2_and_follows_fp32(quiet_args) -> None:
    options = {"max_steps": 6, "learning_rate": 5e-3}
    half = trained(quiet_args(bf16=True, **options), ModelOptions(params_dtype=torch.bfloat16))
    full = trained(quiet_args(**options), ModelOptions())
    assert half[0]["loss"] == pytest.approx(math.log(2), rel=1e-6) and half[0]["rewards/margins"] == 0.0
    # bf16 activations carry 3 significant digits: sums of about 30 nat are good to a few tenths
    for ours, theirs in zip(half, full, strict=True):
        assert ours["logps/chosen"] == pytest.approx(theirs["logps/chosen"], abs=0.3)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.1)
        assert ours["perf/cold_mass"] <= 2**-8 and "perf/cold_mass" not in theirs
    assert half[-1]["loss"] < 0.66 and full[-1]["loss"] < 0.66


def test_fp16_overflow_skips_the_update_and_the_schedule(quiet_args) -> None:
    """Megatron starts at a loss scale of 2^32: the first gradients overflow, and each skip halves the scale."""
    log = trained(quiet_args(fp16=True, max_steps=40, warmup_steps=4), ModelOptions(params_dtype=torch.float16))
    skipped = [bool(record["skipped_iter"]) for record in log]
    assert skipped[0] and not skipped[-1]
    first = skipped.index(False)
    assert all(record["lr"] == 0.0 for record in log[: first + 1]) and log[first + 1]["lr"] > 0.0
    assert log[-1]["loss"] < log[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize("granularity", ["full", "selective"])
def test_recompute_changes_no_number(quiet_args, granularity: str) -> None:
    options = {"max_steps": 3}
    plain = trained(quiet_args(**options), ModelOptions())
    recomputed = trained(
        quiet_args(recompute_granularity=granularity, **options), ModelOptions(recompute_granularity=granularity)
    )
    for ours, theirs in zip(recomputed, plain, strict=True):
        for key in ("loss", "grad_norm", "logps/chosen", "rewards/margins"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-6, abs=1e-7), key
