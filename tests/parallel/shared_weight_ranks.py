"""What the worker ranks of `test_shared_weights.py` do, apart from it: a worker need not import transformers."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import megatron_runs
import saved_states
import torch
import torch.distributed.checkpoint
from megatron_runs import Layout
from short_timeouts import short_timeout
from torch.distributed import distributed_c10d

from fastpref.checkpoint.hf import ModelDirectory, ModelWriter
from fastpref.trainer import LoraConfig, add_lora, save_adapter
from fastpref.trainer.model import copies
from fastpref.trainer.model.build import ModelOptions, load_models, save_hf
from fastpref.trainer.ranks import platform
from fastpref.trainer.saves import content

TIMEOUT_S, SLOW_S = 0.8, 1.6
# The threads of a save talk to each other once a second.
SAVE_TIMEOUT_S = 2.0


@contextmanager
def replaced(owner: type, name: str, make: Callable[[Callable], Callable]) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, make(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def small_buckets(num_bytes: int) -> Iterator[None]:
    before, copies.BUCKET_BYTES = copies.BUCKET_BYTES, num_bytes
    try:
        yield
    finally:
        copies.BUCKET_BYTES = before


@contextmanager
def slow_ranks(layout: Layout) -> Iterator[None]:
    """Every collective fails after `TIMEOUT_S`."""
    with short_timeout(TIMEOUT_S):
        platform.initialize_model_parallel(layout.tp, layout.pp, layout.vpp, ep=layout.ep, timeout_s=TIMEOUT_S)
        yield


def count_reads(path: str, out: str, layout: Layout, lora: LoraConfig | None) -> int:
    """Numbers that this rank read from the files of the model (and adapters), which it then exports."""
    read = 0

    def counting(original: Callable) -> Callable:
        def count(*args: object) -> torch.Tensor:
            nonlocal read
            value = original(*args)
            read += value.numel()
            return value

        return count

    with megatron_runs.parallel(layout), small_buckets(4096), replaced(ModelDirectory, "read", counting):
        models = load_models(path, ModelOptions(sequence_parallel=layout.sp))
        if lora is None:
            save_hf(models, out, path)
        else:
            read = 0
            add_lora(models, path, lora, seed=0)
            save_adapter(models, out)
    return read


def load_slowly(path: str, out: str, layout: Layout) -> None:
    """Rank 0 reads one tensor for longer than a collective may take."""

    def slow(original: Callable) -> Callable:
        def read(self: ModelDirectory, name: str, *args: int) -> torch.Tensor:
            if name.endswith("layers.1.mlp.down_proj.weight") and torch.distributed.get_rank() == 0:
                time.sleep(SLOW_S)
            return original(self, name, *args)

        return read

    with slow_ranks(layout), small_buckets(4096):
        with replaced(ModelDirectory, "read", slow):
            models = load_models(path)
        save_hf(models, out, path)


def write_slowly(path: str, out: str, layout: Layout) -> None:
    """Rank 0 writes one tensor, and publishes the directory, for longer than a collective may take."""

    def slow(original: Callable) -> Callable:
        def write(self: ModelWriter, name: str, tensor: torch.Tensor) -> None:
            if name.endswith("layers.0.mlp.up_proj.weight"):
                time.sleep(SLOW_S)
            original(self, name, tensor)

        return write

    def slow_end(original: Callable) -> Callable:
        def publish(self: ModelWriter) -> None:
            time.sleep(SLOW_S)
            original(self)

        return publish

    with slow_ranks(layout), small_buckets(4096):
        models = load_models(path)
        with replaced(ModelWriter, "write", slow), replaced(ModelWriter, "_publish", slow_end):
            save_hf(models, out, path)


def fail_to_read(path: str, layout: Layout, error: Exception, only_rank: int) -> str:
    """The error of this rank where one rank cannot read a tensor in the middle of the model."""

    def broken(original: Callable) -> Callable:
        def read(self: ModelDirectory, name: str, *args: int) -> torch.Tensor:
            if name.endswith("layers.1.mlp.down_proj.weight") and torch.distributed.get_rank() == only_rank:
                raise error
            return original(self, name, *args)

        return read

    with megatron_runs.parallel(layout), small_buckets(4096), replaced(ModelDirectory, "read", broken):
        try:
            load_models(path)
        except Exception as found:
            return f"{type(found).__name__}: {found}"
    return "no error"


def fail_to_write(path: str, out: str, layout: Layout) -> str:
    def broken(original: Callable) -> Callable:
        def write(self: ModelWriter, name: str, tensor: torch.Tensor) -> None:
            if name.endswith("layers.1.mlp.down_proj.weight"):
                raise OSError(28, "No space left on device")
            original(self, name, tensor)

        return write

    with megatron_runs.parallel(layout), small_buckets(4096):
        models = load_models(path)
        try:
            with replaced(ModelWriter, "write", broken):
                save_hf(models, out, path)
        except OSError as error:
            save_hf(models, out, path)  # the ranks are still in step
            return str(error)
    return "no error"


def resume_slowly(config: dict, settings: dict, root: str) -> None:
    """Rank 0 looks for the checkpoint to write, and rank 1 reads it, for longer than a collective may take."""

    looked: list[Path] = []

    def slow_look(original: Callable) -> Callable:
        def exists(self: Path) -> bool:
            if self.name == "step-1" and torch.distributed.get_rank() == 0 and not looked:
                looked.append(self)
                time.sleep(2 * SAVE_TIMEOUT_S)
            return original(self)

        return exists

    def slow_read(original: Callable) -> Callable:
        def read_data(*args: object) -> object:
            if torch.distributed.get_rank() == 1:
                time.sleep(SLOW_S)
            return original(*args)

        return read_data

    with saved_states.built(config, {**settings, "distributed_timeout_seconds": 1}) as run:
        saved_states.take_steps(run, 1)
        torch.distributed.barrier(platform.background_group(SAVE_TIMEOUT_S))  # connected, a rank waits no longer
        distributed_c10d._set_pg_timeout(timedelta(seconds=TIMEOUT_S), None)
        try:
            with replaced(Path, "exists", slow_look):
                saved_states.save(run, root)
            with replaced(torch.distributed.checkpoint.FileSystemReader, "read_data", slow_read):
                content.load_all(Path(root, "step-1"), run.models, run.optimizer)
        finally:
            distributed_c10d._set_pg_timeout(timedelta(seconds=120), None)
