"""The check of the first step: the rounding of sums in changing orders passes it, and faults are found."""

from collections.abc import Callable
from types import SimpleNamespace

import hf_oracle
import pytest
import torch
from megatron.core.transformer.moe import token_dispatcher
from transformers import Qwen3MoeConfig

from checks.tiny import TINY_LLAMA, tiny_pairs
from fastpref.errors import FastprefError
from fastpref.trainer import DPOConfig, DPOTrainer, ModelOptions, build_models
from fastpref.trainer.reference.first_step import check_first_step, order_noise

EXPERTS = Qwen3MoeConfig(
    **{**hf_oracle.SIZES, "vocab_size": 64, "num_hidden_layers": 2},
    **hf_oracle.EXPERTS,
    head_dim=16,
    norm_topk_prob=True,
    initializer_range=0.2,
).to_dict()
DENSE = TINY_LLAMA | {"initializer_range": 0.2}
PAIRS = tiny_pairs(8, seed=4)
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def trainer_of(quiet_args) -> Callable[..., DPOTrainer]:
    def make(config: dict, dtype: torch.dtype = torch.float32) -> DPOTrainer:
        args = quiet_args(bf16=dtype == torch.bfloat16, max_steps=1, per_device_train_batch_size=4)
        models = build_models(config, ModelOptions(params_dtype=dtype), seed=3)
        return DPOTrainer(models, DPOConfig(beta=1.0), None, args, train_dataset=PAIRS)

    return make


@pytest.fixture
def unordered(monkeypatch) -> list[float]:
    """Every pass adds the outputs of a token's experts in another order, as a GPU does; filled by what that changes."""
    unpermute, generator, changes = token_dispatcher.unpermute, torch.Generator().manual_seed(0), []

    def add_in_some_order(tokens: torch.Tensor, indices: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        exact = unpermute(tokens, indices, *args, **kwargs)
        order = torch.randperm(len(indices), generator=generator)
        order = order[indices[order].argsort(stable=True)]
        places, output = indices[order], torch.zeros_like(exact)
        nth = torch.arange(len(places)) - torch.searchsorted(places, places)
        for term in range(int(nth.max()) + 1):  # each sum is rounded, as that of an atomic addition
            output = output.index_add(0, places[nth == term], tokens[order[nth == term]])
        changes.append(float((output - exact).detach().abs().max()))
        return output

    monkeypatch.setattr(token_dispatcher, "unpermute", add_in_some_order)
    return changes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_order_of_experts_passes(trainer_of, unordered: list[float], dtype: torch.dtype) -> None:
    trainer = trainer_of(EXPERTS, dtype)
    trainer.train()
    assert max(unordered) > 0
    loss = trainer.log_history[0]["loss"]
    assert dtype == torch.float32 or abs(loss - 0.6931472) > 1e-5  # more than a pass that rounds alike may differ


def with_dropout(trainer: DPOTrainer) -> None:
    for layer in trainer.model[0].decoder.layers:
        layer.mlp.register_forward_hook(
            lambda module, _, output: (torch.nn.functional.dropout(output[0], 0.1, module.training), output[1])
        )


def with_another_mode(trainer: DPOTrainer) -> None:
    norm = trainer.model[0].decoder.final_layernorm
    norm.register_forward_hook(lambda module, _, output: output * 1.2 if module.training else output)


def with_another_reference(trainer: DPOTrainer) -> None:
    for parameter in trainer.ref_models[0].parameters():
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        parameter.data += (0.1 * parameter.float().std(correction=0) * noise).to(parameter.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fault", [with_dropout, with_another_mode, with_another_reference])
@pytest.mark.parametrize("config", [EXPERTS, DENSE], ids=["experts", "dense"])
def test_faults_are_found(trainer_of, unordered, config: dict, fault: Callable, dtype: torch.dtype) -> None:
    trainer = trainer_of(config, dtype)
    fault(trainer)
    before = [parameter.clone() for parameter in trainer.model[0].parameters()]
    with pytest.raises(FastprefError, match=r"policy and reference start equal.*set check_initial_loss: false"):
        trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(trainer.model[0].parameters(), before, strict=True))


def checked(trainer: DPOTrainer, deviations: float) -> None:
    """Run the check on log-probs that lie `deviations` of the rounding of their tokens away from the reference's."""
    config = trainer.model[0].config
    batches = trainer.engine.attach_reference(trainer.feed.train_batches(0), PAIRS)
    generator = torch.Generator().manual_seed(5)
    results = []
    for batch in batches:
        signs_S = torch.randint(0, 2, batch.counts_S.shape, generator=generator) * 2 - 1
        moved_S = deviations * order_noise(config) * batch.counts_S.sqrt() * signs_S
        results.append(SimpleNamespace(batch=batch, logps_S=batch.ref_logps_S + moved_S))
    check_first_step(0.6931472, results, trainer.engine.reference, trainer.train_config, config)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bound_of_experts_is_a_few_deviations(trainer_of, dtype: torch.dtype) -> None:
    trainer = trainer_of(EXPERTS, dtype)
    for deviations in (0.0, 1.0, 3.0):
        checked(trainer, deviations)
    for deviations in (10.0, float("nan")):
        with pytest.raises(FastprefError, match="the order in which outputs of experts are added accounts for"):
            checked(trainer, deviations)


def test_what_adds_in_one_order_keeps_its_rule(trainer_of) -> None:
    trainer = trainer_of(EXPERTS)
    config = trainer.model[0].config
    # 2 (k - 1) = 4 roundings of variance eps^2 / 12, times 8 nat; and 32 eps of the layers behind
    eps = torch.finfo(torch.float32).eps
    assert order_noise(config) == pytest.approx((32**2 + 8**2 * 4 / 12) ** 0.5 * eps)
    ordered = [
        replace_config(config, num_moe_experts=None),
        replace_config(config, moe_router_topk=1),
        replace_config(config, moe_permute_fusion=True),
    ]
    assert [order_noise(each) for each in ordered] == [0.0] * 3
    assert order_noise(replace_config(config, moe_permute_fusion=True, moe_token_dispatcher_type="flex")) > 0
    torch.use_deterministic_algorithms(True)
    try:
        assert order_noise(config) == 0.0
    finally:
        torch.use_deterministic_algorithms(False)
    dense = trainer.engine.reference, trainer.train_config, ordered[0]
    check_first_step(0.6931472 + 5e-6, [], *dense)
    with pytest.raises(FastprefError, match=r"the first loss must be 0\.693147, but it is 0\.693167"):
        check_first_step(0.6931472 + 2e-5, [], *dense)


def replace_config(config, **changes: object) -> SimpleNamespace:
    return SimpleNamespace(**(vars(config) | changes))


@pytest.mark.parametrize("name", ["hidden_dropout", "attention_dropout", "moe_input_jitter_eps"])
def test_nothing_is_required_of_a_policy_that_draws_numbers(trainer_of, name: str) -> None:
    trainer = trainer_of(EXPERTS)
    config = replace_config(trainer.model[0].config, **{name: 0.1})
    check_first_step(7.0, [], trainer.engine.reference, trainer.train_config, config)
