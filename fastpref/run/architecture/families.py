"""The model families: one entry says all by which a family differs from Llama, in its `config.json` and in its files.

Nothing else asks for a model's type. A value that stands for an absent key is the one that transformers takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

Activation = Literal["silu", "gelu_pytorch_tanh"]

# Norms of a layer: Megatron's name -> the name in the files, below `model.layers.<n>.`.
_NORMS = {"input_layernorm": "input_layernorm", "pre_mlp_layernorm": "post_attention_layernorm"}
_SANDWICH_NORMS = {
    "input_layernorm": "input_layernorm",
    "pre_mlp_layernorm": "pre_feedforward_layernorm",
    "self_attn_bda.norm": "post_attention_layernorm",
    "mlp_bda.norm": "post_feedforward_layernorm",
}


class Window(NamedTuple):
    """Sliding-window attention of a family."""

    size: int | None
    """What an absent `sliding_window` means; None for no window."""
    layers: Literal["all", "after_first", "pattern"]
    """Which layers slide: all; those after the first `max_window_layers`, once `use_sliding_window` is on; all but
    every `sliding_window_pattern`-th. In the last two `layer_types` may name others."""


class ExpertFamily(NamedTuple):
    """Mixture-of-experts layers of a family, and how its files name their tensors."""

    block: str
    """Name of the module in a layer."""
    gate: str
    """Name of an expert's gate projection."""
    up: str
    """Name of its up projection."""
    down: str
    """Name of its down projection."""
    num_experts: int
    """What an absent `num_experts` means."""
    experts_per_token: int
    """What an absent `num_experts_per_tok` means."""
    ffn_hidden_size: int | None = None
    """What an absent `moe_intermediate_size` means; None where experts are `intermediate_size` wide."""
    norm_topk_prob: bool | None = None
    """What an absent `norm_topk_prob` means; None where weights are always divided by their sum."""
    dense_family: str | None = None
    """The family of layers without experts, which `decoder_sparse_step` and `mlp_only_layers` ask for; None for none
    such."""


class Family(NamedTuple):
    """How a model type differs from Llama."""

    qkv_bias: bool = False
    """Query, key and value projections have a bias."""
    qkv_bias_key: str | None = None
    """Key that says whether they have; `qkv_bias` is then what its absence means."""
    qk_norm: bool = False
    """Query and key heads are RMS-normed."""
    num_key_value_heads: int | None = None
    """What an absent `num_key_value_heads` means; None for the number of query heads."""
    head_dim: int | None = None
    """What an absent `head_dim` means; None for `hidden_size` over the number of query heads."""
    window: Window | None = None
    """Sliding-window attention; None for a family without."""
    norm_eps: float = 1e-6
    """What an absent `rms_norm_eps` means."""
    activation: tuple[str, Activation] = ("hidden_act", "silu")
    """Key of the gate's function, and the function."""
    rope_theta: float = 10000.0
    """What an absent `rope_theta` means."""
    local_rope_theta: float | None = None
    """The same for the rope of sliding layers; None for a family of one rope."""
    query_pre_attn_scalar: float | None = None
    """What an absent `query_pre_attn_scalar` means; None for scores over the root of the head size."""
    tie_embeddings: bool = False
    """What an absent `tie_word_embeddings` means."""
    zero_centered_norms: bool = False
    """RMS norms multiply by 1 + weight."""
    scaled_embedding: bool = False
    """Embeddings are multiplied by the root of `hidden_size`."""
    norms: Mapping[str, str] = _NORMS
    """Norms of a layer: Megatron's name -> the name in the files."""
    experts: ExpertFamily | None = None
    """Mixture-of-experts layers; None for a dense family."""
    fixed: Mapping[str, Any] = {}
    """Keys of this family that may have one value alone -> that value."""
    inert: tuple[str, ...] = ()
    """Keys that mean nothing to this family's models."""

    @property
    def sandwich_norms(self) -> bool:
        """Whether the outputs of attention and feed-forward layer are normed too."""
        return "mlp_bda.norm" in self.norms


FAMILIES = {
    "llama": Family(),
    "mistral": Family(num_key_value_heads=8, window=Window(4096, "all")),
    "qwen2": Family(
        qkv_bias=True,
        num_key_value_heads=32,
        window=Window(4096, "after_first"),
        # The biases are there whatever it says.
        inert=("attention_bias",),
    ),
    "qwen3": Family(qk_norm=True, num_key_value_heads=32, head_dim=128, window=Window(4096, "after_first")),
    "gemma3_text": Family(
        qk_norm=True,
        num_key_value_heads=4,
        head_dim=256,
        window=Window(4096, "pattern"),
        activation=("hidden_activation", "gelu_pytorch_tanh"),
        rope_theta=1e6,
        local_rope_theta=1e4,
        query_pre_attn_scalar=256.0,
        tie_embeddings=True,
        zero_centered_norms=True,
        scaled_embedding=True,
        norms=_SANDWICH_NORMS,
    ),
    "qwen3_moe": Family(
        qk_norm=True,
        num_key_value_heads=4,
        experts=ExpertFamily("mlp", "gate_proj", "up_proj", "down_proj", 128, 8, 768, False, "qwen3"),
        # The window's size and first layer, while it is off.
        inert=("sliding_window", "max_window_layers"),
    ),
    "mixtral": Family(
        num_key_value_heads=8,
        norm_eps=1e-5,
        rope_theta=1e6,
        window=Window(None, "all"),
        experts=ExpertFamily("block_sparse_moe", "w1", "w3", "w2", 8, 2),
        fixed={"router_jitter_noise": 0},
    ),
    "seed_oss": Family(
        qkv_bias=True,
        qkv_bias_key="attention_bias",
        num_key_value_heads=8,
        head_dim=128,
        fixed={"attention_out_bias": False},
    ),
}
"""Model type -> family."""
