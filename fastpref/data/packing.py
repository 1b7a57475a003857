"""Which pairs of an optimizer step share a row. Plain integers in, plain lists out.

A pair is never split. Every step has as many rows as its layout demands, filled evenly, so that data-parallel ranks
have equal work and rows little padding.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence

from fastpref.data.schema import TokenizedPair


def num_shared_tokens(pair: TokenizedPair) -> int:
    """Return how many prompt tokens both sequences of a pair can have in one prefix.

    The prompt's last token predicts the first token of both answers, and a position has one label: each branch begins
    with its own copy of it.
    """
    most = min(pair.num_prompts) - 1
    chosen, rejected = pair.chosen_input_ids[:most], pair.rejected_input_ids[:most]
    if chosen == rejected:
        return most
    return next(index for index in range(most) if chosen[index] != rejected[index])


def pair_cost(pair: TokenizedPair, prefix_sharing: bool) -> int:
    """Return the positions that a pair takes in a packed row; the last token of a sequence is only a label."""
    both = len(pair.chosen_input_ids) + len(pair.rejected_input_ids) - 2
    return both - num_shared_tokens(pair) if prefix_sharing else both


def plan_rows(costs: Sequence[int], capacity: int, *, multiple_of: int = 1, seed: int = 0) -> list[list[int]]:
    """Deal the pairs of one step to rows.

    Args:
        costs: positions that each pair takes, >= 1.
        capacity: positions of a row.
        multiple_of: the number of rows must be a multiple of this: the data-parallel size, times the pipeline stages
            where these are interleaved.
        seed: settles ties between pairs of one cost.

    Returns:
        Indices into `costs`, a list per row, each index once; rows from the fullest to the emptiest. The number of
        rows is what first-fit decreasing needs, rounded up to the multiple. Where there are fewer pairs than rows,
        the last rows are empty.

    Determinism: a function of the arguments alone.

    Raises:
        ValueError: an argument out of range, or a pair larger than a row.
    """
    if multiple_of < 1:
        raise ValueError(f"multiple_of must be >= 1, got {multiple_of}")
    for index, cost in enumerate(costs):
        if not 1 <= cost <= capacity:
            raise ValueError(f"a pair must take 1 to {capacity} positions (the row's), got costs[{index}] = {cost}")
    order = list(range(len(costs)))
    random.Random(seed).shuffle(order)
    order.sort(key=lambda index: -costs[index])
    tight = _first_fit(order, costs, capacity)
    num_rows = max(1, -(-len(tight) // multiple_of)) * multiple_of
    rows = _evenly(order, costs, capacity, num_rows) or _spread(tight, num_rows)
    return sorted(rows, key=lambda row: -sum(costs[index] for index in row))


def rows_of_rank(rows: Sequence[list[int]], costs: Sequence[int], dp_rank: int, dp_size: int) -> list[list[int]]:
    """Return the rows of one data-parallel rank: as many as every other has, and about as many positions.

    Args:
        rows: from `plan_rows`; their number is a multiple of `dp_size`.
        costs: positions that each pair takes.
        dp_rank: the rank, in 0..dp_size-1.
        dp_size: ranks.
    """
    per_rank = len(rows) // dp_size
    shares: list[list[list[int]]] = [[] for _ in range(dp_size)]
    loads = [0] * dp_size
    for row in rows:
        open_ranks = (rank for rank in range(dp_size) if len(shares[rank]) < per_rank)
        lightest = min(open_ranks, key=lambda rank: loads[rank])
        shares[lightest].append(row)
        loads[lightest] += sum(costs[index] for index in row)
    return shares[dp_rank]


def _first_fit(order: Sequence[int], costs: Sequence[int], capacity: int) -> list[list[int]]:
    """Put each pair of `order` into the first row with room."""
    rows: list[list[int]] = []
    room: list[int] = []
    for index in order:
        cost = costs[index]
        row = next((row for row, free in enumerate(room) if free >= cost), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(capacity)
        rows[row].append(index)
        room[row] -= cost
    return rows


def _evenly(order: Sequence[int], costs: Sequence[int], capacity: int, num_rows: int) -> list[list[int]] | None:
    """Put each pair of `order` into the emptiest row; None where that overfills a row."""
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    loads = [(0, row) for row in range(num_rows)]
    for index in order:
        load, row = heapq.heappop(loads)
        if load + costs[index] > capacity:
            return None
        rows[row].append(index)
        heapq.heappush(loads, (load + costs[index], row))
    return rows


def _spread(tight: list[list[int]], num_rows: int) -> list[list[int]]:
    """Add rows by taking the smallest pair out of the row that holds most pairs; empty rows where none holds two."""
    rows = [list(row) for row in tight]
    while len(rows) < num_rows:
        largest = max(rows, key=len)
        rows.append([largest.pop()] if len(largest) > 1 else [])
    return rows
