"""DPO in a loop of your own: any decoder, plain PyTorch, one call in place of the logits.

python examples/torch_loop.py    # a few seconds on a CPU; a small random Llama learns to prefer the shipped answers

Dims: `S` sequences (the chosen halves of the pairs, then the rejected ones), `L` positions.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from fastpref import linear_logps

HERE = Path(__file__).parent


def sequence_logps(model: PreTrainedModel, ids_SL: Tensor, labels_SL: Tensor) -> Tensor:
    """Log-probability of each response, [S]: the decoder without its output layer, then the op."""
    hidden_SLH = model.base_model(ids_SL).last_hidden_state
    next_SL = pad(labels_SL[:, 1:], (0, 1), value=-100)  # position t predicts token t + 1
    return linear_logps(hidden_SLH, model.get_output_embeddings().weight, next_SL).logps


def dpo_loss(model: PreTrainedModel, ref_model: PreTrainedModel, ids_SL: Tensor, labels_SL: Tensor) -> Tensor:
    """The mean DPO loss of a batch, beta = 0.1."""
    with torch.no_grad():
        ref_logps_S = sequence_logps(ref_model, ids_SL, labels_SL)
    chosen, rejected = (sequence_logps(model, ids_SL, labels_SL) - ref_logps_S).chunk(2)
    return -logsigmoid(0.1 * (chosen - rejected)).mean()


def train(model: PreTrainedModel, ids_SL: Tensor, labels_SL: Tensor, steps: int) -> list[float]:
    """Take `steps` steps on one batch; the losses."""
    ref_model, optimizer, losses = copy.deepcopy(model), torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for _ in range(steps):
        loss = dpo_loss(model, ref_model, ids_SL, labels_SL)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def read_batch(num_pairs: int) -> tuple[Tensor, Tensor]:
    """Ids and labels (-100 on prompts and padding) of the first pairs of examples/data, [S, L]."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(HERE / "tokenizer")
    rows, masks = [], []
    lines = (HERE / "data" / "demo_train.jsonl").read_text(encoding="utf-8").splitlines()[:num_pairs]
    for side in ("chosen", "rejected"):
        for record in map(json.loads, lines):
            prompt = tokenizer.apply_chat_template(record["prompt"], add_generation_prompt=True, return_dict=False)
            ids = tokenizer.apply_chat_template(record["prompt"] + record[side], return_dict=False)
            rows.append(torch.tensor(ids))
            masks.append(torch.tensor([-100] * len(prompt) + ids[len(prompt) :]))
    return pad_sequence(rows, batch_first=True), pad_sequence(masks, batch_first=True, padding_value=-100)


def small_model() -> PreTrainedModel:
    """A random Llama for the tokenizer of the examples."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    vocab_size = len(PreTrainedTokenizerFast.from_pretrained(HERE / "tokenizer"))
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=vocab_size, **sizes))


if __name__ == "__main__":
    for step, loss in enumerate(train(small_model(), *read_batch(num_pairs=4), steps=10), start=1):
        print(f"step {step}: loss {loss:.4f}")
