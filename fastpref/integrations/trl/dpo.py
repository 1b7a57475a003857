"""TRL's `DPOTrainer`, its log-probs from `linear_logps`.

TRL 1.16 asks its models for log-probs per token and computes everything else from them: losses, reference, metrics.
So nothing of that is written again here. Its constructor puts a fused output layer on the policy and the reference,
at the right moment: inside PEFT, before the reference is wrapped for autocast or sharding, and before reference
log-probs are precomputed. The one function by which it does so is replaced while the constructor runs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastpref.errors import ConfigError
from fastpref.integrations.causal_lm import add_logps_head, exact_forward
from fastpref.integrations.trl.support import find, refuse_options, refuse_parallelism

_USED = ("DPOTrainer._compute_loss", "DPOTrainer.compute_ref_log_probs", "add_fused_lm_head")
_trl: Any = find("trl.trainer.dpo_trainer", *_USED)
_TRLTrainer: Any = _trl.DPOTrainer
_lock = threading.RLock()


class DPOTrainer(_TRLTrainer):
    """`trl.DPOTrainer` that computes log-probs by `linear_logps`: same arguments, config, data, losses and metrics.

    Attributes:
        forward: forward plan of `linear_logps`, for all trainers of the class; a subclass may set "screened".
        backward: its backward plan; a subclass may set "exact".

    Raises:
        ConfigError: an option or a model that the fused head cannot serve (docs/trl.md); names the remedy.
    """

    forward = "exact"
    backward = "auto"

    # Whatever TRL's constructor takes, in the version that is installed.
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        refuse_options(_TRLTrainer, args, kwargs)
        models: list[PreTrainedModel] = []

        def add_head(model: PreTrainedModel, outputs: Sequence[str] = ("log_probs",)) -> None:
            add_logps_head(model, outputs, forward=self.forward, backward=self.backward)
            models.append(model)

        with _replaced_head(add_head):
            super().__init__(*args, **kwargs)
        if not models:
            raise ConfigError(
                "DPOTrainer of this TRL asked for no fused head, so its log-probs would be its own; install trl==1.16.*"
            )
        refuse_parallelism(self.accelerator)

    def compute_ref_log_probs(self, model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
        """Precompute a batch of the reference: exactly, as TRL keeps it for every later run on the data set."""
        with exact_forward(model):
            return super().compute_ref_log_probs(model, inputs)


@contextmanager
def _replaced_head(add_head: Callable[..., None]) -> Iterator[None]:
    """Let TRL's module call `add_head` where it would add its own fused output layer."""
    with _lock:
        theirs = _trl.add_fused_lm_head
        _trl.add_fused_lm_head = add_head
        try:
            yield
        finally:
            _trl.add_fused_lm_head = theirs
