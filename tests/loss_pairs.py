"""Pairs of log-probs for the tests of the losses: written out, or a random batch with weights.

`B` pairs.
"""

import torch
from torch import Tensor

from fastpref.losses import DPOConfig, LossContext, PairLogps, preference_loss, weighted_sum

NEEDED = {"exo_pair": {"label_smoothing": 1e-3}}
B = 8
NAMES = ("chosen", "rejected", "ref_chosen", "ref_rejected", "chosen_counts", "rejected_counts")
WEIGHTS = torch.tensor([1.0, 0.5, 1.0, 2.0, 1.0, 1.0, 0.25, 1.0])
SORTED_CASES = {
    "aot": {"pref_loss": "aot", "label_smoothing": 0.1},
    "aot_unpaired": {"pref_loss": "aot_unpaired", "beta": 0.4},
    "aot + sigmoid": {"pref_loss": ("aot", "sigmoid"), "loss_weights": (0.5, 1.0)},
}


def config_of(name: str) -> DPOConfig:
    return DPOConfig(pref_loss=name, **NEEDED.get(name, {}))


def pairs(chosen: list[float], rejected: list[float], count: int | list[int] = 1, **fields: Tensor) -> PairLogps:
    """Pairs in float32; a reference of zeros unless `fields` says otherwise, None to leave it out."""
    shape = torch.zeros(len(chosen))
    fields = {"ref_chosen": shape, "ref_rejected": shape} | fields
    counts = torch.tensor(count).expand(len(chosen))
    return PairLogps(
        chosen=torch.tensor(chosen, requires_grad=True),
        rejected=torch.tensor(rejected, requires_grad=True),
        chosen_counts=counts,
        rejected_counts=counts,
        **fields,
    )


def reference_fields(config: DPOConfig) -> dict:
    return {} if config.use_ref_model else {"ref_chosen": None, "ref_rejected": None}


def batch(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(11)
    columns = {name: -40 * torch.rand(B, generator=generator, dtype=torch.float64).to(dtype) - 1 for name in NAMES[:4]}
    counts = {name: torch.randint(0, 30, (B,), generator=generator) for name in NAMES[4:]}
    return columns | counts


def run(
    config: DPOConfig, columns: dict[str, Tensor], rows: Tensor, context: LossContext | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of `rows` and the gradient of their weighted sum to the chosen and rejected sums."""
    chosen, rejected = (columns[name][rows].clone().requires_grad_() for name in NAMES[:2])
    refs = {name: columns[name][rows] for name in NAMES[2:4]} if config.use_ref_model else {}
    counts = {name: columns[name][rows] for name in NAMES[4:]}
    context = context or LossContext(pair_weights=WEIGHTS[rows])
    losses = preference_loss(config, PairLogps(chosen=chosen, rejected=rejected, **refs, **counts), context).losses
    weighted_sum(losses, WEIGHTS[rows]).backward()
    grads = [torch.zeros_like(side) if side.grad is None else side.grad for side in (chosen, rejected)]
    return losses.detach(), grads[0], grads[1]
