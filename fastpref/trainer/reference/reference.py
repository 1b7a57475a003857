"""The reference: a frozen model or its cached scores, and how its log-probs reach a step.

Dims: B pairs, S = 2B sequences, N pairs of a data set, 6 columns of a cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from fastpref.checkpoint.reference_cache import ReferenceCache
from fastpref.errors import ConfigError, DataError
from fastpref.losses import DPOConfig
from fastpref.run.config.arguments import TrainingArguments
from fastpref.trainer.model.chunks import unwrap
from fastpref.trainer.model.head import HeadOptions, install_heads
from fastpref.trainer.model.lora import lora_of
from fastpref.trainer.model.modes import evaluating
from fastpref.trainer.model.overlap import settle_overlap
from fastpref.trainer.model.packing import install_packing
from fastpref.trainer.model.request import ReferenceView
from fastpref.trainer.ranks.agreement import together
from fastpref.trainer.ranks.platform import current_device
from fastpref.trainer.ranks.timing import DeviceTimer
from fastpref.trainer.reference.frozen_copy import frozen_copy
from fastpref.trainer.step.batch import Microbatch
from fastpref.trainer.step.metrics import owns_results
from fastpref.trainer.step.noise import screening_drift, token_noise
from fastpref.trainer.step.optimizer import check_model, to_precision
from fastpref.trainer.step.schedule import MicrobatchResult, PreferenceSchedule, with_reference

MAX_DRIFT = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""Mean distance, in nat per token, that rounding may put between two passes of one model in other batches and layouts.

Far above what other batches make of a real model, measured in docs/reference-cache.md: room for other layouts and GPUs.
"""


class ReferenceModel:
    """Scores microbatches under frozen weights, with the same fused forward as the policy's.

    It sees the very rows that the policy sees, so that equal weights give equal bits, packed or not.

    Args:
        models: chunks of the reference, not wrapped in DDP: with parameters of their own, which are frozen and stay in
            eval mode, or `ReferenceView`s of the policy.
        config: the preference loss.
        args: the run's settings (precision, packing).
        head: how heads of their own score; None = exactly. A view has the policy's.
    """

    def __init__(
        self,
        models: Sequence[torch.nn.Module],
        config: DPOConfig,
        args: TrainingArguments,
        head: HeadOptions | None = None,
    ) -> None:
        self.models = list(models)
        if not isinstance(models[0], ReferenceView):
            settle_overlap([unwrap(model) for model in models])
            install_heads(models, HeadOptions() if head is None else head)
            if args.packing:
                install_packing(models, prefix_sharing=args.prefix_sharing)
            self.models = to_precision(models, args)
            for model in self.models:
                model.eval().requires_grad_(False)
        self.token_noise = 0.0
        self._schedule = PreferenceSchedule(config)
        self.timer = DeviceTimer()

    def attach(self, batches: Sequence[Microbatch], dataset: Any) -> list[Microbatch]:
        """Returns the microbatches with their reference sums, known on the last pipeline stage only.

        A model scores any pairs, so `dataset` is not looked at.
        """
        with self.timer, torch.no_grad(), evaluating(self.models):
            scores = self._schedule.score(self.models, batches)
        return with_reference(batches, scores)

    def score_columns(self, batches: Sequence[Microbatch]) -> list[Tensor | None]:
        """Returns what the head answers, [K, S] per microbatch; None on every stage but the last."""
        with torch.no_grad(), evaluating(self.models):
            return self._schedule.score_columns(self.models, batches)


class PrecomputedReference:
    """Looks microbatches up in a cache; holds no weights.

    The pairs were scored in other rows than the policy's, and exactly, so that equal weights give equal sums up to
    rounding only, and up to the error of a policy that screens.

    Memory: 24 bytes per pair of the data sets, on the host of every rank.

    Args:
        cache: the scores.
        config: the preference loss.
        args: the run's settings (precision, the policy's forward pass).
        datasets: the data sets whose pairs will be asked for, by what they are called in a message.

    Attributes:
        token_noise: standard deviation of that difference, in nat per response token.
        max_drift: the largest mean of its size over tokens, in nat.

    Raises:
        ConfigError: a data set has no hash to find its scores by.
        CheckpointError: the cache does not hold these data sets, or is damaged.
    """

    models = None

    def __init__(
        self, cache: ReferenceCache, config: DPOConfig, args: TrainingArguments, datasets: Mapping[str, Any]
    ) -> None:
        for name, dataset in datasets.items():
            if not hasattr(dataset, "sha256"):
                raise ConfigError(
                    f"{name}: a reference cache is found by the hash of the data, which {type(dataset).__name__} does "
                    "not have; wrap the pairs in fastpref.data.PreferenceDataset"
                )
        together(lambda: cache.require(datasets), "checking the reference cache")
        self.cache = cache
        self.token_noise = token_noise(args.params_dtype, args.screened_eps)
        self.max_drift = MAX_DRIFT[args.params_dtype] + screening_drift(args.screened_eps)
        self._rows = together(
            lambda: {dataset.sha256: cache.read(dataset) for dataset in datasets.values()},
            "reading the reference cache",
        )
        self._schedule = PreferenceSchedule(config)
        self.timer = DeviceTimer()

    def attach(self, batches: Sequence[Microbatch], dataset: Any) -> list[Microbatch]:
        """Returns the microbatches with their cached sums, on the last pipeline stage only.

        Args:
            batches: microbatches whose `pair_ids_B` are positions in `dataset`; -1 only at weight 0.
            dataset: where their pairs come from.

        Raises:
            ConfigError: the cache was not opened for this data set.
            DataError: a pair is not in the data set, or has other numbers of response tokens than when it was scored.
        """
        rows_N6 = self._rows.get(getattr(dataset, "sha256", ""))
        if rows_N6 is None:
            raise ConfigError(
                f"the reference is precomputed in {self.cache.path}, which knows nothing of this data set; evaluate "
                "the data set that the trainer was made with, or train with a reference model"
            )
        with self.timer:
            # Every rank looks up and checks, so that the stages of a pipeline fail together.
            sums = [self._response_sums(batch, rows_N6, dataset) for batch in batches]
        if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
            return list(batches)
        scores = [logps_S.to(current_device(), non_blocking=True) for logps_S in sums]
        return with_reference(batches, scores, self.token_noise)

    def _response_sums(self, batch: Microbatch, rows_N6: Tensor, dataset: Any) -> Tensor:
        ids_B = batch.pair_ids_B
        is_filler_B = (ids_B < 0) & (batch.weights_B == 0)
        outside_B = ((ids_B < 0) & ~is_filler_B) | (ids_B >= len(rows_N6))
        if outside_B.any():
            raise DataError(
                f"a batch has the pair id {int(ids_B[outside_B][0])}; with a precomputed reference `pair_ids` must be "
                f"positions in the data set, 0 to {len(rows_N6) - 1}"
            )
        rows_B6 = rows_N6[ids_B.clamp(min=0)]
        logps_2S, counts_S = rows_B6[:, :4].t().reshape(2, -1), rows_B6[:, 4:].t().flatten()
        differs_B = ((counts_S != batch.counts_S).view(2, -1).any(0)) & ~is_filler_B
        if differs_B.any():
            index = int(differs_B.nonzero()[0])
            now, then = (counts.view(2, -1)[:, index].int().tolist() for counts in (batch.counts_S, counts_S))
            source = getattr(dataset[int(ids_B[index])], "source", "") or f"pair {int(ids_B[index])}"
            raise DataError(
                f"{source}: chosen and rejected have {now[0]} and {now[1]} response tokens, but {then[0]} and "
                f"{then[1]} when the reference was precomputed; batches must hold the tokens and labels of the data set"
            )
        # As the head answers: minus the sum over the shared tokens is the second column.
        return self._schedule.response_sums(logps_2S * logps_2S.new_tensor([[1.0], [-1.0]]))


def drift_per_token(results: Sequence[MicrobatchResult]) -> float:
    """Mean distance of policy and reference, in nat per response token, over the pairs of a step and all ranks.

    Equals: `sum(|logps - ref_logps|) / sum(tokens)` over sequences.
    """
    totals = torch.zeros(2, dtype=torch.float64, device=current_device())
    for result in results if owns_results() else ():
        assert result.batch.ref_logps_S is not None
        is_real_S = (result.batch.weights_B != 0).repeat(2).to(totals.device)
        totals[0] += (result.logps_S - result.batch.ref_logps_S)[is_real_S].abs().double().sum()
        totals[1] += result.batch.counts_S.to(totals.device)[is_real_S].double().sum()
    torch.distributed.all_reduce(totals)
    distance, tokens = totals.tolist()
    return distance / tokens


def build_reference(
    policy: Sequence[torch.nn.Module],
    ref_model: Sequence[torch.nn.Module] | ReferenceCache | None,
    config: DPOConfig,
    args: TrainingArguments,
    datasets: Mapping[str, Any],
) -> ReferenceModel | PrecomputedReference | None:
    """The reference that `config` needs: the given one, the policy with adapters off, or a copy of it as it is now.

    Args:
        policy: bare chunks of the policy.
        ref_model: chunks of the reference, its precomputed scores, or None to take it from the policy.
        config: the preference loss.
        args: the run's settings.
        datasets: the run's data sets, by what they are called in a message.

    Raises:
        ConfigError: a reference is given to a reference-free loss, or its chunks do not match the policy's.
        CheckpointError: the precomputed scores are damaged, or not those of these data sets.
    """
    if not config.use_ref_model:
        if ref_model is not None:
            raise ConfigError(
                f"pref_loss {' + '.join(config.loss_names)} reads no reference, but a reference model was given; "
                "leave it out or choose another loss"
            )
        return None
    if isinstance(ref_model, ReferenceCache):
        return PrecomputedReference(ref_model, config, args, datasets)
    if ref_model is None and lora_of(policy) is not None:
        return ReferenceModel([ReferenceView(model) for model in to_precision(policy, args)], config, args)
    head = HeadOptions.of(args).of_reference
    if ref_model is None:
        return ReferenceModel([frozen_copy(unwrap(model)) for model in policy], config, args, head)
    if len(ref_model) != len(policy):
        raise ConfigError(
            f"ref_model has {len(ref_model)} chunks on this rank and the policy has {len(policy)}; build both alike"
        )
    check_model([unwrap(model) for model in ref_model], args)
    trained = {id(parameter) for model in policy for parameter in model.parameters()}
    if any(id(parameter) in trained for model in ref_model for parameter in model.parameters()):
        raise ConfigError(
            "ref_model shares parameters with the policy, which would freeze with it; leave ref_model out to compare "
            "with a copy of the policy as it is now, or load the reference once more"
        )
    return ReferenceModel(ref_model, config, args, head)
