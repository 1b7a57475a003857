"""Chunks in wrappers of other libraries: each would do again, or undo, what the trainer does, and is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_runs import PAIRS
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from checks.tiny import stock_model
from fastpref.errors import ConfigError
from fastpref.trainer import DPOConfig, DPOTrainer


class MegatronFSDP(torch.nn.Module):
    """As the class of Megatron-FSDP, which needs a GPU to be made."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module


def shard_whole(model: torch.nn.Module) -> torch.nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


def shard_one_layer(model: torch.nn.Module) -> torch.nn.Module:
    fully_shard(model.decoder.layers[1], mesh=init_device_mesh("cpu", (1,)))
    return model


FSDP = "Megatron-FSDP and PyTorch's FSDP are not supported; give the chunks as they were built"
WRAPPERS: dict[str, tuple[Callable[[torch.nn.Module], torch.nn.Module], str]] = {
    "FSDP2 of the whole": (shard_whole, f"a chunk is sharded by PyTorch (FSDPGPTModel); {FSDP}"),
    "FSDP2 of a layer": (
        shard_one_layer,
        f"module 'decoder.layers.1' of a chunk is sharded by PyTorch (FSDPTransformerLayer); {FSDP}",
    ),
    "FSDP1": (lambda model: FullyShardedDataParallel(model, device_id=torch.device("cpu")), FSDP),
    "Megatron-FSDP": (MegatronFSDP, f"MegatronFSDP; {FSDP}"),
    "Megatron-FSDP inside": (lambda model: torch.nn.Sequential(MegatronFSDP(model)), "must be megatron.core GPTModel"),
    "PyTorch's DDP": (DistributedDataParallel, "torch.nn.parallel.distributed.DistributedDataParallel; give what is"),
    "DataParallel": (lambda model: torch.nn.DataParallel(model), "DataParallel; give what is inside"),
}


@pytest.mark.parametrize("kind", WRAPPERS)
@pytest.mark.parametrize("role", ["policy", "reference"])
def test_wrapped_chunk_is_refused_by_name(quiet_args, kind: str, role: str) -> None:
    wrap, text = WRAPPERS[kind]
    plain, wrapped = stock_model(0), [wrap(stock_model(0)[0])]
    policy, reference = (wrapped, None) if role == "policy" else (plain, wrapped)
    with pytest.raises(ConfigError) as caught:
        DPOTrainer(policy, DPOConfig(), reference, quiet_args(), train_dataset=PAIRS)
    assert text in str(caught.value)


def test_megatrons_own_wrappers_are_taken(quiet_args) -> None:
    trainer = DPOTrainer(stock_model(0), DPOConfig(), None, quiet_args(max_steps=1), train_dataset=PAIRS)
    again = DPOTrainer(trainer.models_wrapped, DPOConfig(), None, quiet_args(max_steps=1), train_dataset=PAIRS)
    assert again.train().global_step == 1
