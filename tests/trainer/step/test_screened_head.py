"""The int8 form of a head: how long it serves, that it is of the weight as it is, and what it is not used for."""

from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
from peaked_models import COARSELY, EPS, PAIRS, peaked_model
from screened_passes import counted_passes
from torch import Tensor

from fastpref import screen_weight
from fastpref.trainer import DPOConfig, DPOTrainer, LoraConfig, add_lora
from fastpref.trainer.model import head
from fastpref.trainer.model.weight_forms import WeightForms

CONFIG = DPOConfig(beta=0.5)


@pytest.fixture
def finish(quiet_args) -> Callable[..., DPOTrainer]:
    """Runs a trainer of peaked models to its end."""

    def run(models: list | None = None, reference: list | None = None, **settings: object) -> DPOTrainer:
        args = quiet_args(**COARSELY | {"max_steps": 3} | settings)
        models = peaked_model() if models is None else models
        trainer = DPOTrainer(models, CONFIG, reference, args, train_dataset=PAIRS, eval_dataset=PAIRS[:7])
        trainer.train()
        return trainer

    return run


@pytest.fixture
def screened() -> Iterator[list[Tensor]]:
    """Copies of the weights that an int8 form was made of."""
    seen: list[Tensor] = []

    def screen(weight_VH: Tensor) -> object:
        seen.append(weight_VH.detach().clone())
        return screen_weight(weight_VH)

    with mock.patch.object(head, "screen_weight", screen):
        yield seen


def test_form_is_made_once_for_each_version_of_a_weight(finish, screened: list[Tensor]) -> None:
    """2 microbatches a step, and 4 an evaluation."""
    with counted_passes() as passes:
        trainer = finish(eval_steps=2, eval_on_start=True)
    # the reference once; the policy at the start (evaluation, step 1), in steps 2 and 3 and in two evaluations
    assert passes == {"screened": 2 * (3 * 2 + 3 * 4)}
    assert len(screened) == 1 + 1 + 3 + 2
    equal = [[int(torch.equal(one, other)) for other in screened] for one in screened]
    assert sum(map(sum, equal)) == 3 * 3 + 2 * 2 + 2  # start: reference, evaluation, step 1; step 2, evaluation and 3
    policy, reference = (head.head_of(models[0]).forms for models in (trainer.model, trainer.ref_models))
    assert not policy._made and policy._weight is None
    assert list(reference._made.values())


def test_frozen_head_is_screened_once_in_a_run(finish, screened: list[Tensor]) -> None:
    models = peaked_model()
    add_lora(models, models[0].architecture, LoraConfig(r=4), seed=1)
    with counted_passes() as passes:
        finish(models, eval_steps=2)
    assert passes == {"screened": 2 * (3 * 2 + 2 * 4)}  # policy and reference are one head
    assert len(screened) == 1


def test_shared_form_changes_no_bit(finish) -> None:
    shared = finish()
    with mock.patch.object(WeightForms, "get", lambda self, compute, weight_VH, num_rows: None):
        own = finish()
    for one, other in zip(shared.model[0].parameters(), own.model[0].parameters(), strict=True):
        assert torch.equal(one, other)


def test_form_that_outlives_its_step_is_refused(finish) -> None:
    with (
        mock.patch.object(WeightForms, "get", _kept_for_ever),
        pytest.raises(ValueError, match="screened is not of this weight as it is now"),
    ):
        finish()


def _kept_for_ever(self: WeightForms, compute: Callable, weight_VH: Tensor, num_rows: int) -> object:
    key = (compute, weight_VH.requires_grad)
    if key not in self._made:
        self._made[key] = compute(weight_VH[:num_rows])
    self.is_at_rest = True
    return self._made[key]


def test_policy_that_starts_at_its_reference_has_margin_0(finish) -> None:
    log = finish(max_steps=1, eval_on_start=True).log_history
    assert (log[0]["eval_rewards/margins"], log[1]["rewards/margins"]) == (0.0, 0.0)


def test_trainer_says_what_screening_gives_up(finish, capsys: pytest.CaptureFixture[str]) -> None:
    text = "the last bits of a pair's log-probs depend on what else is in its microbatch"
    finish(max_steps=1, disable_progress=False)
    assert capsys.readouterr().err.count(text) == 1
    finish(max_steps=1, disable_progress=False, head_forward="exact", head_backward="active")
    assert text not in capsys.readouterr().err


def test_evaluation_leaves_the_meters_of_training_alone(finish) -> None:
    trainer = finish(max_steps=1)
    assert 0.0 < trainer.log_history[0]["perf/active_vocab_fraction"] < 0.25
    trainer.evaluate()
    assert head.head_of(trainer.model[0]).activity.read() == [0.0] * 4
    assert trainer.log_history[0]["perf/cold_mass"] <= EPS
