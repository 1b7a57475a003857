"""The load-balancing loss of experts: its gradient, what it is a mean over, and what it leaves out."""

import math
from dataclasses import replace
from pathlib import Path

import hf_oracle
import pytest
import torch
from hf_oracle import Answer
from torch import Tensor

from checks.tiny import stock_model, tiny_pairs
from fastpref.data import PackedCollator, PreferenceCollator
from fastpref.errors import ConfigError
from fastpref.testing.numerics import assert_within_rule
from fastpref.trainer import DPOConfig, DPOTrainer, ModelOptions, load_models, save_hf
from fastpref.trainer.model.moe import BalanceMeter, complete_router, install_routers
from fastpref.trainer.step.batch import Microbatch

COEFFICIENT, BETA = 0.3, 0.5


def microbatches() -> list[Microbatch]:
    """Rows of many lengths: two pairs, a pair beside a filler, and fillers alone."""
    collate, pairs = PreferenceCollator(0), tiny_pairs(6, seed=4)
    batches = [Microbatch.from_dict(collate(pairs[start : start + 2])) for start in (0, 2, 4)]
    weights = [torch.ones(2), torch.tensor([1.0, 0.0]), torch.zeros(2)]
    return [replace(batch, weights_B=weights_B) for batch, weights_B in zip(batches, weights, strict=True)]


def plain_gradients(model: torch.nn.Module, batches: list[Microbatch]) -> tuple[dict[str, Tensor], float]:
    """DPO at policy == reference plus the coefficient times `E sum f P`, by transformers and autograd.

    Returns:
        (gradients, mean of the load-balancing loss over layers and microbatches with tokens that count).
    """
    seen: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _, args, outputs: seen.append(outputs[0]))
        for module in model.modules()
        if type(module).__name__.endswith("TopKRouter")
    ]
    num_pairs = sum(float(batch.weights_B.sum()) for batch in batches)
    total, balance = torch.zeros(()), []
    for batch in batches:
        seen.clear()
        logps_NLV = model(batch.input_ids_NL).logits.log_softmax(-1)
        labels_NL = batch.labels_NL.clamp(min=0)
        logps_N = (logps_NLV.gather(2, labels_NL[..., None])[..., 0] * (batch.labels_NL != -100)).sum(1)
        chosen_B, rejected_B = (logps_N - logps_N.detach()).chunk(2)
        losses_B = -torch.nn.functional.logsigmoid(BETA * (chosen_B - rejected_B))
        total = total + (losses_B * batch.weights_B).sum() / num_pairs
        counts_T = ~batch.padding_NL.reshape(-1) & (batch.weights_B != 0).repeat(2).repeat_interleave(batch.seq_length)
        for logits_TE in seen if counts_T.any() else []:
            probs_TE = logits_TE[counts_T].softmax(-1)
            choices = probs_TE.topk(model.config.num_experts_per_tok, dim=-1).indices
            share_E = torch.bincount(choices.reshape(-1), minlength=probs_TE.size(1)) / choices.numel()
            balance.append(probs_TE.size(1) * (share_E * probs_TE.mean(0)).sum())
    total = total + COEFFICIENT * torch.stack(balance).sum() / len(batches)
    model.zero_grad()
    total.backward()
    for hook in hooks:
        hook.remove()
    return hf_oracle.gradients_of(model), float(torch.stack(balance).mean())


@pytest.mark.parametrize("variant", ["qwen3-moe", "mixtral"])
@pytest.mark.parametrize("recompute", [None, "full"])
def test_gradients_hold_the_load_balancing_loss(
    quiet_args, tmp_path: Path, variant: str, recompute: str | None
) -> None:
    model = hf_oracle.make_model(variant)
    path = hf_oracle.save(model, tmp_path / "model")
    options = ModelOptions(moe_aux_loss_coeff=COEFFICIENT, recompute_granularity=recompute)
    args = quiet_args(
        gradient_accumulation_steps=3, moe_aux_loss_coeff=COEFFICIENT, recompute_granularity=recompute, max_steps=1
    )
    trainer = DPOTrainer(load_models(path, options), DPOConfig(beta=BETA), None, args)
    trainer.create_optimizer_and_scheduler(1)
    batches = trainer.engine.reference.attach(microbatches(), None)
    for chunk in trainer.models_wrapped:
        chunk.train()
        chunk.zero_grad_buffer()
    results = trainer.engine.schedule.forward_backward(trainer.models_wrapped, batches)
    loss, weight = (sum(float(result.metrics["loss"][part]) for result in results) for part in (0, 1))
    assert loss / weight == pytest.approx(math.log(2.0), rel=1e-6)
    for parameter in trainer.model[0].parameters():
        parameter.data.copy_(parameter.main_grad)
    save_hf(trainer.model, tmp_path / "gradients", path)
    expected, _ = plain_gradients(model, microbatches())
    exact, balance = plain_gradients(hf_oracle.in_fp64(model), microbatches())
    nothing = torch.zeros(1)
    got = Answer(nothing, hf_oracle.read_tensors(tmp_path / "gradients"))
    hf_oracle.assert_as_accurate(got, Answer(nothing, expected), Answer(nothing, exact))
    metrics = trainer.engine.balance.read()
    assert metrics["moe/load_balancing_loss"] == pytest.approx(balance, rel=1e-5)
    assert trainer.engine.balance.read() == {}


def plain_shares(x_TH: Tensor, router_EH: Tensor, top_k: int) -> Tensor:
    """What each expert is for each token, 0 for most of them: in fp32 at least."""
    wide = torch.promote_types(x_TH.dtype, torch.float32)
    values_TK, chosen_TK = (x_TH.to(wide) @ router_EH.to(wide).t()).softmax(-1).topk(top_k)
    shares_TE = torch.zeros(len(x_TH), len(router_EH), dtype=wide)
    return shares_TE.scatter(1, chosen_TK, values_TK / values_TK.sum(-1, keepdim=True))


def plain_experts(x_TH: Tensor, shares_TE: Tensor, experts: list[list[Tensor]]) -> Tensor:
    """Every expert on every token, times its share, in the dtype of `x_TH`."""
    linear, output_TH = torch.nn.functional.linear, torch.zeros_like(x_TH)
    for share_T, (gate_FH, up_FH, down_HF) in zip(shares_TE.to(x_TH.dtype).unbind(1), experts, strict=True):
        inner_TF = torch.nn.functional.silu(linear(x_TH, gate_FH)) * linear(x_TH, up_FH)
        output_TH = output_TH + share_T[:, None] * linear(inner_TF, down_HF)
    return output_TH


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("variant", "block", "parts"),
    [
        ("qwen3-moe", "mlp", ("gate_proj", "up_proj", "down_proj")),
        ("mixtral", "block_sparse_moe", ("w1", "w3", "w2")),
    ],
)
def test_experts_in_16_bits_are_as_accurate_as_plain_pytorch(
    one_rank, tmp_path: Path, variant: str, block: str, parts: tuple[str, ...], dtype: torch.dtype
) -> None:
    """A layer of experts alone, so that no rounding before it moves a token to another expert."""
    path = hf_oracle.save(hf_oracle.make_model(variant).to(dtype), tmp_path / "model")
    prefix, tensors = f"model.layers.0.{block}", hf_oracle.read_tensors(path)
    num_experts = len(tensors[f"{prefix}.gate.weight"])
    names = [f"{prefix}.experts.{index}.{part}.weight" for index in range(num_experts) for part in parts]
    generator = torch.Generator().manual_seed(2)
    x_TH = torch.randn(64, 48, generator=generator).to(dtype)
    weights_TH = torch.randn(64, 48, generator=generator).to(dtype)
    (model,) = load_models(path, ModelOptions(params_dtype=dtype))
    layer = model.decoder.layers[0].mlp
    found = []
    for wide in (dtype, torch.float64):
        leaves = [x_TH, tensors[f"{prefix}.gate.weight"], *(tensors[name] for name in names)]
        x, router, *rest = leaves = [leaf.detach().to(wide).requires_grad_() for leaf in leaves]
        shares_TE = plain_shares(x, router, layer.config.moe_router_topk)
        output_TH = plain_experts(x, shares_TE, [rest[i : i + 3] for i in range(0, len(rest), 3)])
        found.append([shares_TE, output_TH, *torch.autograd.grad((output_TH * weights_TH.to(wide)).sum(), leaves)])
    x_T1H = x_TH[:, None].clone().requires_grad_()
    shares_TE, _ = layer.router(x_T1H.detach())
    output_T1H, _ = layer(x_T1H)
    output_T1H.backward(weights_TH[:, None])
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    save_hf([model], tmp_path / "gradients", path)
    gradients = hf_oracle.read_tensors(tmp_path / "gradients")
    got = [
        shares_TE,
        output_T1H[:, 0],
        x_T1H.grad[:, 0],
        gradients[f"{prefix}.gate.weight"],
        *(gradients[name] for name in names),
    ]
    for index, (ours, plain, exact) in enumerate(zip(got, *found, strict=True)):
        assert_within_rule(ours, plain, exact, kind="gradient" if index > 1 else "output")


def test_reference_and_evaluation_add_nothing_to_the_balance(quiet_args, tmp_path: Path) -> None:
    path = hf_oracle.save(hf_oracle.make_model("qwen3-moe"), tmp_path / "model")
    options = ModelOptions(moe_aux_loss_coeff=COEFFICIENT)
    args = quiet_args(moe_aux_loss_coeff=COEFFICIENT)
    pairs = tiny_pairs(4, seed=4)
    trainer = DPOTrainer(load_models(path, options), DPOConfig(), None, args, train_dataset=pairs, eval_dataset=pairs)
    trainer.engine.reference.attach(microbatches(), None)
    assert set(trainer.evaluate()) >= {"eval_loss"}
    assert trainer.engine.balance.read() == {}


def test_run_without_a_coefficient_has_no_balance(quiet_args, tmp_path: Path) -> None:
    path = hf_oracle.save(hf_oracle.make_model("qwen3-moe"), tmp_path / "model")
    pairs = tiny_pairs(8, seed=4)
    args = quiet_args(max_steps=1)
    trainer = DPOTrainer(load_models(path), DPOConfig(), None, args, train_dataset=pairs)
    assert trainer.engine.balance is None
    trainer.train()
    assert not any(name.startswith("moe/") for name in trainer.log_history[0])


def test_router_metrics_of_an_even_choice(one_rank, tmp_path: Path) -> None:
    path = hf_oracle.save(hf_oracle.make_model("qwen3-moe"), tmp_path / "model")
    models = load_models(path, ModelOptions(moe_aux_loss_coeff=1.0))
    meter = install_routers(models)
    router = models[0].decoder.layers[0].mlp.router
    scores_NE = torch.full((8, 8), 1 / 8, requires_grad=True)
    chosen_NE = torch.eye(8) + torch.eye(8).roll(1, 0) + torch.eye(8).roll(2, 0)  # every expert three times
    probs_NE = router._apply_aux_loss(torch.ones(8, 8, requires_grad=True), scores_NE, chosen_NE, True)
    assert torch.equal(probs_NE, torch.ones(8, 8))
    assert meter.read() == pytest.approx({"moe/load_balancing_loss": 1.0, "moe/expert_imbalance": 1.0})
    router._apply_aux_loss(torch.ones(8, 8), torch.zeros(8, 8), torch.zeros(8, 8), True)
    assert meter.read() == {}


def test_uncounted_tokens_are_padding_and_fillers() -> None:
    pairs = tiny_pairs(3, seed=4)
    batch = microbatches()[1].padded_to(24)
    sides = [
        getattr(pair, f"{side}_input_ids") for side in ("chosen", "rejected") for pair in tiny_pairs(6, seed=4)[2:4]
    ]
    lengths_N = torch.tensor([len(token_ids) - 1 for token_ids in sides])
    counted_NL = torch.arange(24) < lengths_N[:, None]
    counted_NL[1] = counted_NL[3] = False
    assert torch.equal(batch.uncounted_NL, ~counted_NL)
    packed = Microbatch.from_dict(PackedCollator(PreferenceCollator(0), prefix_sharing=True)(pairs))
    packed = replace(packed, weights_B=torch.tensor([1.0, 0.0, 1.0])).padded_to(packed.seq_length + 8)
    starts, stops = zip(*((pair.start, pair.stop) for pair in packed.segments.pairs), strict=True)
    position_L = torch.arange(packed.seq_length)
    first, last = ((position_L >= starts[index]) & (position_L < stops[index]) for index in (0, 2))
    assert torch.equal(packed.uncounted_NL[0], ~(first | last))


def test_trainer_refuses_another_coefficient_or_balancing_loss(quiet_args, tmp_path: Path) -> None:
    path = hf_oracle.save(hf_oracle.make_model("qwen3-moe"), tmp_path / "model")
    with pytest.raises(ConfigError, match=r"moe_aux_loss_coeff: the model was built with 0\.0, .* ask for 0\.1"):
        DPOTrainer(load_models(path), DPOConfig(), None, quiet_args(moe_aux_loss_coeff=0.1))
    models = load_models(path, ModelOptions(moe_aux_loss_coeff=0.1))
    models[0].config.moe_router_load_balancing_type = "seq_aux_loss"
    with pytest.raises(ConfigError, match=r"moe_router_load_balancing_type must be 'aux_loss' .* got 'seq_aux_loss'"):
        install_routers(models)


def test_balance_meter_weighs_microbatches_alike(one_rank) -> None:
    meter = BalanceMeter()
    for loss, imbalance in ((1.0, 2.0), (2.0, 4.0)):
        meter.add(torch.tensor(loss), torch.tensor(imbalance), torch.tensor(1.0))
    assert meter.read() == {"moe/load_balancing_loss": 1.5, "moe/expert_imbalance": 3.0}


@pytest.mark.parametrize("coefficient", [0.5, 0.0])
def test_coefficient_in_megatrons_list_is_the_coefficient(quiet_args, tmp_path: Path, coefficient: float) -> None:
    """Megatron takes several balancing losses as lists; one in a list is that one."""
    complete_router()
    trained = []
    for kinds, given in (("aux_loss", coefficient), (["aux_loss"], [coefficient])):
        models = stock_model(
            num_moe_experts=4,
            moe_ffn_hidden_size=16,
            moe_router_topk=2,
            moe_token_dispatcher_type="alltoall",
            moe_router_load_balancing_type=kinds,
            moe_aux_loss_coeff=given,
        )
        args = quiet_args(max_steps=2, moe_aux_loss_coeff=coefficient, output_dir=str(tmp_path / str(len(trained))))
        trainer = DPOTrainer(models, DPOConfig(), None, args, train_dataset=tiny_pairs(6, seed=4))
        trainer.train()
        logged = [record.get("moe/load_balancing_loss") for record in trainer.log_history]
        trained.append((logged, [parameter.detach().clone() for parameter in models[0].parameters()]))
    assert trained[0][0] == trained[1][0]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(trained[0][1], trained[1][1], strict=True))
