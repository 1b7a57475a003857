"""The frozen reference model: where it comes from and how its log-probs reach a step."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from fastpref.errors import ConfigError
from fastpref.losses import DPOConfig
from fastpref.trainer.arguments import TrainingArguments
from fastpref.trainer.batch import Microbatch
from fastpref.trainer.head import HeadOptions, install_heads, unwrap
from fastpref.trainer.optimizer import check_model, to_precision
from fastpref.trainer.packing import install_packing
from fastpref.trainer.step import PreferenceSchedule, with_reference
from fastpref.trainer.timing import DeviceTimer


class ReferenceModel:
    """Scores microbatches under frozen weights, with the same fused forward as the policy's.

    Args:
        models: chunks of the reference, not wrapped in DDP; their parameters are frozen and they stay in eval mode.
        config: the preference loss.
        args: the run's settings (precision, packing).
    """

    def __init__(self, models: Sequence[torch.nn.Module], config: DPOConfig, args: TrainingArguments) -> None:
        install_heads(models, HeadOptions())
        if args.packing:
            install_packing(models, prefix_sharing=args.prefix_sharing)
        self.models = to_precision(models, args)
        for model in self.models:
            model.eval().requires_grad_(False)
        self._schedule = PreferenceSchedule(config)
        self.timer = DeviceTimer()

    def attach(self, batches: Sequence[Microbatch]) -> list[Microbatch]:
        """Returns the microbatches with their reference sums, known on the last pipeline stage only."""
        self.timer.start()
        with torch.no_grad():
            scores = self._schedule.score(self.models, batches)
        self.timer.stop()
        return with_reference(batches, scores)


def build_reference(
    policy: Sequence[torch.nn.Module],
    ref_model: Sequence[torch.nn.Module] | None,
    config: DPOConfig,
    args: TrainingArguments,
) -> ReferenceModel | None:
    """The reference that `config` needs: the given one, or a copy of the policy as it is now.

    Args:
        policy: bare chunks of the policy.
        ref_model: chunks of the reference, or None for the copy.
        config: the preference loss.
        args: the run's settings.

    Raises:
        ConfigError: a reference is given to a reference-free loss, or its chunks do not match the policy's.
    """
    if not config.use_ref_model:
        if ref_model is not None:
            raise ConfigError(
                f"pref_loss {' + '.join(config.loss_names)} reads no reference, but a reference model was given; "
                "leave it out or choose another loss"
            )
        return None
    if ref_model is None:
        return ReferenceModel([_frozen_copy(unwrap(model)) for model in policy], config, args)
    if len(ref_model) != len(policy):
        raise ConfigError(
            f"ref_model has {len(ref_model)} chunks on this rank and the policy has {len(policy)}; build both alike"
        )
    check_model([unwrap(model) for model in ref_model], args)
    return ReferenceModel(ref_model, config, args)


def _frozen_copy(model: GPTModel) -> GPTModel:
    """A copy of a model chunk that shares what cannot be copied: its configuration and process groups."""
    # Modules hold process groups, and so do objects of theirs that are no modules (token dispatchers).
    shared = [model.config, *(parallel_state._global_process_group_list or [])]
    memo: dict[int, object] = {id(value): value for value in shared if value is not None}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, torch.distributed.ProcessGroup):
                memo[id(value)] = value
            if type(value).__name__ == "ProcessGroupCollection":
                memo[id(value)] = value
    duplicate = copy.deepcopy(model, memo)
    # A schedule reads hooks of gradient reduction from the configuration; the reference must not run the policy's.
    config = copy.copy(model.config)
    config.no_sync_func = config.grad_sync_func = config.grad_scale_func = config.finalize_model_grads_func = None
    duplicate.config = config
    return duplicate
