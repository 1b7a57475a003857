"""The process group, Megatron's parallel state and its random streams: set up on a GPU cluster or on a CPU.

Import this module before anything of Megatron: it keeps Megatron's remarks about packages that are not
installed here (Transformer Engine, Apex) out of the log, and no other warning.
"""

from __future__ import annotations

import gc
import os
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch

from fastpref.trainer.ranks import transformer_engine  # isort: skip  (before Megatron asks for it)
from fastpref.errors import ConfigError, raise_if_any
from fastpref.run.config.arguments import TrainingArguments
from fastpref.run.config.layout import ARGUMENT_NAMES, ParallelLayout, size_problems, world_problems
from fastpref.run.record.hang import REPORT
from fastpref.trainer.ranks import heartbeat, meeting, traces
from fastpref.trainer.ranks.descriptors import allow_connections, connect_lazily
from fastpref.trainer.ranks.launcher import launched_ranks
from fastpref.trainer.ranks.optional_packages import broken_is_absent

with warnings.catch_warnings(), broken_is_absent():
    # Said once per module at import; where a GPU misses them, one warning says it when a model is built.
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    warnings.filterwarnings("ignore", message="Apex is not installed")
    import megatron.core.models.gpt.gpt_layer_specs  # noqa: F401  (imported for its remark alone)
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    from fastpref.trainer.ranks.adam import install_fused_layout
    from fastpref.trainer.ranks.cpu_platform import install_cpu_platform

__all__ = [
    "background_group",
    "current_device",
    "current_layout",
    "destroy",
    "initialize_distributed",
    "initialize_megatron",
    "initialize_model_parallel",
    "install_cpu_platform",
]

# Megatron overlaps communication with computation on GPUs before Blackwell only with one hardware queue.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

_owns_process_group = False
# The default group, and the group made beside it for a background thread.
_background: tuple[torch.distributed.ProcessGroup | None, torch.distributed.ProcessGroup] | None = None
_report_dir: Path | None = None
_farewells: list[Callable[[], None]] = []


def current_device() -> torch.device:
    """Return the device of this rank: its CUDA device, or the CPU where there is none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def initialize_distributed(timeout_s: float = 600.0, report_dir: Path | None = None) -> None:
    """Join the process group: NCCL with one GPU per rank, gloo on a CPU.

    Under `torchrun` (or any launcher that sets `RANK` and `WORLD_SIZE`) the ranks meet at `MASTER_ADDR`;
    otherwise this process is the only rank, no port needs to be free, and gloo stays on the loopback
    interface. A process group that exists already is kept as it is. The CPU platform is installed where there
    is no GPU, and `FusedLayoutAdam` where Megatron has no FusedAdam.

    Args:
        timeout_s: seconds after which a collective that a peer does not join fails.
        report_dir: where the ranks leave what `fastpref diagnose` reads when they hang; None for PyTorch's own place.

    Raises:
        ConfigError: `timeout_s` <= 0, what the launcher set is incomplete or cannot be meant, or a process may not open
            as many files as the ranks need connections.
    """
    global _owns_process_group
    if timeout_s <= 0:
        raise ConfigError(f"timeout_s must be > 0 seconds, got {timeout_s}")
    install_fused_layout()
    install_cpu_platform()
    connect_lazily()
    if not torch.distributed.is_initialized():
        launched = launched_ranks()
        if report_dir is not None and launched is not None and launched > 1:
            _prepare_reports(report_dir)
        _join(timeout_s, launched)
        _owns_process_group = True
    heartbeat.begin(timeout_s)


def _prepare_reports(report_dir: Path) -> None:
    global _report_dir
    if os.environ.get("LOCAL_RANK", "0") == "0":
        aside = traces.set_aside_earlier(report_dir)
        if aside is not None:
            report = aside / REPORT
            warnings.warn(f"the ranks of an earlier start of this run hung; see {report}", stacklevel=2)
    traces.record_collectives(report_dir)
    if torch.cuda.is_available():
        traces.make_folder(report_dir)
        _report_dir = report_dir


def _join(timeout_s: float, launched: int | None) -> None:
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend, timeout = "nccl" if on_gpu else "gloo", timedelta(seconds=timeout_s)
    if launched is not None:
        allow_connections(launched)
        torch.distributed.init_process_group(backend, timeout=timeout)
    else:
        # One rank talks to nobody; without this gloo looks the host name up.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
        torch.distributed.init_process_group(
            backend, store=torch.distributed.HashStore(), rank=0, world_size=1, timeout=timeout
        )


def initialize_model_parallel(
    tp: int = 1,
    pp: int = 1,
    vpp: int | None = None,
    cp: int = 1,
    ep: int = 1,
    *,
    seed: int = 1234,
    timeout_s: float = 600.0,
) -> None:
    """Create Megatron's process groups and seed its random streams; the data-parallel size is what remains.

    Args:
        tp: tensor-parallel ranks.
        pp: pipeline stages.
        vpp: model chunks per pipeline stage (interleaved schedule), None for one.
        cp: context-parallel ranks.
        ep: expert-parallel ranks. Where there are several, each holds whole experts, and they are taken from all
            ranks of a pipeline stage; a single one leaves every expert split over the tensor-parallel ranks.
        seed: base of the random streams; each pipeline stage and tensor-parallel rank gets its own from it.
        timeout_s: seconds after which a collective in one of these groups fails.

    Raises:
        ConfigError: the sizes do not fit each other or the number of ranks; lists every problem.
        RuntimeError: there is no process group yet, or the parallel state exists already.
    """
    if not torch.distributed.is_initialized():
        raise RuntimeError("no process group: call initialize_distributed() first")
    if parallel_state.model_parallel_is_initialized():
        raise RuntimeError("model parallel state exists already: call destroy() before another layout")
    layout = ParallelLayout(tp=tp, pp=pp, vpp=vpp, cp=cp, ep=ep)
    raise_if_any(size_problems(layout))
    raise_if_any(world_problems(layout, torch.distributed.get_world_size()))
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=layout.expert_tp,
        distributed_timeout_minutes=timeout_s / 60.0,
    )
    stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(stage_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(stage_seed)


def initialize_megatron(args: TrainingArguments) -> None:
    """Joins the process group and creates Megatron's parallel state for `args`; a state of the same layout is kept.

    Raises:
        ConfigError: the sizes do not fit the number of ranks, or Megatron is initialised with another layout already.
    """
    initialize_distributed(args.distributed_timeout_seconds, Path(args.output_dir))
    wanted = args.layout
    if not parallel_state.model_parallel_is_initialized():
        timeout_s = args.distributed_timeout_seconds
        initialize_model_parallel(
            wanted.tp, wanted.pp, wanted.vpp, wanted.cp, wanted.ep, seed=args.seed, timeout_s=timeout_s
        )
    found = current_layout()
    for field, name in ARGUMENT_NAMES.items():
        if getattr(wanted, field) != getattr(found, field):
            raise ConfigError(
                f"{name} is {getattr(wanted, field)} but Megatron's parallel state was made with "
                f"{getattr(found, field)}; use the sizes of the run in both places"
            )


def current_layout() -> ParallelLayout:
    """Return the sizes of Megatron's parallel state, which must exist; it knows nothing of sequence parallelism."""
    return ParallelLayout(
        tp=parallel_state.get_tensor_model_parallel_world_size(),
        pp=parallel_state.get_pipeline_model_parallel_world_size(),
        vpp=parallel_state.get_virtual_pipeline_model_parallel_world_size(),
        cp=parallel_state.get_context_parallel_world_size(),
        ep=parallel_state.get_expert_model_parallel_world_size(),
    )


def background_group(timeout_s: float) -> torch.distributed.ProcessGroup:
    """Return a gloo group of all ranks for one thread beside the main one; its first call makes it, on every rank.

    Args:
        timeout_s: seconds after which a collective in it fails; kept from the first call.
    """
    global _background
    world = torch.distributed.group.WORLD
    if _background is None or _background[0] is not world:
        _background = world, torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    return _background[1]


def before_destroy(action: Callable[[], None]) -> None:
    """Have `destroy` call `action` first, once."""
    _farewells.append(action)


def destroy() -> None:
    """Undo `initialize_model_parallel`, and `initialize_distributed` where it created the process group."""
    global _owns_process_group, _background, _report_dir
    while _farewells:
        _farewells.pop()()
    if _background is not None and _background[0] is torch.distributed.group.WORLD:
        torch.distributed.destroy_process_group(_background[1])
    _background = None
    if parallel_state.model_parallel_is_initialized():
        # Megatron forgets its groups without closing them: sockets and threads would add up over many layouts.
        groups = parallel_state._global_process_group_list or []
        for group in dict.fromkeys(group for group in groups if group is not None):
            torch.distributed.destroy_process_group(group)
        parallel_state.destroy_model_parallel()
        # Megatron remembers the tables of the last rotary embeddings together with the embeddings, which hold a group.
        RotaryEmbedding.forward.cache_clear()
        transformer_engine.forget_groups()
        # A group's threads end with its last reference, and models that hold one are full of cycles.
        gc.collect()
    heartbeat.end()
    if _report_dir is not None:
        traces.remove_empty_folder(_report_dir)
    _report_dir = None
    if _owns_process_group and torch.distributed.is_initialized():
        meeting.forget()
        torch.distributed.destroy_process_group()
    _owns_process_group = False
