"""Small preference pairs and a small stock Megatron model, for tests of the trainer."""

from __future__ import annotations

import random

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig

from fastpref.data import TokenizedPair

VOCAB_SIZE = 64


TINY_LLAMA = {
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
"""A `config.json` for random weights."""


def pair_of(pair_id: int, prompt: list[int], chosen: list[int], rejected: list[int]) -> TokenizedPair:
    """A pair of these token ids, whose source is its number."""
    return TokenizedPair(
        pair_id=pair_id,
        chosen_input_ids=prompt + chosen,
        rejected_input_ids=prompt + rejected,
        num_prompts=(len(prompt), len(prompt)),
        source=f"tiny:{pair_id}",
    )


def tiny_pairs(num_pairs: int, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> list[TokenizedPair]:
    """Random pairs with prompts of 2-6 and answers of 1-9 tokens."""
    rng = random.Random(seed)
    pairs = []
    for pair_id in range(num_pairs):
        prompt = [rng.randrange(vocab_size) for _ in range(rng.randint(2, 6))]
        chosen, rejected = ([rng.randrange(vocab_size) for _ in range(rng.randint(1, 9))] for _ in range(2))
        pairs.append(pair_of(pair_id, prompt, chosen, rejected))
    return pairs


def stock_model(seed: int = 0, **overrides: object) -> list[GPTModel]:
    """One `GPTModel` as a Megatron user would build it: stock local layers, nothing of this library.

    Args:
        seed: of the initial weights.
        overrides: fields of `TransformerConfig`.
    """
    settings = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 64,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "use_cpu_initialization": True,
    }
    torch.manual_seed(seed)
    config = TransformerConfig(**(settings | overrides))
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(
            num_experts=config.num_moe_experts, moe_grouped_gemm=False, normalization="RMSNorm"
        ),
        vocab_size=VOCAB_SIZE,
        max_sequence_length=64,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        parallel_output=True,
    )
    return [model]
