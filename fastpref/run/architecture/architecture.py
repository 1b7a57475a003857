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
from fastpref.run.architecture.families import FAMILIES, Activation, Family
from fastpref.run.architecture.known_keys import ACTIVATION_NAMES, DROPOUT_KEYS, neutral_values, without_inert
from fastpref.run.architecture.multimodal import multimodal_problem, text_model_inside
from fastpref.run.architecture.rope import Rope, read_ropes
from fastpref.run.architecture.windows import read_window

# Settings of several families of which one value is implemented.
_FIXED = {
    "attention_bias": False,
    "mlp_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": False,
}
_QUANTIZATION_KEYS = ("compression_config", "quantization", "quantization_config")
# What is said of every layer is held in memory.
_MOST_LAYERS = 10_000


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
        if (text := multimodal_problem(config)) is not None:
            raise ConfigError([Problem("model_type", text)], "config.json")
        if config.get("auto_map"):
            text = "asks for Python code of the model's own, which never runs here; use a plain model"
            raise ConfigError([Problem("auto_map", text)], "config.json")
        model_type = config.get("model_type")
        family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
        if family is None:
            text = f"must be one of {', '.join(FAMILIES)}, got {model_type!r}"
            inside = text_model_inside(config)
            text += f"; {inside}" if inside else ""
            raise ConfigError([Problem("model_type", text)], "config.json")
        reader = ConfigReader(without_inert(config, family))
        reader.take("model_type", str)
        architecture = _read(cls, reader, config["model_type"], family)
        if architecture is None:
            raise ConfigError(reader.problems, "config.json")
        return architecture


def _read(cls: type[Architecture], reader: ConfigReader, model_type: str, family: Family) -> Architecture | None:
    """Take the whole config; None where `reader` found problems."""
    qkv_bias = _take_qkv_bias(reader, family)
    _require_supported(reader, family)
    num_layers, sizes = _take_num_layers(reader), _take_sizes(reader, family)
    pre_attn = None
    if family.query_pre_attn_scalar is not None:
        pre_attn = reader.take("query_pre_attn_scalar", float, family.query_pre_attn_scalar)
    rope, local_rope = read_ropes(reader, (family.rope_theta, family.local_rope_theta), sizes["max_positions"])
    window, sliding_layers = read_window(reader, family.window, num_layers or 0)
    experts = read_experts(reader, family.experts, num_layers or 0, sizes["ffn_hidden_size"])
    reader.drop_neutral(neutral_values(family, qkv_bias=qkv_bias))
    reader.problems += [
        Problem(key, f"= {value!r} is not supported for {model_type}; remove it if it has no effect on the model")
        for key, value in sorted(reader.left.items())
    ]
    if not reader.problems:
        _fit_heads(reader, sizes)
    if reader.problems or rope is None:
        return None
    return cls(
        model_type=model_type,
        num_layers=num_layers,
        activation=family.activation[1],
        rope=rope,
        local_rope=local_rope if sliding_layers else None,
        attention_scale=None if pre_attn is None else pre_attn**-0.5,
        qkv_bias=qkv_bias,
        qk_norm=family.qk_norm,
        zero_centered_norms=family.zero_centered_norms,
        sandwich_norms=family.sandwich_norms,
        embedding_scale=sizes["hidden_size"] ** 0.5 if family.scaled_embedding else None,
        sliding_window=window,
        sliding_layers=sliding_layers,
        experts=experts,
        **sizes,
    )


def _take_qkv_bias(reader: ConfigReader, family: Family) -> bool:
    if family.qkv_bias_key is None:
        return family.qkv_bias
    return bool(reader.take(family.qkv_bias_key, bool, family.qkv_bias))


def _require_supported(reader: ConfigReader, family: Family) -> None:
    """Take the keys that change nothing, and those of which one value is implemented."""
    for key in family.inert:
        reader.left.pop(key, None)
    for key, supported in {**_FIXED, **family.fixed}.items():
        reader.require(key, supported)
    for key in _QUANTIZATION_KEYS:
        if key in reader.left:
            remedy = "use the model's files in 16 or 32 bits"
            reader.note(key, f"= {reader.left.pop(key)!r} says that the weights are quantized; {remedy}")
    key, activation = family.activation
    reader.require(key, *ACTIVATION_NAMES[activation])
    for key in DROPOUT_KEYS:
        reader.drop_probability(key)


def _take_num_layers(reader: ConfigReader) -> Any:
    num_layers = reader.take("num_hidden_layers", int)
    if num_layers is not None and num_layers > _MOST_LAYERS:
        reader.note("num_hidden_layers", f"must be at most {_MOST_LAYERS}, got {num_layers}")
        return None
    return num_layers


def _take_sizes(reader: ConfigReader, family: Family) -> dict[str, Any]:
    num_heads = reader.take("num_attention_heads", int)
    # JSON null means one group for each query head, and a head's share of the width; only an absent key means the
    # family's default.
    default_groups = None if "num_key_value_heads" in reader.nulls else family.num_key_value_heads
    default_head_dim = None if "head_dim" in reader.nulls else family.head_dim
    return {
        "num_heads": num_heads,
        "hidden_size": reader.take("hidden_size", int),
        "ffn_hidden_size": reader.take("intermediate_size", int),
        "vocab_size": reader.take("vocab_size", int),
        "max_positions": _take_max_positions(reader),
        "norm_eps": reader.take("rms_norm_eps", float, family.norm_eps),
        "init_std": reader.take("initializer_range", float, 0.02),
        "tie_embeddings": reader.take("tie_word_embeddings", bool, family.tie_embeddings),
        "num_query_groups": reader.take("num_key_value_heads", int, default_groups or num_heads),
        "head_dim": reader.take("head_dim", int, default_head_dim),
    }


def _take_max_positions(reader: ConfigReader) -> int | None:
    longest = reader.take("max_position_embeddings", int)
    # Attention in chunks is full attention as long as a text ends within the first one.
    chunks = reader.take("dual_chunk_attention_config", dict, None)
    if chunks is None or longest is None:
        return longest
    inner = ConfigReader(chunks)
    size, local = (inner.take(key, int) for key in ("chunk_size", "local_size"))
    pretrained = inner.take("original_max_position_embeddings", int, longest)
    for key, value in sorted(inner.left.items()):
        inner.note(key, f"= {value!r} is not supported; remove it if it has no effect on the model")
    if not inner.problems and size <= local:
        inner.note("local_size", f"{local} must be less than chunk_size {size}")
    reader.problems += [problem.under("dual_chunk_attention_config") for problem in inner.problems]
    return None if inner.problems else min(longest, pretrained, size - local)


def _fit_heads(reader: ConfigReader, sizes: dict[str, Any]) -> None:
    """Fill an absent head size in, and note sizes that do not divide each other."""
    num_heads, hidden_size, num_groups = sizes["num_heads"], sizes["hidden_size"], sizes["num_query_groups"]
    if sizes["head_dim"] is None:
        if hidden_size % num_heads:
            reader.note("num_attention_heads", f"{num_heads} must divide hidden_size {hidden_size}")
        sizes["head_dim"] = hidden_size // num_heads
    if sizes["head_dim"] % 2 and not reader.problems:
        reader.note("head_dim", f"{sizes['head_dim']} must be even, since rotary embeddings turn pairs")
    if num_heads % num_groups:
        reader.note("num_key_value_heads", f"{num_groups} must divide num_attention_heads {num_heads}")
