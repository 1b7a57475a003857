"""`DPOTrainer` on models that a Megatron user built: entry points, loss normalisation, reference, refusals."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from checks.tiny import VOCAB_SIZE, stock_model, tiny_pairs
from fastpref.data import PreferenceCollator
from fastpref.errors import ConfigError, DataError
from fastpref.trainer import DPOConfig, DPOTrainer

COLLATE = PreferenceCollator(pad_token_id=0)


def full_logits_logps(models, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Oracle: response sums [2n] and counts through the stock output layer, in fp64 from the logits on."""
    (model,) = models
    length = batch["input_ids"].size(1)
    mask = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    logits = model(batch["input_ids"], batch["position_ids"], mask).double()
    labels = batch["labels"]
    logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(labels != -100, logps, 0.0).sum(1), (labels != -100).sum(1)


def test_training_step_matches_full_logits_in_loss_and_gradient(quiet_args) -> None:
    pairs = tiny_pairs(4)
    batches = [COLLATE(pairs[:2]), COLLATE(pairs[2:])]
    policy, oracle, reference = stock_model(0), stock_model(0), stock_model(1)
    trainer = DPOTrainer(policy, DPOConfig(), reference, quiet_args(max_grad_norm=0.0), train_dataset=pairs)
    length = max(batch["input_ids"].size(1) for batch in batches)
    loss, metrics, skipped, grad_norm, _ = trainer.training_step(trainer.models_wrapped, iter(batches), length)

    losses = []
    for batch in batches:
        (chosen, rejected), _ = (x.chunk(2) for x in full_logits_logps(oracle, batch))
        with torch.no_grad():
            ref_chosen, ref_rejected = full_logits_logps(stock_model(1), batch)[0].chunk(2)
        losses.append(-F.logsigmoid(0.1 * ((chosen - ref_chosen) - (rejected - ref_rejected))))
    expected = torch.cat(losses).mean()
    expected.backward()
    gradients = [parameter.grad for parameter in oracle[0].parameters()]

    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert grad_norm == pytest.approx(torch.cat([g.flatten() for g in gradients]).double().norm().item(), rel=1e-5)
    assert skipped == 0
    assert [m["loss"].item() for m in metrics] == pytest.approx([part.mean().item() for part in losses], rel=1e-5)
    assert set(trainer.metrics_keys) == set(metrics[0])
    for parameter, expected_grad in zip(trainer.model[0].parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.main_grad, expected_grad, rtol=1e-4, atol=1e-7)


def test_training_step_makes_no_tensor_of_vocabulary_size_per_token(quiet_args) -> None:
    """The fused head never holds logits [b, s, V], in forward, backward or the reference pass."""
    pairs = tiny_pairs(8, seed=3)
    batch = COLLATE(pairs)
    num_rows = int((batch["labels"] != -100).sum())
    shapes: list[tuple[int, ...]] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor) and tensor.dim() >= 2 and tensor.size(-1) == VOCAB_SIZE:
                    shapes.append(tuple(tensor.shape))
            return out

    args = quiet_args(per_device_train_batch_size=8, gradient_accumulation_steps=1)
    # hidden 48, ffn 96: no other tensor of the model ends in the vocabulary size
    sizes = {"hidden_size": 48, "ffn_hidden_size": 96}
    trainer = DPOTrainer(stock_model(0, **sizes), DPOConfig(), None, args, train_dataset=pairs)
    with Watch():
        trainer.training_step(trainer.models_wrapped, iter([batch]), batch["input_ids"].size(1))
    tokens = batch["input_ids"].numel()
    assert num_rows > 32 and all(math.prod(shape[:-1]) < tokens for shape in shapes), shapes


def test_compute_reference_log_probs_matches_full_logits(quiet_args) -> None:
    batch = COLLATE(tiny_pairs(3))
    trainer = DPOTrainer(stock_model(0), DPOConfig(), stock_model(1), quiet_args(), train_dataset=tiny_pairs(3))
    (scores,) = trainer.compute_reference_log_probs(trainer.ref_models, [batch], batch["input_ids"].size(1), 3)
    expected = full_logits_logps(stock_model(1), batch)[0].float()
    assert torch.cat([scores["chosen_logps"], scores["rejected_logps"]]) == pytest.approx(expected.detach(), rel=1e-5)
    assert not scores["chosen_logps"].requires_grad


def test_train_flags_falling_chosen_logps(quiet_args) -> None:
    """Many unrelated answers and large steps: in some windows the chosen log-ratio is negative and falls."""
    pairs = tiny_pairs(40, seed=1)
    args = quiet_args(learning_rate=0.02, lr_scheduler_type="constant", max_steps=10)
    trainer = DPOTrainer(stock_model(0), DPOConfig(beta=1.0), None, args, train_dataset=pairs)
    trainer.train()
    ratios = [record["kl/chosen"] for record in trainer.log_history]
    flags = [record["alarm/likelihood_displacement"] for record in trainer.log_history]
    expected = [0.0] + [float(b < 0 and b < a) for a, b in itertools.pairwise(ratios)]
    assert flags == expected and 0 < sum(flags) < len(flags)


def test_short_last_batch_weighs_every_pair_the_same(quiet_args) -> None:
    """5 pairs in batches of 4: the last step averages over its one pair and its fillers count in nothing."""
    pairs = tiny_pairs(5)
    config = DPOConfig(pref_loss="orpo")
    trainer = DPOTrainer(stock_model(0), config, None, quiet_args(shuffle=False), train_dataset=pairs)
    batches = trainer.feed.train_batches(1)
    assert [batch.weights_B.tolist() for batch in batches] == [[1.0, 0.0], [0.0, 0.0]]
    short = trainer.engine.run_step(trainer.models_wrapped, batches)
    alone = DPOTrainer(
        stock_model(0),
        config,
        None,
        quiet_args(shuffle=False, per_device_train_batch_size=1, gradient_accumulation_steps=1),
        train_dataset=pairs[4:],
    )
    single = alone.engine.run_step(alone.models_wrapped, alone.feed.train_batches(0))
    assert short.loss == pytest.approx(single.loss, rel=1e-6)
    assert short.grad_norm == pytest.approx(single.grad_norm, rel=1e-5)


def test_evaluate_counts_every_pair_once(quiet_args) -> None:
    pairs = tiny_pairs(7, seed=5)
    trainer = DPOTrainer(stock_model(0), DPOConfig(pref_loss="orpo"), None, quiet_args(), eval_dataset=pairs)
    whole = trainer.evaluate()
    single = [trainer.evaluate([pair]) for pair in pairs]
    for key in ("eval_loss", "eval_logps/chosen", "eval_rewards/margins", "eval_sft_loss"):
        assert whole[key] == pytest.approx(sum(record[key] for record in single) / 7, rel=1e-5), key


@pytest.mark.parametrize(
    "options",
    [
        {"ld_alpha": 0.5},
        {"ld_alpha": 0.5, "pref_loss": ("sigmoid", "sft")},
        {"pref_loss": "orpo", "orpo_nll": "prompt_and_response"},
    ],
)
def test_train_runs_losses_with_a_second_mask(quiet_args, options: dict) -> None:
    pairs = tiny_pairs(8)
    trainer = DPOTrainer(stock_model(0), DPOConfig(**options), None, quiet_args(max_steps=6), train_dataset=pairs)
    trainer.train()
    losses = [record["loss"] for record in trainer.log_history]
    assert losses[-1] < losses[0]


def test_dpo_loss_and_odds_ratio_loss_return_losses_and_rewards(quiet_args) -> None:
    trainer = DPOTrainer(stock_model(0), DPOConfig(beta=0.2), None, quiet_args(), train_dataset=tiny_pairs(4))
    chosen, rejected = torch.tensor([-5.0, -8.0]), torch.tensor([-6.0, -7.0])
    losses, chosen_rewards, _ = trainer.dpo_loss(chosen, rejected, chosen - 1, rejected + 1)
    assert losses == pytest.approx(F.softplus(torch.tensor([-0.4, -0.4])), rel=1e-6)
    assert chosen_rewards == pytest.approx(torch.tensor([0.2, 0.2]))
    losses, chosen_rewards, rejected_rewards = trainer.odds_ratio_loss(chosen / 4, rejected / 4)
    a, b = chosen.double() / 4, rejected.double() / 4
    odds = (a - b) - (torch.log(-torch.expm1(a)) - torch.log(-torch.expm1(b)))
    assert losses.double() == pytest.approx(-a - 0.2 * F.logsigmoid(odds), rel=1e-6)
    assert chosen_rewards == pytest.approx(0.2 * chosen / 4)
    with_counts = trainer.odds_ratio_loss(chosen, rejected, torch.tensor([4.0, 4.0]), torch.tensor([4.0, 4.0]))
    assert with_counts[0] == pytest.approx(losses) and with_counts[2] == pytest.approx(rejected_rewards)


def test_trainer_refuses_what_cannot_work(quiet_args) -> None:
    pairs = tiny_pairs(4)
    with pytest.raises(ConfigError, match="list of GPTModel chunks"):
        DPOTrainer(None, DPOConfig(), None, quiet_args())
    with pytest.raises(ConfigError, match="orpo reads no reference"):
        DPOTrainer(stock_model(0), DPOConfig(pref_loss="orpo"), stock_model(1), quiet_args())
    with pytest.raises(ConfigError, match="calculate_per_token_loss must be False"):
        DPOTrainer(stock_model(0, calculate_per_token_loss=True), DPOConfig(), None, quiet_args())
    with pytest.raises(ConfigError, match="params_dtype"):
        DPOTrainer(stock_model(0), DPOConfig(), None, quiet_args(bf16=True))
    with pytest.raises(ConfigError, match="gradient_accumulation_steps must be 1, got 2"):
        DPOTrainer(stock_model(0), DPOConfig(pref_loss="aot"), None, quiet_args())
    with pytest.raises(ConfigError, match="tensor_model_parallel_size is 2"):
        DPOTrainer(stock_model(0), DPOConfig(), None, quiet_args(tensor_model_parallel_size=2))
    trainer = DPOTrainer(stock_model(0), DPOConfig(), None, quiet_args(), train_dataset=pairs)
    with pytest.raises(ConfigError, match="eval_dataset"):
        trainer.evaluate()
    with pytest.raises(DataError, match="ended after 1 microbatches"):
        trainer.training_step(trainer.models_wrapped, iter([COLLATE(pairs[:2])]), 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": torch.zeros(3, 8, dtype=torch.long)}, r"must be \[2n, L\]"),
        ({"labels": torch.zeros(4, 7, dtype=torch.long)}, "labels must have the shape"),
        ({"input_ids": torch.full((4, 16), VOCAB_SIZE)}, r"input_ids\[0, 0\] is 64; .* vocabulary of 64"),
        ({"labels": torch.full((4, 16), -5)}, r"labels\[0, 0\] is -5"),
        ({"attention_mask": torch.tensor([[0] * 8 + [1] * 8] * 4)}, "pad on the right"),
        ({"pair_weights": torch.ones(3)}, r"pair_weights must be \[2\]"),
        ({"pair_weights": torch.zeros(2)}, "all pair weights of an optimizer step are 0"),
    ],
)
def test_training_step_refuses_bad_batches(quiet_args, change: dict, message: str) -> None:
    pairs = tiny_pairs(2)
    args = quiet_args(gradient_accumulation_steps=1)
    trainer = DPOTrainer(stock_model(0), DPOConfig(), None, args, train_dataset=pairs)
    before = [parameter.clone() for parameter in trainer.model[0].parameters()]
    with pytest.raises(DataError, match=message):
        trainer.training_step(trainer.models_wrapped, iter([COLLATE(pairs) | change]), 16)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model[0].parameters(), strict=True))
