"""What a Hugging Face `config.json` says about a model, with nothing left over.

Every key is either honoured, known to have no effect on training, or refused by name: a setting that changes
the forward pass and is skipped in silence would train another model than the one that was asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastpref.checkpoint.hf import read_config
from fastpref.errors import ConfigError, Problem
from fastpref.run.architecture.config_reader import ConfigReader
from fastpref.run.architecture.experts import Experts, read_experts
from fastpref.run.architecture.families import FAMILIES, Activation, Family, Window
from fastpref.run.architecture.rope import Rope, read_ropes

# Settings of several families of which one value is implemented.
_FIXED = {
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": False,
    "quantization_config": None,
}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder-only model of one of the supported families.

    Checkpoints record it. A further field has a default, which stands for the models of checkpoints without it.
    """

    model_type: str
    """A key of `FAMILIES`."""
    num_layers: int
    """Transformer layers."""
    hidden_size: int
    """Width of the residual stream."""
    ffn_hidden_size: int
    """Width of the gated feed-forward layer; of one expert where all layers have experts of that width."""
    num_heads: int
    """Query heads."""
    num_query_groups: int
    """Key/value heads; divides `num_heads`."""
    head_dim: int
    """Size of one head."""
    vocab_size: int
    """Rows of the embedding in the model's files."""
    max_positions: int
    """Longest sequence that the model was made for."""
    norm_eps: float
    """Epsilon of the RMS norms."""
    activation: Activation
    """Function of the gate in the feed-forward layer."""
    rope: Rope
    """Rotary position embedding."""
    local_rope: Rope | None
    """That of the sliding layers, where they have their own."""
    attention_scale: float | None
    """Factor on the attention scores; None for 1/sqrt(head_dim)."""
    tie_embeddings: bool
    """The output projection is the embedding."""
    qkv_bias: bool
    """Query, key and value projections have a bias."""
    qk_norm: bool
    """Query and key heads are RMS-normed."""
    zero_centered_norms: bool
    """RMS norms multiply by 1 + weight."""
    sandwich_norms: bool
    """The outputs of attention and feed-forward layer are RMS-normed too, before they join the residual stream."""
    embedding_scale: float | None
    """Factor on the embeddings, rounded to the weights' number format; None for 1."""
    sliding_window: int | None
    """Positions that a sliding layer sees, itself included."""
    sliding_layers: tuple[bool, ...]
    """Which layers use the sliding window; empty for none."""
    experts: Experts | None
    """Mixture-of-experts layers; None for a dense model."""
    init_std: float
    """Standard deviation of random initial weights."""

    def has_experts(self, layer: int) -> bool:
        """Whether a layer, counted from 0, is a mixture of experts."""
        return self.experts is not None and self.experts.layers[layer]

    @classmethod
    def of(cls, model: Architecture | Mapping[str, Any] | str | Path) -> Architecture:
        """Return an architecture as it is; translate the contents of a `config.json`, or the one in a directory.

        Raises:
            ConfigError: see `from_hf`.
            CheckpointError: the directory has no readable `config.json`.
        """
        if isinstance(model, Architecture):
            return model
        return cls.from_hf(model if isinstance(model, Mapping) else read_config(model))

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Architecture:
        """Translate the contents of a `config.json`.

        Raises:
            ConfigError: the family or a setting is not supported, or a key is missing or of the wrong type;
                the message lists everything at once.
        """
        if config.get("auto_map"):
            text = "asks for Python code of the model's own, which never runs here; use a plain model"
            raise ConfigError([Problem("auto_map", text)], "config.json")
        family = FAMILIES.get(config.get("model_type", ""))
        if family is None:
            text = f"must be one of {', '.join(FAMILIES)}, got {config.get('model_type')!r}"
            raise ConfigError([Problem("model_type", text)], "config.json")
        reader = ConfigReader(config)
        reader.take("model_type", str)
        architecture = _read(cls, reader, config["model_type"], family)
        if architecture is None:
            raise ConfigError(reader.problems, "config.json")
        return architecture


def _read(cls: type[Architecture], reader: ConfigReader, model_type: str, family: Family) -> Architecture | None:
    fixed = {family.activation[0]: family.activation[1], **_FIXED, **family.fixed}
    qkv_bias = family.qkv_bias
    if family.qkv_bias_key is not None:
        del fixed[family.qkv_bias_key]
        qkv_bias = reader.take(family.qkv_bias_key, bool, family.qkv_bias)
    for key, supported in fixed.items():
        reader.require(key, supported, family.absent.get(key, supported))
    for key in family.inert:
        reader.left.pop(key, None)
    num_layers, num_heads = reader.take("num_hidden_layers", int), reader.take("num_attention_heads", int)
    hidden_size = reader.take("hidden_size", int)
    # JSON null means one for each query head; only an absent key means the family's default.
    default_groups = None if "num_key_value_heads" in reader.nulls else family.num_key_value_heads
    sizes = {
        "ffn_hidden_size": reader.take("intermediate_size", int),
        "vocab_size": reader.take("vocab_size", int),
        "max_positions": reader.take("max_position_embeddings", int),
        "norm_eps": reader.take("rms_norm_eps", float, family.norm_eps),
        "init_std": reader.take("initializer_range", float, 0.02),
        "tie_embeddings": reader.take("tie_word_embeddings", bool, family.tie_embeddings),
        "num_query_groups": reader.take("num_key_value_heads", int, default_groups or num_heads),
        "head_dim": reader.take("head_dim", int, family.head_dim),
    }
    pre_attn = None
    if family.query_pre_attn_scalar is not None:
        pre_attn = reader.take("query_pre_attn_scalar", float, family.query_pre_attn_scalar)
    rope, local_rope = read_ropes(reader, (family.rope_theta, family.local_rope_theta), sizes["max_positions"])
    window, sliding_layers = _read_window(reader, family.window, num_layers or 0)
    experts = read_experts(reader, family.experts, num_layers or 0, sizes["ffn_hidden_size"])
    reader.problems += [
        Problem(key, f"= {value!r} is not supported for {model_type}; remove it if it has no effect on the model")
        for key, value in sorted(reader.left.items())
    ]
    if not reader.problems:
        if sizes["head_dim"] is None:
            if hidden_size % num_heads:
                reader.note("num_attention_heads", f"{num_heads} must divide hidden_size {hidden_size}")
            sizes["head_dim"] = hidden_size // num_heads
        if num_heads % sizes["num_query_groups"]:
            reader.note(
                "num_key_value_heads", f"{sizes['num_query_groups']} must divide num_attention_heads {num_heads}"
            )
    if reader.problems or rope is None:
        return None
    return cls(
        model_type=model_type,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        activation=family.activation[1],
        rope=rope,
        local_rope=local_rope if sliding_layers else None,
        attention_scale=None if pre_attn is None else pre_attn**-0.5,
        qkv_bias=qkv_bias,
        qk_norm=family.qk_norm,
        zero_centered_norms=family.zero_centered_norms,
        sandwich_norms=family.sandwich_norms,
        embedding_scale=hidden_size**0.5 if family.scaled_embedding else None,
        sliding_window=window,
        sliding_layers=sliding_layers,
        experts=experts,
        **sizes,
    )


def _read_window(reader: ConfigReader, family: Window | None, num_layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """Size of the window, and which layers have it."""
    if family is None:
        return None, ()
    # JSON null switches the window off; only an absent key means the default.
    window = reader.take("sliding_window", int, None if "sliding_window" in reader.nulls else family.size)
    if family.layers == "all":
        return window, (True,) * num_layers if window else ()
    if family.layers == "pattern":
        in_use, period = True, reader.take("sliding_window_pattern", int, 6) or 1
        default = [
            "full_attention" if (index + 1) % period == 0 else "sliding_attention" for index in range(num_layers)
        ]
    else:
        in_use = reader.take("use_sliding_window", bool, False)
        first = reader.left.pop("max_window_layers", 28)
        if not isinstance(first, int) or isinstance(first, bool) or first < 0:
            reader.note("max_window_layers", f"must be a whole number >= 0, got {first!r}")
            first = 0
        num_full = first if in_use and window else num_layers
        default = ["full_attention"] * min(num_full, num_layers) + ["sliding_attention"] * (num_layers - num_full)
    kinds = reader.take("layer_types", list, None) or default
    if len(kinds) != num_layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
        reader.note(
            "layer_types", f"must name full_attention or sliding_attention for {num_layers} layers, got {kinds}"
        )
    sliding = tuple(kind == "sliding_attention" for kind in kinds)
    if any(sliding) and not (in_use and window):
        reader.note("layer_types", "names sliding_attention, but use_sliding_window or sliding_window is off")
    return (window, sliding) if any(sliding) else (None, ())
