"""Fault 24: swapped sides negate the margin, permuted pairs change nothing, and microbatches add up to the batch."""

import pytest
import torch
from loss_oracle import CASES
from loss_pairs import NAMES, SORTED_CASES, WEIGHTS, B, batch, config_of, run

from checks.layout_parity.runs import TOLERANCES
from checks.tiny import stock_model, tiny_pairs
from fastpref.losses import LOSSES, DPOConfig, LossContext, PairLogps, preference_loss
from fastpref.trainer import DPOTrainer


@pytest.mark.parametrize("name", LOSSES)
def test_swapping_sides_negates_margins_and_the_sigmoid_odd_part(name: str) -> None:
    config = config_of(name)
    columns = batch()
    refs = {field: columns[field] for field in NAMES[2:4]} if config.use_ref_model else {}
    swapped = {
        field: columns[other] for field, other in zip(NAMES, [NAMES[i] for i in (1, 0, 3, 2, 5, 4)], strict=True)
    }
    swapped_refs = {field: swapped[field] for field in refs}
    plain = {field: columns[field] for field in (*NAMES[:2], *NAMES[4:])}
    mirrored = {field: swapped[field] for field in plain}
    one = preference_loss(config, PairLogps(**plain, **refs))
    other = preference_loss(config, PairLogps(**mirrored, **swapped_refs))
    margins = one.chosen_rewards - one.rejected_rewards
    assert torch.equal(other.chosen_rewards - other.rejected_rewards, -margins)
    assert torch.equal(other.chosen_rewards, one.rejected_rewards)
    if name == "sigmoid":
        torch.testing.assert_close(other.losses - one.losses, margins)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", [*CASES, *SORTED_CASES])
def test_permuting_pairs_permutes_losses_and_gradients_exactly(case: str, dtype: torch.dtype) -> None:
    config, columns = DPOConfig(**(CASES | SORTED_CASES)[case]), batch(dtype)
    order = torch.tensor([3, 7, 0, 5, 1, 6, 2, 4])
    # given, not averaged here: a mean over the batch would depend on the order of summation
    mean_count = (WEIGHTS * columns["chosen_counts"]).sum() / WEIGHTS.sum()
    results = [
        run(config, columns, rows, LossContext(pair_weights=WEIGHTS[rows], mean_nll_count=mean_count))
        for rows in (torch.arange(B), order)
    ]
    for straight, permuted in zip(*results, strict=True):
        assert torch.equal(permuted, straight[order])


@pytest.mark.parametrize("size", [1, 2, 3, B])
@pytest.mark.parametrize("case", CASES)
def test_microbatches_add_up_to_the_batch(case: str, size: int) -> None:
    config, columns = DPOConfig(**CASES[case]), batch(torch.float32)
    mean_count = ((WEIGHTS * columns["chosen_counts"]).sum() / WEIGHTS.sum()).item()
    whole = run(config, columns, torch.arange(B))
    parts = [
        run(config, columns, rows, LossContext(pair_weights=WEIGHTS[rows], mean_nll_count=mean_count))
        for rows in torch.arange(B).split(size)
    ]
    for index in range(3):
        torch.testing.assert_close(torch.cat([part[index] for part in parts]), whole[index])


@pytest.mark.parametrize("pref_loss", ["sigmoid", "cpo"])  # a mean over pairs, and one over tokens beside it
def test_accumulated_gradient_equals_that_of_the_full_batch(quiet_args, pref_loss: str) -> None:
    """8 pairs whose answers have 1 to 9 tokens, in microbatches of 8, 4 and 1: the divisor is the step's."""
    results = []
    for size in (B, 4, 1):
        args = quiet_args(per_device_train_batch_size=size, gradient_accumulation_steps=B // size, max_grad_norm=0.0)
        reference = stock_model(1) if pref_loss == "sigmoid" else None
        config = DPOConfig(pref_loss=pref_loss)
        trainer = DPOTrainer(stock_model(0), config, reference, args, train_dataset=tiny_pairs(B, seed=3))
        step = trainer.engine.run_step(trainer.models_wrapped, trainer.feed.train_batches(0))
        gradient = torch.cat([parameter.main_grad.flatten() for parameter in trainer.model[0].parameters()])
        results.append((step.loss, gradient.clone()))
    (loss, gradient), *others = results
    tolerance = TOLERANCES[torch.float32]
    for other_loss, other in others:
        assert other_loss == pytest.approx(loss, rel=tolerance.metric)
        assert (other - gradient).norm() <= tolerance.update * gradient.norm()
