"""DPO in a Megatron script of your own: your `GPTModel`, tensor parallel, with the op in place of its logits.

torchrun --nproc-per-node 2 examples/megatron_script.py    # two CPU ranks over gloo, or GPUs over NCCL

The vocabulary stays cut over the ranks: each scores its own part, and the op merges them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastpref import linear_logps
from fastpref.trainer.ranks import platform  # before Megatron: on a CPU it answers what Megatron asks of CUDA

# isort: split
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig


def your_model(tp: int) -> GPTModel:
    """Stands for your model provider: a small stock `GPTModel`, its vocabulary cut over `tp` ranks."""
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        tensor_model_parallel_size=tp,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
    )
    layer_spec = get_gpt_layer_local_spec()
    return GPTModel(config, layer_spec, vocab_size=64, max_sequence_length=64, position_embedding_type="rope")


def sequence_logps(model: GPTModel, ids_SL: Tensor, labels_SL: Tensor) -> Tensor:
    """Log-probability of each response, fp32 [S], the same on every tensor-parallel rank.

    Args:
        model: the last (or only) pipeline stage, in parallel over the vocabulary.
        ids_SL: [S, L].
        labels_SL: [S, L], shifted: the token after each position, -100 where none is scored.
    """
    model.post_process = False  # return hidden states [L, S, H] instead of logits
    positions_SL = torch.arange(ids_SL.shape[1], device=ids_SL.device).expand_as(ids_SL)
    length = ids_SL.shape[1]
    future_LL = torch.ones(length, length, dtype=torch.bool, device=ids_SL.device).triu(1)
    hidden_LSH = model(ids_SL, positions_SL, future_LL[None, None])
    group = parallel_state.get_tensor_model_parallel_group()
    return linear_logps(hidden_LSH.transpose(0, 1), model.output_layer.weight, labels_SL, tp_group=group).logps


def dpo_loss(logps_S: Tensor, ref_logps_S: Tensor) -> Tensor:
    """The mean DPO loss, beta = 0.1, of sequences whose first half are the chosen ones."""
    chosen, rejected = (logps_S - ref_logps_S).chunk(2)
    return -logsigmoid(0.1 * (chosen - rejected)).mean()


def random_batch(vocab_size: int) -> tuple[Tensor, Tensor]:
    """Ids and shifted labels of two random pairs with a prompt of four tokens, [S, L]."""
    ids_SL = torch.randint(vocab_size, (4, 16), generator=torch.Generator().manual_seed(1))
    labels_SL = torch.nn.functional.pad(ids_SL[:, 1:], (0, 1), value=-100)
    labels_SL[:, :3] = -100
    return ids_SL, labels_SL


def train(steps: int) -> list[float]:
    """Take `steps` steps on one batch, all ranks tensor parallel; the losses."""
    platform.initialize_distributed()
    tp = torch.distributed.get_world_size()
    platform.initialize_model_parallel(tp=tp)
    torch.manual_seed(0)
    device, losses = platform.current_device(), []
    model = your_model(tp).to(device)
    ids_SL, labels_SL = (batch.to(device) for batch in random_batch(model.vocab_size))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with torch.no_grad():
        ref_logps_S = sequence_logps(model, ids_SL, labels_SL)
    for _ in range(steps):
        loss = dpo_loss(sequence_logps(model, ids_SL, labels_SL), ref_logps_S)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    platform.destroy()
    return losses


if __name__ == "__main__":
    print(*(f"{loss:.4f}" for loss in train(steps=10)))
