"""The fused op: log-probabilities of sequences from hidden states and the vocabulary projection."""

from fastpref.kernels.api import linear_logps
from fastpref.kernels.outputs import SequenceLogps
from fastpref.kernels.plan_options import plan_name
from fastpref.kernels.screening import ScreenedHead, screen_weight
from fastpref.kernels.weight_sum import sum_weight

__all__ = ["ScreenedHead", "SequenceLogps", "linear_logps", "plan_name", "screen_weight", "sum_weight"]
