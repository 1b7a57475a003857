"""Preference losses in plain torch on (B,) tensors: `preference_loss(DPOConfig(...), PairLogps(...))`."""

# every loss enters LOSSES when its module is imported
from . import family, transport  # noqa: F401
from .config import LOSSES, DPOConfig, Loss
from .inputs import LossContext, PairLogps, PreferenceOutput, SequenceStats, split_pairs
from .metrics import Metrics, preference_metrics
from .numerics import ld_logps, log_odds, update_running_mean, weighted_sum
from .options import Option
from .preference import expected_initial_loss, preference_loss

__all__ = [
    "LOSSES",
    "DPOConfig",
    "Loss",
    "LossContext",
    "Metrics",
    "Option",
    "PairLogps",
    "PreferenceOutput",
    "SequenceStats",
    "expected_initial_loss",
    "ld_logps",
    "log_odds",
    "preference_loss",
    "preference_metrics",
    "split_pairs",
    "update_running_mean",
    "weighted_sum",
]
