"""How the rows of a run are laid out: the collator that its settings ask for, and what packed rows hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fastpref.data import PackedCollator, PreferenceCollator, TokenizedPair, plan_rows
from fastpref.data.collate import NllMask
from fastpref.errors import ConfigError, DataError
from fastpref.losses import DPOConfig
from fastpref.run.config.arguments import TrainingArguments
from fastpref.run.config.layout import ParallelLayout


def default_collator(
    config: DPOConfig, args: TrainingArguments, pad_token_id: int, pad_to_multiple_of: int = 8
) -> PreferenceCollator | PackedCollator:
    """The collator that packs or pads as `args` say and makes the label masks that `config` needs."""
    mask: NllMask | None = None
    if config.ld_alpha is not None:
        mask = "shared"
    elif config.needs_nll_mask:
        mask = "prompt_and_response"
    padding = PreferenceCollator(pad_token_id, pad_to_multiple_of=pad_to_multiple_of, nll_mask=mask)
    return PackedCollator(padding, prefix_sharing=args.prefix_sharing) if args.packing else padding


def row_capacity(dataset: Iterable[TokenizedPair], collator: PackedCollator, pack_length: int | None) -> int:
    """Most positions of a packed row of `dataset`: `pack_length`, or the longest pair rounded up.

    Raises:
        ConfigError: `pack_length` is no multiple of what rows are padded to.
        DataError: a pair does not fit into a row; names the one that needs most.
    """
    cost, longest = max(((collator.cost(pair), pair) for pair in dataset), key=lambda item: item[0], default=(0, None))
    if longest is None:
        raise DataError("packing needs at least 1 pair; the data set is empty")
    multiple = collator.pad_to_multiple_of
    needed = -(-cost // multiple) * multiple
    if pack_length is None:
        return needed
    if pack_length % multiple:
        raise ConfigError(f"pack_length must be a multiple of pad_to_multiple_of={multiple}, got {pack_length}")
    if needed > pack_length:
        sharing = "" if collator.prefix_sharing else ", set prefix_sharing: true"
        raise DataError(
            f"{longest.source or f'pair {longest.pair_id}'}: the pair takes {cost} positions of a packed row and a row "
            f"has pack_length={pack_length}; raise pack_length to {needed} or more{sharing}, or lower data.max_length"
        )
    return pack_length


def packed_rows(
    costs: Sequence[int], capacity: int, layout: ParallelLayout, dp_size: int, seed: int
) -> list[list[int]]:
    """The pairs of a step by row (see `plan_rows`), as many rows on every data-parallel rank."""
    # interleaved stages take microbatches in groups of that size
    multiple_of = dp_size * (layout.pp if layout.vpp else 1)
    return plan_rows(costs, capacity, multiple_of=multiple_of, seed=seed)
