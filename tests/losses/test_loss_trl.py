"""The losses and metrics against TRL's own trainer methods, driven with stand-in models; skipped without TRL."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastpref.losses import (
    DPOConfig,
    PairLogps,
    SequenceStats,
    ld_logps,
    preference_loss,
    preference_metrics,
    weighted_sum,
)

pytest.importorskip("trl", reason="the oracle of these tests is TRL (extra trl)")

B, L, V = 5, 11, 13
LENGTHS = torch.tensor([3, 10, 1, 7, 5, 6, 2, 9, 7, 1])

# TRL's loss_type -> options that both sides take; label_smoothing of `sigmoid` is not among them, TRL ignores it
DPO_CASES: dict[str, dict] = {
    "sigmoid": {},
    "sigmoid_norm": {"beta": 1.5},
    "hinge": {"beta": 0.7},
    "ipo": {},
    "robust": {"label_smoothing": 0.2},
    "exo_pair": {"label_smoothing": 1e-3},
    "nca_pair": {},
    "bco_pair": {},
    "sppo_hard": {"beta": 0.5},
    "aot": {"label_smoothing": 0.15},
    "aot_unpaired": {"label_smoothing": 0.15},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {"discopop_tau": 0.3},
    "sft": {},
    "sigmoid+bco_pair+sft": {"loss_weights": (0.8, 0.2, 1.5)},
    "sigmoid+hinge": {},
}
TRL_DIVERGENCES = {"forward_kl": "forward_kl", "js": "js_divergence", "alpha": "alpha_divergence"}


class TokenBatch:
    """Random per-token quantities of 2B sequences, chosen first, as TRL's fused head returns them: [2B, L]."""

    def __init__(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(3)

        def random() -> Tensor:
            return torch.rand(2 * B, L, generator=generator, dtype=torch.float64).to(dtype)

        # responses start after a prompt of random length and end before padding
        starts = (torch.rand(2 * B, generator=generator) * (L - LENGTHS + 1)).long()
        position = torch.arange(L)
        self.mask = (position >= starts[:, None]) & (position < (starts + LENGTHS)[:, None])
        self.logps = (-3 * random() * self.mask).requires_grad_()
        self.ref_logps = -3 * random() * self.mask
        self.entropy, self.mean_logits, self.is_top1 = random(), random() - 0.5, random() > 0.5

    def sums(self, values: Tensor) -> Tensor:
        return (values * self.mask).sum(1)


def run_trl(batch: TokenBatch, loss_types: list[str], options: dict) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Loss, gradient to the token log-probs and metrics of `DPOTrainer._compute_loss`."""
    from trl import DPOTrainer

    def model(**_: object) -> SimpleNamespace:
        return SimpleNamespace(
            log_probs=batch.logps, entropy=batch.entropy, mean_logits=batch.mean_logits, is_top1=batch.is_top1
        )

    # A module: where peft is installed TRL looks through wrappers for an adapter.
    policy = torch.nn.Module()
    policy.is_gradient_checkpointing = False
    accelerator = SimpleNamespace(device="cpu", gather=lambda value: value, gather_for_metrics=lambda value: value)
    trainer = SimpleNamespace(
        model=policy,
        ref_model=lambda **_: SimpleNamespace(log_probs=batch.ref_logps),
        accelerator=accelerator,
        args=SimpleNamespace(discopop_tau=options.get("discopop_tau"), gradient_checkpointing_kwargs=None),
        precompute_ref_logps=False,
        aux_loss_enabled=False,
        use_weighting=False,
        loss_types=loss_types,
        loss_weights=list(options.get("loss_weights", [1.0] * len(loss_types))),
        beta=options.get("beta", 0.1),
        label_smoothing=options.get("label_smoothing", 0.0),
        ld_alpha=options.get("ld_alpha"),
        f_divergence_type=TRL_DIVERGENCES.get(options.get("f_divergence", ""), "reverse_kl"),
        f_alpha_divergence_coef=options.get("f_alpha", 0.5),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    completion_mask = torch.cat([torch.zeros(2 * B, 1, dtype=torch.bool), batch.mask], dim=1).long()
    ids = torch.zeros_like(completion_mask)
    inputs = {"input_ids": ids, "attention_mask": ids + 1, "completion_mask": completion_mask}
    loss = DPOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)
    (grad,) = torch.autograd.grad(loss, batch.logps)
    return loss.detach(), grad * batch.mask, {name: values[0] for name, values in trainer._metrics["train"].items()}


def run_ours(batch: TokenBatch, config: DPOConfig) -> tuple[Tensor, Tensor, dict[str, float]]:
    sums, ref_sums = batch.sums(batch.logps), batch.sums(batch.ref_logps)
    chosen_nll = -sums[:B]
    if config.ld_alpha is not None:
        shared = torch.minimum(LENGTHS[:B], LENGTHS[B:]).repeat(2)
        early = batch.mask & (batch.mask.cumsum(1) <= shared[:, None])
        sums, ref_sums = (
            ld_logps(total, (values * early).sum(1), config.ld_alpha)
            for total, values in ((sums, batch.logps), (ref_sums, batch.ref_logps))
        )
    logps = PairLogps.from_sequences(
        sums, LENGTHS, ref_sums if config.use_ref_model else None, nll=chosen_nll, nll_counts=LENGTHS[:B]
    )
    output, weights = preference_loss(config, logps), torch.ones(B)
    loss = weighted_sum(output.losses, weights) / B
    (grad,) = torch.autograd.grad(loss, batch.logps)
    stats = SequenceStats(
        entropy=batch.sums(batch.entropy), hits=batch.sums(batch.is_top1), mean_logit=batch.sums(batch.mean_logits)
    )
    metrics = preference_metrics(config, logps, output, weights, stats)
    return loss.detach(), grad, {name: (total / weight).item() for name, (total, weight) in metrics.items()}


def compare(names: str, options: dict, dtype: torch.dtype) -> None:
    batch, loss_types = TokenBatch(dtype), names.split("+")
    loss, grad, metrics = run_ours(batch, DPOConfig(pref_loss=loss_types, **options))
    trl_loss, trl_grad, trl_metrics = run_trl(batch, loss_types, options)
    torch.testing.assert_close(loss, trl_loss)
    torch.testing.assert_close(grad, trl_grad)
    del trl_metrics["num_tokens"]
    if names == "sft":  # TRL reports rewards against a reference that the loss does not read
        trl_metrics = {name: value for name, value in trl_metrics.items() if not name.startswith("rewards/")}
    assert trl_metrics.keys() <= metrics.keys()
    for name, value in trl_metrics.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("names", DPO_CASES)
def test_preference_loss_equals_trl(names: str) -> None:
    compare(names, DPO_CASES[names], torch.float64)


@pytest.mark.parametrize("names", [name for name in DPO_CASES if name != "sft"])
def test_preference_loss_with_ld_alpha_equals_trl(names: str) -> None:
    compare(names, DPO_CASES[names] | {"ld_alpha": 0.3}, torch.float64)


@pytest.mark.parametrize("options", [{"f_divergence": "forward_kl"}, {"f_divergence": "js"}], ids=str)
@pytest.mark.parametrize("names", ["sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "discopop"])
def test_preference_loss_with_f_divergence_equals_trl(names: str, options: dict) -> None:
    compare(names, DPO_CASES[names] | options, torch.float64)


# TRL's alpha divergence has no float64 form
@pytest.mark.parametrize("f_alpha", [0.0, 0.5, 1.0, 1.7])
@pytest.mark.parametrize("names", ["sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "discopop"])
def test_preference_loss_with_alpha_divergence_equals_trl(names: str, f_alpha: float) -> None:
    compare(names, DPO_CASES[names] | {"f_divergence": "alpha", "f_alpha": f_alpha}, torch.float32)


def run_reference_free(trainer_class: type, fields: dict) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, float]]:
    """Logits, ids, labels of a random batch, and loss with logits gradient and metrics of TRL's CPO/ORPO trainers."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(2 * B, L + 1, V, generator=generator, requires_grad=True)
    ids = torch.randint(V, (2 * B, L + 1), generator=generator)
    mask = TokenBatch(torch.float32).mask
    labels = torch.cat([torch.full((2 * B, 1), -100), torch.where(mask, ids[:, 1:], -100)], dim=1)
    accelerator = SimpleNamespace(device="cpu", gather_for_metrics=lambda value: value)
    trainer = SimpleNamespace(
        accelerator=accelerator, is_encoder_decoder=False, aux_loss_enabled=False, padding_value=0, pad_token_id=0
    )
    for name, value in fields.items():
        setattr(trainer, name, value)
    for name in ("cpo_loss", "odds_ratio_loss", "concatenated_forward"):
        if hasattr(trainer_class, name):
            setattr(trainer, name, getattr(trainer_class, name).__get__(trainer))
    for name in ("concatenated_inputs", "get_batch_logps"):
        setattr(trainer, name, getattr(trainer_class, name))
    trl_batch = {}
    for side, rows in (("chosen", slice(0, B)), ("rejected", slice(B, 2 * B))):
        trl_batch |= {f"{side}_input_ids": ids[rows], f"{side}_labels": labels[rows]}
        trl_batch[f"{side}_attention_mask"] = torch.ones_like(ids[rows])
    loss, metrics = trainer_class.get_batch_loss_metrics(
        trainer, lambda *_, **__: SimpleNamespace(logits=logits), trl_batch
    )
    loss.backward()
    return logits, ids, mask, loss.detach(), metrics


def compare_reference_free(trainer_class: type, fields: dict, config: DPOConfig) -> None:
    logits, ids, mask, trl_loss, trl_metrics = run_reference_free(trainer_class, fields)
    trl_grad, logits.grad = logits.grad, None
    token_logps = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    whole_row = config.needs_nll_mask
    logps = PairLogps.from_sequences(
        (token_logps * mask).sum(1),
        LENGTHS,
        nll=-token_logps[:B].sum(1) if whole_row else None,
        nll_counts=torch.full((B,), L) if whole_row else None,
    )
    output, weights = preference_loss(config, logps), torch.ones(B)
    loss = weighted_sum(output.losses, weights) / B
    loss.backward()
    torch.testing.assert_close(loss.detach(), trl_loss)
    torch.testing.assert_close(logits.grad, trl_grad)
    metrics = preference_metrics(config, logps, output, weights)
    # TRL's logits are means over every position, its logps of these losses means per token where the loss has means
    for name in set(trl_metrics) - {"logits/chosen", "logits/rejected", "logps/chosen", "logps/rejected"}:
        if name == "nll_loss" and config.cpo_alpha is None and not whole_row:
            continue  # TRL skips the NLL where its weight is 0
        total, weight = metrics[name]
        assert (total / weight).item() == pytest.approx(float(trl_metrics[name]), rel=1e-5, abs=1e-6), name


def test_orpo_equals_trl() -> None:
    trainer_class = pytest.importorskip("trl.experimental.orpo", reason="TRL without its ORPO trainer").ORPOTrainer
    config = DPOConfig(pref_loss="orpo", orpo_nll="prompt_and_response", beta=0.25)
    compare_reference_free(trainer_class, {"beta": 0.25}, config)


@pytest.mark.parametrize(
    ("loss_type", "options"),
    [
        ("sigmoid", {"beta": 0.2}),
        ("sigmoid", {"beta": 0.2, "cpo_alpha": 0.6, "label_smoothing": 0.1}),
        ("simpo", {"beta": 2.0, "simpo_gamma": 0.8}),
        ("simpo", {"beta": 2.0, "simpo_gamma": 0.8, "simpo_alpha": 0.4, "label_smoothing": 0.1}),
    ],
    ids=str,
)
def test_cpo_and_simpo_equal_trl(loss_type: str, options: dict) -> None:
    trainer_class = pytest.importorskip("trl.experimental.cpo", reason="TRL without its CPO trainer").CPOTrainer
    fields = {
        "loss_type": loss_type,
        "alpha": 0.0,
        "beta": options["beta"],
        "simpo_gamma": options.get("simpo_gamma", 0.0),
        "label_smoothing": options.get("label_smoothing", 0.0),
        "cpo_alpha": options.get("cpo_alpha", 1.0) if loss_type == "sigmoid" else options.get("simpo_alpha", 0.0),
    }
    config = DPOConfig(pref_loss="cpo" if loss_type == "sigmoid" else "simpo", **options)
    compare_reference_free(trainer_class, fields, config)
