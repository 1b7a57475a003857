"""Training and evaluation mode of models, put back as they were."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


@contextmanager
def evaluating(models: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Inside, the models answer without dropout; every module of theirs leaves in the mode that it came in."""
    before = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, was_training in before:
            module.training = was_training
