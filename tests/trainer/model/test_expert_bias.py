"""The expert bias of routers in models that a caller built: what its update counts, and when it happens at all."""

import math

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter

from checks.tiny import stock_model, tiny_pairs
from fastpref.errors import ConfigError, NonFiniteError
from fastpref.trainer import DPOConfig, DPOTrainer
from fastpref.trainer.model.moe import complete_router, install_routers

PAIRS = tiny_pairs(6, seed=4)
RATE = 0.01


def biased_model(num_experts: int = 8, **overrides: object) -> list[GPTModel]:
    """A tiny mixture with sigmoid scores and an expert bias, as DeepSeek-V3 has, of Megatron's own layers."""
    complete_router()
    settings = {
        "num_query_groups": None,
        "num_moe_experts": num_experts,
        "moe_ffn_hidden_size": 16,
        "moe_router_topk": 2,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": RATE,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_dtype": "fp32",
    }
    models = stock_model(**(settings | overrides))
    for router in routers_of(models):
        router.expert_bias.copy_(torch.linspace(-0.1001, 0.1001, num_experts))
    return models


def routers_of(models: list[GPTModel]) -> list[TopKRouter]:
    return [module for model in models for module in model.modules() if isinstance(module, TopKRouter)]


def counted_choices(trainer: DPOTrainer) -> list[torch.Tensor]:
    """Per router, filled during a step: how often each expert is chosen by tokens of pairs that count."""
    routers = routers_of(trainer.model)
    totals = [torch.zeros(router.config.num_moe_experts) for router in routers]

    def count(total: torch.Tensor):
        def hook(router, args, output) -> None:
            if router.training and torch.is_grad_enabled():
                mask_LS = args[1]  # as Megatron hands it to a router: True where a token does not count
                total.add_(output[1][~mask_LS.reshape(-1)].sum(0))

        return hook

    for router, total in zip(routers, totals, strict=True):
        router.register_forward_hook(count(total))
    return totals


# As many experts as a batch has tokens, so that a mask over tokens would also fit over experts, and fewer.
@pytest.mark.parametrize("num_experts", [8, 4])
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("recompute", [None, "full"])
def test_bias_counts_the_tokens_that_count(quiet_args, num_experts: int, packing: bool, recompute: str | None) -> None:
    full = {"recompute_method": "uniform", "recompute_num_layers": 1} if recompute else {}
    models = biased_model(num_experts, recompute_granularity=recompute, **full)
    args = quiet_args(packing=packing, recompute_granularity=recompute)
    trainer = DPOTrainer(models, DPOConfig(), None, args, train_dataset=PAIRS)
    before = [router.expert_bias.clone() for router in routers_of(trainer.model)]
    chosen = counted_choices(trainer)
    batches = trainer.feed.train_batches(0)
    num_counted = sum(int((~batch.uncounted_NL).sum()) for batch in batches)
    trainer.create_optimizer_and_scheduler(2)
    result = trainer.engine.run_step(trainer.models_wrapped, batches, 1)
    assert result.loss == pytest.approx(math.log(2.0), rel=1e-6)
    for router, bias_E, total_E in zip(routers_of(trainer.model), before, chosen, strict=True):
        assert float(total_E.sum()) == 2 * num_counted  # experts per token
        expected_E = bias_E + RATE * torch.sign(total_E.mean() - total_E)
        torch.testing.assert_close(router.expert_bias, expected_E)
        assert not torch.equal(router.expert_bias, bias_E)


def test_refused_step_leaves_the_bias(quiet_args) -> None:
    trainer = DPOTrainer(biased_model(), DPOConfig(), None, quiet_args(), train_dataset=PAIRS)
    trainer.create_optimizer_and_scheduler(2)
    before = [router.expert_bias.clone() for router in routers_of(trainer.model)]
    hook = trainer.model[0].output_layer.register_forward_hook(
        lambda _, args, output: (output[0] * math.nan, output[1])
    )
    with pytest.raises(NonFiniteError):
        trainer.engine.run_step(trainer.models_wrapped, trainer.feed.train_batches(0), 1)
    hook.remove()
    for router, bias_E in zip(routers_of(trainer.model), before, strict=True):
        assert torch.equal(router.expert_bias, bias_E)
        assert not router.local_tokens_per_expert.any()


def test_step_that_ends_in_an_error_leaves_no_counts(quiet_args) -> None:
    """The next step would count its tokens, too."""
    trainer = DPOTrainer(biased_model(), DPOConfig(), None, quiet_args(), train_dataset=PAIRS)
    trainer.create_optimizer_and_scheduler(2)

    def fail(*args: object) -> None:
        if trainer.model[0].training and torch.is_grad_enabled():
            raise OSError("the node goes down")

    hook = trainer.model[0].output_layer.register_forward_pre_hook(fail)
    with pytest.raises(OSError, match="the node goes down"):
        trainer.engine.run_step(trainer.models_wrapped, trainer.feed.train_batches(0), 1)
    hook.remove()
    assert all(not router.local_tokens_per_expert.any() for router in routers_of(trainer.model))


def test_bias_stays_in_fp32_where_the_model_is_in_bf16(quiet_args) -> None:
    """Rounded to bfloat16 it would choose other experts, and never move by a small update."""
    models = biased_model(params_dtype=torch.bfloat16, bf16=True)
    before = [router.expert_bias.clone() for router in routers_of(models)]
    trainer = DPOTrainer(models, DPOConfig(), None, quiet_args(bf16=True), train_dataset=PAIRS)
    reference = [part for model in trainer.ref_models for part in model.modules() if isinstance(part, TopKRouter)]
    for routers in (routers_of(trainer.model), reference):
        for router, bias_E in zip(routers, before, strict=True):
            assert router.expert_bias.dtype == router.local_tokens_per_expert.dtype == torch.float32
            assert torch.equal(router.expert_bias, bias_E)


def test_evaluation_and_reference_leave_bias_and_counts(quiet_args) -> None:
    trainer = DPOTrainer(biased_model(), DPOConfig(), None, quiet_args(), train_dataset=PAIRS, eval_dataset=PAIRS)
    before = [router.expert_bias.clone() for router in routers_of(trainer.model)]
    trainer.evaluate()
    for router, bias_E in zip(routers_of(trainer.model), before, strict=True):
        assert torch.equal(router.expert_bias, bias_E) and not router.local_tokens_per_expert.any()


class OwnRouter(TopKRouter):
    """A caller's router."""


def test_balancing_that_is_not_implemented_is_refused(one_rank) -> None:
    models = biased_model()
    models[0].config.moe_router_load_balancing_type = ["sinkhorn"]
    with pytest.raises(ConfigError, match="moe_router_load_balancing_type 'sinkhorn' routes by all tokens"):
        install_routers(models)
    models[0].config.moe_router_load_balancing_type = "none"
    with pytest.raises(ConfigError, match="build the model with moe_router_bias_update_rate 0"):
        install_routers(models, is_reference=True)
    routers_of(models)[1].__class__ = OwnRouter
    with pytest.raises(ConfigError, match="the router OwnRouter is not known"):
        install_routers(models)
    models[0].config.moe_router_enable_expert_bias = False
    assert install_routers(models, is_reference=True) is None


def test_z_loss_is_the_mean_of_the_tokens_that_count(one_rank) -> None:
    models = biased_model(moe_z_loss_coeff=0.25)
    install_routers(models)
    router = routers_of(models)[0].train()
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0))
    logits_NE = torch.randn(6, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    mask_N = torch.tensor([False, True, False, False, True, False])
    (found_NE,) = torch.autograd.grad(router.apply_z_loss(logits_NE, mask_N).sum(), logits_NE)
    (expected_NE,) = torch.autograd.grad(0.25 * logits_NE[~mask_N].logsumexp(1).square().mean(), logits_NE)
    torch.testing.assert_close(found_NE, expected_NE + 1.0)
    with torch.no_grad():
        assert router.apply_z_loss(logits_NE, mask_N) is logits_NE
