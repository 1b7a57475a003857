"""Half precision with fp32 master weights, loss scaling, and recomputed activations."""

import math
from pathlib import Path

import hf_oracle
import pytest
import torch

from checks.tiny import tiny_pairs
from fastpref.data import PreferenceCollator, PreferenceDataset
from fastpref.testing.numerics import assert_within_rule
from fastpref.trainer import (
    DPOConfig,
    DPOTrainer,
    LoraConfig,
    ModelOptions,
    ReferenceCache,
    add_lora,
    load_models,
    save_hf,
    score_reference,
)
from fastpref.trainer.reference.reference import MAX_DRIFT
from fastpref.trainer.step.batch import Microbatch

POLICY = Path(__file__).resolve().parents[1] / "golden" / "policy_init"
PAIRS = tiny_pairs(8)
HALF = ModelOptions(params_dtype=torch.bfloat16)
BETA = 0.5
FORMS = {"padded": {}, "packed": {"packing": True}, "shared": {"packing": True, "prefix_sharing": True}}


def trained(args, options: ModelOptions) -> list[dict[str, float]]:
    trainer = DPOTrainer(load_models(POLICY, options), DPOConfig(), None, args, train_dataset=PAIRS)
    trainer.train()
    return trainer.log_history


def test_bf16_starts_at_ln_2_and_follows_fp32(quiet_args) -> None:
    options = {"max_steps": 6, "learning_rate": 5e-3}
    half = trained(quiet_args(bf16=True, **options), HALF)
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


def plain_dpo(model: torch.nn.Module, pairs: list) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Response sums [S] and gradients of DPO at policy == reference, by transformers and autograd on padded rows."""
    batch = Microbatch.from_dict(PreferenceCollator(0)(pairs))
    logits_SLV = model(batch.input_ids_NL).logits
    logps_SLV = logits_SLV.to(torch.promote_types(logits_SLV.dtype, torch.float32)).log_softmax(-1)
    labels_SL = batch.labels_NL.clamp(min=0)
    logps_S = (logps_SLV.gather(2, labels_SL[..., None])[..., 0] * (batch.labels_NL != -100)).sum(1)
    chosen_B, rejected_B = (logps_S - logps_S.detach()).chunk(2)
    model.zero_grad()
    (-torch.nn.functional.logsigmoid(BETA * (chosen_B - rejected_B))).mean().backward()
    return logps_S.detach(), hf_oracle.gradients_of(model)


@pytest.mark.parametrize("variant", ["qwen3", "gemma3"])
def test_bf16_rows_of_every_form_are_as_accurate_as_transformers(quiet_args, tmp_path: Path, variant: str) -> None:
    pairs = tiny_pairs(12, seed=4, vocab_size=96)
    model = hf_oracle.make_model(variant).bfloat16()
    path = hf_oracle.save(model, tmp_path / "model")
    plain_S, plain = plain_dpo(model, pairs)
    exact_S, exact = plain_dpo(hf_oracle.in_fp64(model), pairs)
    batches = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "shuffle": False}
    for form, settings in FORMS.items():
        args = quiet_args(bf16=True, head_backward="exact", **batches, **settings)
        trainer = DPOTrainer(load_models(path, HALF), DPOConfig(beta=BETA), None, args, train_dataset=pairs)
        trainer.create_optimizer_and_scheduler(1)
        for chunk in trainer.models_wrapped:
            chunk.train()
            chunk.zero_grad_buffer()
        rows = trainer.engine.attach_reference(trainer.feed.train_batches(0), pairs)
        logps_S = torch.zeros(2 * len(pairs))
        for result in trainer.engine.schedule.forward_backward(trainer.models_wrapped, rows):
            assert result.output.losses.tolist() == pytest.approx([math.log(2)] * result.batch.num_pairs, rel=1e-6)
            logps_S.view(2, -1)[:, result.batch.pair_ids_B] = result.logps_S.view(2, -1)
        assert_within_rule(logps_S, plain_S, exact_S)
        for parameter in trainer.model[0].parameters():
            parameter.data = parameter.main_grad
        save_hf(trainer.model, tmp_path / form, path, dtype=torch.float32)
        gradients = hf_oracle.read_tensors(tmp_path / form)
        assert set(gradients) == set(exact)
        for name, truth in exact.items():
            assert_within_rule(gradients[name], plain[name].float(), truth, kind="gradient")


@pytest.mark.parametrize("form", ["packed", "shared"])
def test_bf16_packed_run_with_a_padded_reference_cache_starts_at_log_2(quiet_args, tmp_path: Path, form: str) -> None:
    """Within what `MAX_DRIFT` per token can move a loss; its slope in the margin is at most 1, its curvature 1/4."""
    data = PreferenceDataset(PAIRS)
    models = load_models(POLICY, HALF)
    made = score_reference(models, [data], tmp_path / "cache", quiet_args(bf16=True), identity={})
    reference = ReferenceCache(made.path, starts_at_policy=True)
    args = quiet_args(bf16=True, max_steps=1, **FORMS[form])
    trainer = DPOTrainer(load_models(POLICY, HALF), DPOConfig(beta=BETA), reference, args, train_dataset=data)
    bounds = []
    for batch in trainer.feed.train_batches(0):
        margins_B = BETA * MAX_DRIFT[torch.bfloat16] * batch.counts_S.view(2, -1).sum(0)
        bounds += (margins_B / 2 + margins_B**2 / 8).tolist()
    trainer.train()
    assert abs(trainer.log_history[0]["loss"] - math.log(2)) <= sum(bounds) / len(bounds)


def test_bf16_adapters_are_updated_by_adamw_in_fp32(quiet_args) -> None:
    """Updates far below the last digit of bf16 add up in the masters, whose rounding the model computes with."""
    models = load_models(POLICY, HALF)
    add_lora(models, POLICY, LoraConfig(r=4, lora_alpha=16.0), seed=3)
    learning_rate, epsilon = 1e-5, 1e-6
    args = quiet_args(
        bf16=True, learning_rate=learning_rate, adam_epsilon=epsilon, max_grad_norm=0.0, lr_scheduler_type="constant"
    )
    trainer = DPOTrainer(models, DPOConfig(), None, args, train_dataset=PAIRS)
    adapters = [parameter for parameter in models[0].parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in adapters} == {torch.bfloat16}
    start = [parameter.detach().clone() for parameter in adapters]
    masters = [parameter.float().requires_grad_() for parameter in start]
    plain = torch.optim.AdamW(masters, lr=learning_rate, betas=(0.9, 0.999), eps=epsilon, weight_decay=0.0)
    for step in range(4):
        trainer.engine.run_step(trainer.models_wrapped, trainer.feed.train_batches(step))
        for master, parameter in zip(masters, adapters, strict=True):
            assert parameter.main_grad.dtype == torch.float32
            master.grad = parameter.main_grad.clone()
        plain.step()
    for master, parameter, before in zip(masters, adapters, start, strict=True):
        torch.testing.assert_close(parameter.main_param, master.detach(), rtol=4 * 2**-23, atol=1e-3 * learning_rate)
        assert torch.equal(parameter, parameter.main_param.bfloat16())
        assert ((parameter.main_param != before) & (parameter == before)).any() or not before.any()
