"""The mixture-of-experts part of a `config.json`: every key honoured, without effect, or refused by name."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from fastpref.run.architecture.config_reader import ConfigReader
from fastpref.run.architecture.families import ExpertFamily


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The mixture-of-experts layers of a model.

    A token goes to the `experts_per_token` experts of the largest router probabilities (softmax over all experts), and
    takes the sum of their outputs weighted by these probabilities.
    """

    num_experts: int
    """Experts of one layer."""
    experts_per_token: int
    """Experts that one token goes to."""
    ffn_hidden_size: int
    """Width of one expert."""
    norm_topk_prob: bool
    """The weights of a token's experts are divided by their sum."""
    layers: tuple[bool, ...]
    """Which layers have experts; the others are dense."""
    # Says how to train, not what the weights compute: two models that differ in it are the same model.
    router_aux_loss_coef: float = field(compare=False)
    """Weight of the load-balancing loss, >= 0."""


def read_experts(
    reader: ConfigReader, family: ExpertFamily | None, num_layers: int, ffn_hidden_size: int | None
) -> Experts | None:
    """Take the keys of the experts out of a config; None for a dense family, or where `reader` found problems."""
    if family is None:
        return None
    num_experts = _read_num_experts(reader, family.num_experts)
    per_token = reader.take("num_experts_per_tok", int, family.experts_per_token)
    layers: tuple[bool, ...] = (True,) * num_layers
    norm_topk_prob = True
    if family.ffn_hidden_size is not None:
        ffn_hidden_size = reader.take("moe_intermediate_size", int, family.ffn_hidden_size)
    if family.norm_topk_prob is not None:
        norm_topk_prob = reader.take("norm_topk_prob", bool, family.norm_topk_prob)
    if family.dense_family is not None:
        layers = _read_layers(reader, num_layers, family.dense_family)
    # Asks transformers to return the router's logits; the weights and the forward pass do not depend on it.
    reader.take("output_router_logits", bool, False)
    coefficient = reader.left.pop("router_aux_loss_coef", 0.001)
    if isinstance(coefficient, bool) or not isinstance(coefficient, (int, float)) or not 0 <= coefficient < math.inf:
        reader.note("router_aux_loss_coef", f"must be a finite number >= 0, got {coefficient!r}")
    if num_experts is not None and per_token is not None and per_token > num_experts:
        reader.note("num_experts_per_tok", f"{per_token} must be at most the number of experts {num_experts}")
    if per_token == 1 and norm_topk_prob:
        text = (
            "1 gives every expert the weight 1 when weights are divided by their sum, which leaves the router without "
            "a gradient: this is not implemented"
        )
        reader.note("num_experts_per_tok", text)
    if num_experts is None or per_token is None or ffn_hidden_size is None or norm_topk_prob is None:
        return None
    return Experts(
        num_experts=num_experts,
        experts_per_token=per_token,
        ffn_hidden_size=ffn_hidden_size,
        norm_topk_prob=norm_topk_prob,
        layers=layers,
        router_aux_loss_coef=coefficient,
    )


def _read_num_experts(reader: ConfigReader, default: int) -> int | None:
    """`num_experts` of released Qwen files and `num_local_experts` of Mixtral's are one setting to transformers."""
    given: dict[str, Any] = {key: reader.take(key, int, None) for key in ("num_experts", "num_local_experts")}
    values = {value for value in given.values() if value is not None}
    if len(values) > 1:
        reader.note("num_experts", f"and num_local_experts contradict each other: {given}; keep one")
    return values.pop() if values else default


def _read_layers(reader: ConfigReader, num_layers: int, dense_family: str) -> tuple[bool, ...]:
    step = reader.take("decoder_sparse_step", int, 1) or 1
    dense = reader.take("mlp_only_layers", list, [])
    wrong = [index for index in dense or [] if isinstance(index, bool) or not isinstance(index, int)]
    if wrong:
        reader.note("mlp_only_layers", f"must hold layer numbers, got {dense}")
        return ()
    layers = tuple(index not in (dense or []) and (index + 1) % step == 0 for index in range(num_layers))
    if num_layers and not any(layers):
        reader.note(
            "decoder_sparse_step",
            f"and mlp_only_layers leave no layer with experts; use model_type {dense_family}",
        )
    return layers
