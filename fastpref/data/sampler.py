"""Which pairs belong to which step: batch = f(seed, step), with no state to save or restore.

A step is an index from 0 over the whole run; resuming at step k is calling `batch(k)`.
"""

from __future__ import annotations

import hashlib
from array import array
from functools import lru_cache

import torch

from fastpref.errors import ConfigError


class PairSampler:
    """Exact epochs over `num_pairs` pairs: in every epoch each pair is drawn exactly once.

    Epoch e covers the steps `e * steps_per_epoch .. (e + 1) * steps_per_epoch - 1`. The last batch of an epoch is
    short when the batch size does not divide `num_pairs`; with `drop_last` that remainder (other pairs in each epoch
    when shuffling) is left out instead. A data set smaller than one batch is one short batch per epoch. For a full
    evaluation use `shuffle=False`: pairs in order, no tail lost.

    Determinism: the order depends on `(seed, epoch, num_pairs)` alone: not on PyTorch's generators, its version or
    the machine.

    Args:
        num_pairs: pairs in the data set, >= 1.
        global_batch_pairs: pairs in one optimizer step over all ranks and micro-batches, >= 1.
        seed: any integer.
        shuffle: a new order in every epoch; otherwise 0..num_pairs-1.
        drop_last: leave out the short last batch of an epoch.

    Raises:
        ConfigError: no pairs, a batch size below 1, or `drop_last` with less than one whole batch.
    """

    def __init__(
        self,
        num_pairs: int,
        global_batch_pairs: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> None:
        if num_pairs < 1:
            raise ConfigError(f"num_pairs must be >= 1, got {num_pairs}; the data set is empty")
        if global_batch_pairs < 1:
            raise ConfigError(f"global_batch_pairs must be >= 1, got {global_batch_pairs}")
        if drop_last and num_pairs < global_batch_pairs:
            raise ConfigError(
                f"drop_last leaves no batch: the data set has {num_pairs} pairs and one batch needs "
                f"{global_batch_pairs}; lower the batch size or set drop_last to false"
            )
        self.num_pairs = num_pairs
        self.global_batch_pairs = global_batch_pairs
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last

    @property
    def steps_per_epoch(self) -> int:
        """Batches in one epoch, >= 1."""
        whole, rest = divmod(self.num_pairs, self.global_batch_pairs)
        return whole if self.drop_last or not rest else whole + 1

    def batch(self, step: int) -> list[int]:
        """Pair indices of optimizer step `step` (>= 0): at most `global_batch_pairs`, at least 1."""
        if step < 0:
            raise ValueError(f"step must be >= 0, got {step}")
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        start = step_in_epoch * self.global_batch_pairs
        stop = min(start + self.global_batch_pairs, self.num_pairs)
        if not self.shuffle:
            return list(range(start, stop))
        return _epoch_order(self.seed, epoch, self.num_pairs)[start:stop].tolist()

    def shard(self, step: int, dp_rank: int, dp_size: int, micro_batch: int, num_micro: int) -> list[list[int | None]]:
        """Return the micro-batches of one data-parallel rank in step `step`.

        Pair k of the batch goes to rank `k % dp_size`, so that a short batch loads the ranks evenly. Every rank gets
        `num_micro` micro-batches of exactly `micro_batch` entries; None marks a filler, to be replaced by any pair
        with weight 0 and the id `FILLER_ID`.

        Raises:
            ConfigError: `dp_size * micro_batch * num_micro` is not the global batch.
            ValueError: `dp_rank` outside 0..dp_size-1.
        """
        if dp_size * micro_batch * num_micro != self.global_batch_pairs:
            raise ConfigError(
                f"global_batch_pairs={self.global_batch_pairs} must equal dp_size * micro_batch * num_micro = "
                f"{dp_size} * {micro_batch} * {num_micro} = {dp_size * micro_batch * num_micro}"
            )
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"dp_rank must be in 0..{dp_size - 1}, got {dp_rank}")
        local: list[int | None] = [*self.batch(step)[dp_rank::dp_size]]
        local += [None] * (micro_batch * num_micro - len(local))
        return [local[start : start + micro_batch] for start in range(0, len(local), micro_batch)]


@lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, num_pairs: int) -> array[int]:
    """Permute `range(num_pairs)`: pairs sorted by a hash of (seed, epoch, pair).

    The hash is the output function of SplitMix64 (Steele, Lea and Flood, 2014) on 64-bit wrapping integers; the
    stable sort settles the (astronomically rare) ties.
    """
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    start = int.from_bytes(digest[:8], "little", signed=True)
    key = start + torch.arange(1, num_pairs + 1, dtype=torch.int64, device="cpu") * _signed(0x9E3779B97F4A7C15)
    key = (key ^ _logical_shift_right(key, 30)) * _signed(0xBF58476D1CE4E5B9)
    key = (key ^ _logical_shift_right(key, 27)) * _signed(0x94D049BB133111EB)
    # no tensor: one made under a mode, such as that of fake tensors, would be found in the cache after it
    return array("q", (key ^ _logical_shift_right(key, 31)).argsort(stable=True).tolist())


def _signed(value: int) -> int:
    """Return the int64 with the bits of an unsigned 64-bit `value`."""
    return value - (1 << 64) if value >> 63 else value


def _logical_shift_right(value: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift int64 bits right and fill with zeros; `>>` on a signed tensor repeats the sign bit."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)
