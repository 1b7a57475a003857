"""DPO under FSDP2: the op inside the forward pass of a sharded module, where FSDP has gathered the output layer.

torchrun --nproc-per-node 2 examples/fsdp2_loop.py    # two CPU ranks over gloo, or GPUs over NCCL where there are any

Called outside of it, the op would get a shard of the weight, and FSDP would not see its gradient.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import logsigmoid
from torch_loop import read_batch, sequence_logps, small_model
from transformers import PreTrainedModel


class ScoredModel(torch.nn.Module):
    """A causal model whose forward pass returns the log-probability of each response, [S]."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids_SL: Tensor, labels_SL: Tensor) -> Tensor:
        """Score the responses; see `torch_loop.sequence_logps`."""
        return sequence_logps(self.model, ids_SL, labels_SL)


def shard(model: PreTrainedModel) -> ScoredModel:
    """Shard layer by layer; embedding and output layer, which may be tied, belong to the outermost module."""
    scored = ScoredModel(model)
    for layer in model.base_model.layers:
        fully_shard(layer)
    return fully_shard(scored)


def dpo_loss(model: ScoredModel, ref_logps_S: Tensor, ids_SL: Tensor, labels_SL: Tensor) -> Tensor:
    """The mean DPO loss of this rank's pairs, beta = 0.1; FSDP averages its gradient over ranks."""
    chosen, rejected = (model(ids_SL, labels_SL) - ref_logps_S).chunk(2)
    return -logsigmoid(0.1 * (chosen - rejected)).mean()


def rank_pairs(batch_SL: Tensor) -> Tensor:
    """This rank's share of a batch whose first half are the chosen rows."""
    return torch.cat([half.chunk(dist.get_world_size())[dist.get_rank()] for half in batch_SL.chunk(2)])


def train(steps: int) -> list[float]:
    """Take `steps` steps on four pairs, shared over the ranks; this rank's losses."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids_SL, labels_SL = (rank_pairs(batch).to(device) for batch in read_batch(num_pairs=4))
    model, losses = shard(small_model().to(device)), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with torch.no_grad():
        ref_logps_S = model(ids_SL, labels_SL)
    for _ in range(steps):
        loss = dpo_loss(model, ref_logps_S, ids_SL, labels_SL)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    dist.init_process_group()  # gloo on CPUs, NCCL on GPUs
    if torch.cuda.is_available():
        torch.cuda.set_device(dist.get_node_local_rank())
    print(f"rank {dist.get_rank()}:", *(f"{loss:.4f}" for loss in train(steps=10)))
    dist.destroy_process_group()
