"""One pass of the reference over whole data sets, into a cache that training reads instead of the model.

Design decisions:
- The pass is its own: padded rows, pairs of a shard sorted by length, the second label mask always on. So a cache does
  not depend on the batches, the loss or the layout of the run that reads it.
- Rank 0 alone touches the disk. What it finds or fails at, every rank learns at once.

Dims: n pairs of one shard, B pairs of one microbatch, S = 2B sequences, K score columns, 6 columns of a cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import megatron.core
import torch
from megatron.core import parallel_state
from torch import Tensor

import fastpref
from fastpref.checkpoint.reference_cache import COLUMNS, SHARD_PAIRS, CacheWriter, ReferenceCache, TablePlan
from fastpref.data import PreferenceCollator, PreferenceDataset
from fastpref.errors import ConfigError, NonFiniteError
from fastpref.losses import DPOConfig
from fastpref.run.config.arguments import TrainingArguments
from fastpref.run.plan.announce import Meter, announce
from fastpref.run.plan.pair_schedule import PairSchedule
from fastpref.trainer.model.chunks import vocab_size_of
from fastpref.trainer.ranks.agreement import from_rank_0, together
from fastpref.trainer.ranks.platform import current_device
from fastpref.trainer.reference.reference import ReferenceModel
from fastpref.trainer.step.batch import Microbatch
from fastpref.trainer.step.feed import collated
from fastpref.trainer.step.metrics import owns_results
from fastpref.trainer.step.schedule import aligned

Result = TypeVar("Result")


def score_reference(
    models: Sequence[torch.nn.Module],
    datasets: Sequence[PreferenceDataset],
    path: str | Path,
    args: TrainingArguments,
    *,
    identity: Mapping[str, Any],
    pad_token_id: int = 0,
    shard_pairs: int = SHARD_PAIRS,
) -> ReferenceCache:
    """Write the log-probs of every pair under `models` to the cache `path`; every rank calls it.

    A pass that was cut goes on with the shards that are missing, in any layout of ranks.

    Args:
        models: this rank's chunks of the reference; they are frozen, and not needed afterwards.
        datasets: the data sets to score.
        path: the new directory.
        args: precision, layout and `eval_batch_pairs`, the pairs of a microbatch.
        identity: what the numbers depend on beside the tokens, as JSON values: hashes of the weights, precision.
        pad_token_id: any id of the vocabulary.
        shard_pairs: pairs between two points from which a cut pass goes on.

    Returns:
        The cache.

    Raises:
        ConfigError: no data set, or chunks that do not fit `args`.
        CheckpointError: `path` exists, or another process writes it.
        NonFiniteError: a log-prob is NaN or infinite; names the pair.
    """
    if not datasets or shard_pairs < 1:
        raise ConfigError(f"scoring needs a data set and shard_pairs >= 1, got {len(datasets)} and {shard_pairs}")
    reference = ReferenceModel(models, DPOConfig(), args)
    # Two data sets of the same tokens share a table.
    unique = list({dataset.sha256: dataset for dataset in datasets}.values())
    plans = [
        TablePlan(data_sha256=dataset.sha256, num_pairs=len(dataset), shard_pairs=shard_pairs) for dataset in unique
    ]
    collate = PreferenceCollator(pad_token_id, nll_mask="shared")
    writer = CacheWriter(path, identity, plans)
    with ExitStack() as stack:
        missing = from_rank_0(lambda: stack.enter_context(writer.open()), "starting the reference cache")
        left, total = sum(len(plans[table].pairs_of(shard)) for table, shard in missing), sum(map(len, unique))
        before = f"; {total - left:,} were scored before" if left < total else ""
        announce(args, f"Scoring {left:,} pairs with the reference{before}")
        meter = Meter(args, "Scored", left)
        for table, shard in missing:
            rows_n6 = _score_shard(reference, unique[table], plans[table].pairs_of(shard), collate, args, meter)
            from_rank_0(partial(writer.write, table, shard, rows_n6), "writing the reference cache")
        from_rank_0(partial(writer.publish, _versions()), "writing the reference cache")
    return together(lambda: ReferenceCache(path), "opening the reference cache")


def _score_shard(
    reference: ReferenceModel,
    dataset: PreferenceDataset,
    pairs: range,
    collate: PreferenceCollator,
    args: TrainingArguments,
    meter: Meter,
) -> Tensor:
    """Rows [n, 6] of `pairs`, the same on every rank."""
    # Neighbours in length make rows with little padding.
    rows_n6 = torch.zeros(len(pairs), len(COLUMNS), dtype=torch.float32, device=current_device())
    order = sorted(pairs, key=lambda index: dataset[index].num_tokens)
    dp_rank, vocab_size = parallel_state.get_data_parallel_rank(), vocab_size_of(reference.models[0])
    schedule = PairSchedule.one_pass(args, len(order), parallel_state.get_data_parallel_world_size())
    for step in range(schedule.total_steps):
        by_length = schedule.microbatches(step, dp_rank)
        microbatches = [slots._replace(places=[order[place] for place in slots.places]) for slots in by_length]
        batches = aligned([collated(collate, dataset, slots, vocab_size) for slots in microbatches])
        for batch, scores_KS in zip(batches, reference.score_columns(batches), strict=True):
            if scores_KS is not None and owns_results():
                is_real_B = (batch.weights_B != 0).to(scores_KS.device)
                ids_B = batch.pair_ids_B.to(scores_KS.device)[is_real_B] - pairs.start
                rows_n6[ids_B] = _columns(batch, scores_KS)[is_real_B]
        meter.advance(len(schedule.batch(step)))
    # Every row is 0 on all ranks but one, so the sum is exact.
    torch.distributed.all_reduce(rows_n6)
    _check_finite(rows_n6, dataset, pairs)
    return rows_n6.cpu()


def _columns(batch: Microbatch, scores_KS: Tensor) -> Tensor:
    """Rows [B, 6] of a microbatch, in the order of `COLUMNS`."""
    logps_S, shared_nll_S = scores_KS
    columns_3S = torch.stack([logps_S, -shared_nll_S, batch.counts_S.to(logps_S.device)])
    return columns_3S.view(len(COLUMNS), batch.num_pairs).t()


def _check_finite(rows_n6: Tensor, dataset: PreferenceDataset, pairs: range) -> None:
    bad_n = ~torch.isfinite(rows_n6).all(1).cpu()
    if bad_n.any():
        sources = [dataset[pairs[index]].source or f"pair {pairs[index]}" for index in bad_n.nonzero().flatten()[:8]]
        raise NonFiniteError(
            f"the reference gives NaN or infinite log-probs for {int(bad_n.sum())} pairs: {', '.join(sources)}; "
            "nothing was written for them. Check the weights of the reference, or score in bf16 instead of fp16"
        )


def _versions() -> dict[str, str]:
    return {
        "fastpref": fastpref.__version__,
        "megatron-core": megatron.core.__version__,
        "torch": torch.__version__,
    }
