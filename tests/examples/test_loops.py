"""The loops of examples/ compute what full logits give, on one rank and on two."""

import importlib
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from checks.tiny import VOCAB_SIZE, stock_model
from fastpref.testing.workers import RankPool

EXAMPLES = Path(__file__).parents[2] / "examples"
NUM_PAIRS = 4


@pytest.fixture(autouse=True)
def examples_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Like `python examples/...`; worker ranks get the path of this process."""
    monkeypatch.syspath_prepend(str(EXAMPLES))


def summed_logps(logits_SLV: Tensor, labels_SL: Tensor) -> Tensor:
    """Oracle: labels are shifted."""
    logps_SL = logits_SLV.double().log_softmax(-1).gather(2, labels_SL.clamp(min=0)[..., None])[..., 0]
    return torch.where(labels_SL != -100, logps_SL, 0.0).sum(1)


def dpo(logps_S: Tensor, ref_logps_S: Tensor) -> Tensor:
    chosen, rejected = (logps_S - ref_logps_S).chunk(2)
    return -logsigmoid(0.1 * (chosen - rejected)).mean()


def full_logits_loss(model: torch.nn.Module, ref_model: torch.nn.Module, ids_SL: Tensor, labels_SL: Tensor) -> Tensor:
    shifted_SL = torch.nn.functional.pad(labels_SL[:, 1:], (0, 1), value=-100)
    with torch.no_grad():
        ref_logps_S = summed_logps(ref_model(ids_SL).logits, shifted_SL)
    return dpo(summed_logps(model(ids_SL).logits, shifted_SL), ref_logps_S)


def policy_and_reference() -> list[torch.nn.Module]:
    from torch_loop import small_model

    models = [small_model(), small_model()]
    with torch.no_grad():
        for weight in models[1].parameters():  # another model, so that ratios are not 0
            weight.mul_(2.0)
    return models


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: weight.grad for name, weight in model.named_parameters()}


def test_torch_loop_equals_full_logits() -> None:
    import torch_loop

    model, ref_model = policy_and_reference()
    batch = torch_loop.read_batch(NUM_PAIRS)
    expected = full_logits_loss(model, ref_model, *batch)
    expected.backward()
    expected_gradients = gradients(model)
    model.zero_grad()
    loss = torch_loop.dpo_loss(model, ref_model, *batch)
    loss.backward()
    torch.testing.assert_close(loss, expected.float())
    torch.testing.assert_close(gradients(model), expected_gradients)
    assert abs(loss.item() - 0.6931) > 0.01


def test_torch_loop_learns() -> None:
    import torch_loop

    losses = torch_loop.train(torch_loop.small_model(), *torch_loop.read_batch(NUM_PAIRS), steps=4)
    assert losses[0] == pytest.approx(0.693147, abs=1e-6)
    assert losses[3] < losses[2] < losses[1] < losses[0]


def fsdp_step() -> tuple[float, dict[str, Tensor]]:
    """The loss of this rank's pairs, and the whole gradients."""
    import fsdp2_loop
    import torch_loop

    model, ref_model = policy_and_reference()
    ids_SL, labels_SL = map(fsdp2_loop.rank_pairs, torch_loop.read_batch(NUM_PAIRS))
    with torch.no_grad():
        ref_logps_S = torch_loop.sequence_logps(ref_model, ids_SL, labels_SL)
    sharded = fsdp2_loop.shard(model)
    loss = fsdp2_loop.dpo_loss(sharded, ref_logps_S, ids_SL, labels_SL)
    loss.backward()
    return loss.item(), {name: gradient.full_tensor() for name, gradient in gradients(sharded.model).items()}


def test_fsdp2_loop_equals_one_process(rank_pool_2: RankPool) -> None:
    import torch_loop

    results = rank_pool_2.run(fsdp_step)
    model, ref_model = policy_and_reference()
    expected = torch_loop.dpo_loss(model, ref_model, *torch_loop.read_batch(NUM_PAIRS))
    expected.backward()
    assert sum(loss for loss, _ in results) / 2 == pytest.approx(expected.item(), rel=1e-5)
    assert results[0][0] != results[1][0]
    for _, found in results:
        torch.testing.assert_close(found, gradients(model))


def megatron_step() -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """On one rank of two: log-probs and gradients by the op, and by Megatron's cross-entropy over sharded logits."""
    import megatron_script
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    from fastpref.trainer.ranks import platform

    platform.initialize_distributed()
    platform.initialize_model_parallel(tp=2)
    try:
        ids_SL, labels_SL = megatron_script.random_batch(VOCAB_SIZE)
        [model], [oracle] = (stock_model(0, tensor_model_parallel_size=2) for _ in range(2))
        logps_S = megatron_script.sequence_logps(model, ids_SL, labels_SL)
        megatron_script.dpo_loss(logps_S, torch.arange(4.0) - 40).backward()

        length = ids_SL.shape[1]
        future = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
        logits_SLV = oracle(ids_SL, torch.arange(length).expand_as(ids_SL), future)
        assert logits_SLV.shape[2] == VOCAB_SIZE // 2
        losses_LS = vocab_parallel_cross_entropy(
            logits_SLV.transpose(0, 1).contiguous(), labels_SL.clamp(min=0).t().contiguous()
        )
        oracle_logps_S = -torch.where(labels_SL != -100, losses_LS.t(), 0.0).sum(1)
        dpo(oracle_logps_S, torch.arange(4.0) - 40).backward()
        both = ([weight.grad for weight in chunk.parameters()] for chunk in (model, oracle))
        return logps_S.detach(), oracle_logps_S.detach(), *both
    finally:
        platform.destroy()


def test_megatron_script_equals_megatrons_cross_entropy(rank_pool_2: RankPool) -> None:
    for logps_S, expected_S, found, expected in rank_pool_2.run(megatron_step):
        torch.testing.assert_close(logps_S, expected_S)
        torch.testing.assert_close(found, expected)
        assert all(bool(gradient.any()) for gradient in found)


def train_by_script(name: str) -> list[float]:
    return importlib.import_module(name).train(steps=4)


@pytest.mark.parametrize("name", ["fsdp2_loop", "megatron_script"])
def test_scripts_learn_on_two_ranks(name: str, rank_pool_2: RankPool) -> None:
    for losses in rank_pool_2.run(train_by_script, name):
        assert losses[0] == pytest.approx(0.693147, abs=1e-6)
        assert losses[3] < losses[2] < losses[1] < losses[0]
