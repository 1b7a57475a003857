"""Process group, parallel state, random streams and the CPU shims."""

import json
import os
import subprocess
import sys
from pathlib import Path

import megatron.core
import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.transformer_config import TransformerConfig

from fastpref.errors import ConfigError
from fastpref.testing.workers import RankPool
from fastpref.trainer import TrainingArguments
from fastpref.trainer.model.build import build_models
from fastpref.trainer.ranks import platform
from fastpref.trainer.ranks.adam import FusedLayoutAdam
from fastpref.trainer.step.optimizer import wrap_for_training

needs_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU shims are not installed beside a GPU")


@pytest.fixture
def one_rank():
    platform.initialize_distributed()
    platform.initialize_model_parallel()
    yield
    platform.destroy()


# --- the CPU shims


@needs_cpu
def test_install_cpu_platform_is_idempotent() -> None:
    assert platform.install_cpu_platform()
    before = (torch.zeros, torch.Tensor.type, torch.cuda.current_device, torch.cuda.manual_seed)
    assert platform.install_cpu_platform()
    assert before == (torch.zeros, torch.Tensor.type, torch.cuda.current_device, torch.cuda.manual_seed)


@needs_cpu
def test_cuda_requests_land_on_the_cpu() -> None:
    platform.install_cpu_platform()
    for device in ("cuda", "cuda:0", torch.device("cuda"), torch.cuda.current_device()):
        assert torch.zeros(2, device=device).device == torch.device("cpu")
    tensors = [torch.tensor([1.0], device="cuda"), torch.full((1,), 1.0, device="cuda"), torch.ones(1, device="cuda")]
    tensors += [torch.ones(1).cuda(), torch.arange(1, 2.0, device="cuda").cuda(0, non_blocking=True)]
    assert all(torch.equal(tensor, torch.tensor([1.0])) for tensor in tensors)
    assert torch.empty_like(torch.ones(3), device="cuda").shape == (3,)
    torch.cuda.synchronize()
    # other devices and plain calls stay as they were
    assert torch.zeros(2, device="meta").is_meta
    assert torch.zeros(2, dtype=torch.int8).dtype == torch.int8
    assert platform.current_device() == torch.device("cpu")


@needs_cpu
@needs_cpu
def test_torchscript_knows_the_factories_that_go_to_the_cpu() -> None:
    """It knows them by identity, and PyTorch scripts its own code when forward mode is first used."""
    platform.install_cpu_platform()

    def zeros_and_ones(x: torch.Tensor) -> list[torch.Tensor]:
        return [torch.zeros(2), torch.ones([2, 3]), torch.full([2], 3.0), torch.empty_like(x).zero_(), torch.arange(3)]

    for scripted, plain in zip(
        torch.jit.script(zeros_and_ones)(torch.ones(2)), zeros_and_ones(torch.ones(2)), strict=True
    ):
        assert torch.equal(scripted, plain)
    assert torch.func.jvp(torch.sin, (torch.zeros(1),), (torch.ones(1),))[1] == 1.0


def test_tensor_type_answers_to_both_names() -> None:
    platform.install_cpu_platform()
    assert torch.ones(1).type() == "torch.FloatTensor"
    assert torch.ones(1).type() == "torch.cuda.FloatTensor"
    assert torch.ones(1).type() != "torch.cuda.HalfTensor"
    assert torch.ones(1).bfloat16().type() in ["torch.cuda.HalfTensor", "torch.cuda.BFloat16Tensor"]
    assert torch.ones(1).type(torch.float64).dtype == torch.float64
    assert {torch.ones(1).type(): 1}["torch.FloatTensor"] == 1


@needs_cpu
def test_random_streams_follow_the_tracker(one_rank) -> None:
    tracker = tensor_parallel.get_cuda_rng_tracker()
    outside = torch.rand(3)
    with tracker.fork():
        inside = torch.rand(3)
    after = torch.rand(3)
    platform.destroy()
    platform.initialize_distributed()
    platform.initialize_model_parallel()
    # the stream inside a region neither sees nor moves the one outside
    assert torch.equal(torch.rand(6), torch.cat([outside, after]))
    with tensor_parallel.get_cuda_rng_tracker().fork():
        assert torch.equal(torch.rand(3), inside)
    assert not torch.equal(inside, outside)


def test_checkpointed_dropout_draws_the_same_mask_again(one_rank) -> None:
    x = torch.ones(64, requires_grad=True)
    output = tensor_parallel.checkpoint(lambda t: torch.nn.functional.dropout(t, 0.5), False, x)
    output.sum().backward()
    assert torch.equal(x.grad, output.detach())
    assert 0 < (output == 0).sum() < 64


def megatron_source() -> tuple[str, str]:
    return megatron.core.__version__, megatron.core.__path__[0]


def test_ranks_run_the_megatron_of_this_process(rank_pool_2: RankPool) -> None:
    assert rank_pool_2.run(megatron_source) == [megatron_source()] * 2


def random_draws() -> tuple[float, float]:
    platform.initialize_distributed()
    platform.initialize_model_parallel(tp=2)
    with tensor_parallel.get_cuda_rng_tracker().fork():
        inside = torch.rand(1).item()
    outside = torch.rand(1).item()
    platform.destroy()
    return inside, outside


def test_tensor_parallel_ranks_share_one_stream_and_differ_in_the_other(rank_pool_2: RankPool) -> None:
    (inside_0, outside_0), (inside_1, outside_1) = rank_pool_2.run(random_draws)
    assert inside_0 != inside_1
    assert outside_0 == outside_1


# --- process groups


@pytest.mark.parametrize("is_wrapped_by_caller", [False, True])
def test_destroy_closes_what_was_opened(is_wrapped_by_caller: bool) -> None:
    """Files, and the threads of groups that a trained model holds on to."""
    counts = []
    for _ in range(3):
        platform.initialize_distributed()
        platform.initialize_model_parallel()
        assert parallel_state.model_parallel_is_initialized()
        model, optimizer = build_for_training(seed=1, is_wrapped_by_caller=is_wrapped_by_caller)
        train_step(model, optimizer, 0)
        del model, optimizer
        platform.destroy()
        assert not parallel_state.model_parallel_is_initialized()
        assert not torch.distributed.is_initialized()
        counts.append((len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))))
    assert counts[1] == counts[2]


def layouts_in_turn() -> list[tuple[int, ...]]:
    seen = []
    for sizes in ((1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4), (2, 1)):
        platform.initialize_distributed()
        platform.initialize_model_parallel(*sizes)
        seen.append(
            (
                parallel_state.get_tensor_model_parallel_world_size(),
                parallel_state.get_pipeline_model_parallel_world_size(),
                parallel_state.get_data_parallel_world_size(),
            )
        )
        total = torch.ones(1)
        torch.distributed.all_reduce(total, group=parallel_state.get_tensor_model_parallel_group())
        assert total.item() == sizes[0]
        platform.destroy()
    return seen


def test_layouts_follow_each_other_in_one_process_group(rank_pool_4: RankPool) -> None:
    expected = [(1, 1, 4), (2, 1, 2), (1, 2, 2), (2, 2, 1), (4, 1, 1), (1, 4, 1), (2, 1, 2)]
    assert rank_pool_4.run(layouts_in_turn) == [expected] * 4


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tp": 0}, "tensor_model_parallel_size must be >= 1, got 0"),
        ({"tp": 2}, r"tensor_model_parallel_size = 2 must divide the number of ranks, got 1; start 2 "),
        ({"ep": 2}, "expert_model_parallel_size = 2 must divide the number of ranks, got 1"),
        ({"vpp": 2}, "parallel_size 2 needs pipeline_model_parallel_size >= 2, got 1"),
    ],
)
def test_initialize_model_parallel_refuses_sizes_that_do_not_fit(sizes: dict, message: str) -> None:
    platform.initialize_distributed()
    try:
        with pytest.raises(ConfigError, match=message):
            platform.initialize_model_parallel(**sizes)
    finally:
        platform.destroy()


def test_initialize_out_of_order_is_an_error(monkeypatch) -> None:
    with pytest.raises(RuntimeError, match="call initialize_distributed"):
        platform.initialize_model_parallel()
    with pytest.raises(ConfigError, match="timeout_s must be > 0"):
        platform.initialize_distributed(timeout_s=0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE is set but RANK, MASTER_ADDR, MASTER_PORT is not"):
        platform.initialize_distributed()
    monkeypatch.delenv("WORLD_SIZE")
    platform.initialize_distributed()
    platform.initialize_model_parallel()
    try:
        with pytest.raises(RuntimeError, match=r"call destroy\(\) before another layout"):
            platform.initialize_model_parallel()
    finally:
        platform.destroy()


IN_A_NEW_PROCESS = """
import json, psutil
from fastpref.trainer.ranks import platform
platform.initialize_distributed()
platform.initialize_model_parallel()
addresses = sorted({connection.laddr.ip for connection in psutil.Process().net_connections("inet")})
import torch, transformers.activations
with torch.device("meta"):
    devices = sorted({getattr(torch, factory)(2).device.type for factory in ("zeros", "empty", "arange")})
print(json.dumps([addresses, devices]))
"""


def test_import_and_setup_in_a_new_process() -> None:
    """They say nothing and stay on the loopback interface. Libraries imported afterwards find the classes of
    `torch.cuda` that their annotations name, and build models under `torch.device("meta")`: with wrapped factories the
    context was ignored, and a model of transformers loaded after the shims came in held uninitialised buffers."""
    environment = {key: value for key, value in os.environ.items() if key != "GLOO_SOCKET_IFNAME"}
    command = [sys.executable, "-c", IN_A_NEW_PROCESS]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout) == [["127.0.0.1"], ["meta"]]


# --- checkpoints of the distributed optimizer

CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "hidden_size": 8,
    "intermediate_size": 12,
    "vocab_size": 14,
    "max_position_embeddings": 16,
    "initializer_range": 0.3,
}


def train_and_resume(path: str, tp: int, sharding: str) -> tuple[bool, bool, int]:
    """Two steps, a checkpoint, a third step; then the third step again from the checkpoint in a new model.

    Returns:
        Whether the weights are the same bits, whether they moved at all in the third step, the step count.
    """
    platform.initialize_distributed()
    platform.initialize_model_parallel(tp)
    metadata = {
        "distrib_optim_sharding_type": sharding,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    model, optimizer = build_for_training(seed=1)
    assert isinstance(optimizer.chained_optimizers[0].optimizer, FusedLayoutAdam)
    for number in range(2):
        train_step(model, optimizer, number)
    dist_checkpointing.save(sharded_state(model, optimizer, metadata, is_loading=False), path)
    before = [p.detach().clone() for p in model.parameters()]
    train_step(model, optimizer, 2)
    again, resumed = build_for_training(seed=2)
    with torch.no_grad():
        state = dist_checkpointing.load(sharded_state(again, resumed, metadata, is_loading=True), path)
        again.module.load_state_dict(state["model"])
        resumed.load_state_dict(state["optimizer"])
    train_step(again, resumed, 2)
    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    moved = not any(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    count = resumed.chained_optimizers[0].optimizer.param_groups[0]["step"]
    platform.destroy()
    return same, moved, count


def build_for_training(seed: int, is_wrapped_by_caller: bool = False):
    chunks = build_models(CONFIG, seed=seed)
    if is_wrapped_by_caller:
        ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True)
        chunks = [DistributedDataParallel(chunk.config, ddp_config, chunk) for chunk in chunks]
    (model,) = wrap_for_training(chunks, TrainingArguments(use_distributed_optimizer=True))
    settings = OptimizerConfig(optimizer="adam", lr=1e-2, use_distributed_optimizer=True, clip_grad=1.0)
    return model, get_megatron_optimizer(settings, [model])


def train_step(model, optimizer, number: int) -> None:
    generator = torch.Generator().manual_seed(10 * number + parallel_state.get_data_parallel_rank())
    ids = torch.randint(0, 14, (2, 6), generator=generator)
    model.zero_grad_buffer()
    optimizer.zero_grad()
    model(ids, torch.arange(6)[None], None).float().pow(2).mean().backward()
    finalize_model_grads([model])
    updated, grad_norm, _ = optimizer.step()
    assert updated
    assert grad_norm > 0


def sharded_state(model, optimizer, metadata: dict, is_loading: bool) -> dict:
    weights = model.module.sharded_state_dict(metadata=metadata)
    state = optimizer.sharded_state_dict({"model": weights}, is_loading=is_loading, metadata=metadata)
    return {"model": weights, "optimizer": state}


@pytest.mark.parametrize("sharding", ["dp_reshardable", "fully_reshardable"])
@pytest.mark.parametrize("tp", [1, 2])
def test_distributed_optimizer_resumes_bit_for_bit(
    rank_pool_2: RankPool, tmp_path: Path, tp: int, sharding: str
) -> None:
    assert rank_pool_2.run(train_and_resume, str(tmp_path), tp, sharding) == [(True, True, 3)] * 2


def test_transformer_config_keeps_the_default_stack(one_rank) -> None:
    # a plain Megatron config still works on the platform: nothing of the shims leaks into its fields
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2)
    assert config.params_dtype == torch.float32
