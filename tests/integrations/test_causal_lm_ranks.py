"""`add_logps_head` inside DDP and both FSDPs on two ranks: gradients are those of one process."""

import pytest
import torch
import torch.distributed as dist
from test_causal_lm import batch
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from trl_runs import tiny_model

from fastpref.integrations.causal_lm import add_logps_head
from fastpref.testing.workers import RankPool


def gradients_on_rank(wrapper: str, family: str) -> dict[str, Tensor]:
    """Whole gradients of the mean over ranks, each scoring half of the batch."""
    model = tiny_model(family, 0)
    add_logps_head(model, ("log_probs", "entropy"))
    wrapped = model
    if wrapper == "DDP":
        wrapped = DistributedDataParallel(model)
    elif wrapper == "FSDP1, head apart":
        settings = {"use_orig_params": True, "device_id": torch.device("cpu")}
        model.lm_head = FullyShardedDataParallel(model.lm_head, **settings)
        wrapped = FullyShardedDataParallel(model, **settings)
    else:
        for module in (*model.base_model.layers, *([model.lm_head] if wrapper == "FSDP2, head apart" else [])):
            fully_shard(module)
        fully_shard(model)
    inputs = {name: value.chunk(2)[dist.get_rank()] for name, value in batch().items()}
    wrapped(**inputs, fused_lm_head=True).log_probs.sum().backward()
    if wrapper.startswith("FSDP1"):
        with FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True):
            named = dict(wrapped.named_parameters())
            return {name.replace("_fsdp_wrapped_module.", ""): weight.grad.clone() for name, weight in named.items()}
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    return {name: value if wrapper == "DDP" else value.full_tensor() for name, value in gradients.items()}


@pytest.mark.parametrize(
    ("wrapper", "family"),
    [
        ("DDP", "llama"),
        ("FSDP1, head apart", "llama"),
        ("FSDP2", "tied"),
        ("FSDP2", "mixtral"),
        ("FSDP2, head apart", "llama"),
    ],
)
def test_wrapped_gradients_equal_one_process(wrapper: str, family: str, rank_pool_2: RankPool) -> None:
    model = tiny_model(family, 0)
    add_logps_head(model)
    (model(**batch(), fused_lm_head=True).log_probs.sum() / 2).backward()
    expected = {name: weight.grad for name, weight in model.named_parameters()}
    for found in rank_pool_2.run(gradients_on_rank, wrapper, family):
        torch.testing.assert_close(found, expected)
