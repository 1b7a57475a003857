"""What a Hugging Face `config.json` says about a model, with nothing left over.

Every key is either honoured, known to have no effect on training, or refused by name: a setting that changes
the forward pass and is skipped in silence would train another model than the one that was asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref.errors import ConfigError

# Keys without effect on the weights or the forward pass of training.
INERT_KEYS = frozenset(
    {
        "_attn_implementation_autoset",
        "_name_or_path",
        "architectures",
        "bos_token_id",
        "chunk_size_feed_forward",
        "cls_token_id",
        "decoder_start_token_id",
        "dtype",
        "eos_token_id",
        "finetuning_task",
        "id2label",
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "prefix",
        "pretraining_tp",
        "problem_type",
        "return_dict",
        "sep_token_id",
        "task_specific_params",
        "tokenizer_class",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "unk_token_id",
        "unsloth_fixed",
        "unsloth_version",
        "use_cache",
    }
)
_ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


class Rope(NamedTuple):
    """Rotary position embedding; `kind` is one of "default", "linear", "llama3"."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def inv_freq(self, head_dim: int) -> Tensor:
        """Compute the angles per position, fp32 [head_dim / 2].

        Equals: `transformers.modeling_rope_utils`, bit for bit.
        Source: Su et al., "RoFormer"; Chen et al., "Extending context window ... via positional interpolation"
        (linear); the Llama 3.1 reference code (llama3).
        """
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        inv_freq = 1.0 / (self.theta**exponents)
        if self.kind == "linear":
            return inv_freq / self.factor
        if self.kind == "llama3":
            # Waves longer than the original context are stretched, short ones stay, those between are blended.
            turns = self.original_max_positions / (2 * math.pi / inv_freq)
            keep = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            keep = keep.clamp(0.0, 1.0)
            return (1 - keep) * inv_freq / self.factor + keep * inv_freq
        return inv_freq


class _Family(NamedTuple):
    """How a model type differs from Llama, and the defaults that transformers gives to absent keys."""

    qkv_bias: bool = False
    qk_norm: bool = False
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    sliding_window: int | None = None
    keys: tuple[str, ...] = ()


_QWEN_KEYS = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
FAMILIES = {
    "llama": _Family(),
    "mistral": _Family(num_key_value_heads=8, sliding_window=4096, keys=("sliding_window",)),
    "qwen2": _Family(qkv_bias=True, num_key_value_heads=32, sliding_window=4096, keys=_QWEN_KEYS),
    "qwen3": _Family(qk_norm=True, num_key_value_heads=32, head_dim=128, sliding_window=4096, keys=_QWEN_KEYS),
}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder-only model of one of the supported families."""

    model_type: str
    """llama, mistral, qwen2 or qwen3."""
    num_layers: int
    """Transformer layers."""
    hidden_size: int
    """Width of the residual stream."""
    ffn_hidden_size: int
    """Width of the gated feed-forward layer."""
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
    rope: Rope
    """Rotary position embedding."""
    tie_embeddings: bool
    """The output projection is the embedding."""
    qkv_bias: bool
    """Query, key and value projections have a bias."""
    qk_norm: bool
    """Query and key heads are RMS-normed."""
    sliding_window: int | None
    """Positions that a sliding layer sees, itself included."""
    sliding_layers: tuple[bool, ...]
    """Which layers use the sliding window; empty for none."""
    init_std: float
    """Standard deviation of random initial weights."""

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Architecture:
        """Translate the contents of a `config.json`.

        Raises:
            ConfigError: the family or a setting is not supported, or a key is missing or of the wrong type;
                the message lists everything at once.
        """
        if config.get("auto_map"):
            raise ConfigError(
                "auto_map asks for Python code of the model's own, which never runs here; use a plain model"
            )
        family = FAMILIES.get(config.get("model_type", ""))
        if family is None:
            raise ConfigError(f"model_type must be one of {', '.join(FAMILIES)}, got {config.get('model_type')!r}")
        reader = _Reader(config)
        reader.take("model_type", str)
        architecture = _read(cls, reader, config["model_type"], family)
        if architecture is None:
            raise ConfigError("config.json: " + "; ".join(reader.problems))
        return architecture


class _Reader:
    """Takes keys out of a config one by one and remembers what was wrong."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.left = {key: value for key, value in config.items() if value is not None and key not in INERT_KEYS}
        self.nulls = {key for key, value in config.items() if value is None}
        self.problems: list[str] = []

    def take(self, key: str, kind: type, default: Any = ...) -> Any:
        value = self.left.pop(key, default)
        if value is ...:
            self.problems.append(f"{key} is missing")
            return None
        good = isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) == (kind is bool)
        if value is not default and not good:
            self.problems.append(f"{key} must be of type {kind.__name__}, got {value!r}")
            return None
        if value is not None and kind in (int, float) and not 0 < value < math.inf:
            self.problems.append(f"{key} must be a finite number > 0, got {value!r}")
            return None
        return value

    def require(self, key: str, supported: Any) -> None:
        value = self.left.pop(key, supported)
        if value != supported:
            self.problems.append(f"{key} must be {supported!r}, got {value!r}: other values are not implemented")


def _read(cls: type[Architecture], reader: _Reader, model_type: str, family: _Family) -> Architecture | None:
    for key, supported in (
        ("hidden_act", "silu"),
        ("attention_bias", False),
        ("mlp_bias", False),
        ("attention_dropout", 0),
        ("quantization_config", None),
    ):
        reader.require(key, supported)
    num_layers, num_heads = reader.take("num_hidden_layers", int), reader.take("num_attention_heads", int)
    hidden_size = reader.take("hidden_size", int)
    sizes = {
        "ffn_hidden_size": reader.take("intermediate_size", int),
        "vocab_size": reader.take("vocab_size", int),
        "max_positions": reader.take("max_position_embeddings", int),
        "norm_eps": reader.take("rms_norm_eps", float, 1e-6),
        "init_std": reader.take("initializer_range", float, 0.02),
        "tie_embeddings": reader.take("tie_word_embeddings", bool, False),
        "num_query_groups": reader.take("num_key_value_heads", int, family.num_key_value_heads or num_heads),
        "head_dim": reader.take("head_dim", int, family.head_dim),
    }
    rope = _read_rope(reader, sizes["max_positions"])
    window, sliding_layers = _read_window(reader, family, num_layers or 0)
    reader.problems += [
        f"{key} = {reader.left[key]!r} is not supported for {model_type}; remove it if it has no effect on the model"
        for key in sorted(reader.left)
    ]
    if not reader.problems:
        if sizes["head_dim"] is None:
            if hidden_size % num_heads:
                reader.problems.append(f"num_attention_heads {num_heads} must divide hidden_size {hidden_size}")
            sizes["head_dim"] = hidden_size // num_heads
        if num_heads % sizes["num_query_groups"]:
            reader.problems.append(
                f"num_key_value_heads {sizes['num_query_groups']} must divide num_attention_heads {num_heads}"
            )
    if reader.problems or rope is None:
        return None
    return cls(
        model_type=model_type,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        rope=rope,
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        sliding_window=window,
        sliding_layers=sliding_layers,
        **sizes,
    )


def _read_rope(reader: _Reader, max_positions: int | None) -> Rope | None:
    """`rope_parameters` of transformers 5, or `rope_theta` and `rope_scaling` of older files."""
    theta = reader.take("rope_theta", float, None)
    current, older = reader.left.pop("rope_parameters", None), reader.left.pop("rope_scaling", None)
    if current and older and current != older:
        reader.problems.append(f"rope_parameters {current} and rope_scaling {older} contradict each other; keep one")
    settings = current or older or {}
    if not isinstance(settings, dict):
        reader.problems.append(f"rope_parameters must be an object, got {settings!r}")
        return None
    inner = _Reader(settings)
    kind = inner.take("type", str, None)
    kind = inner.take("rope_type", str, kind or "default")
    inner_theta = inner.take("rope_theta", float, theta or 10000.0)
    inner.left.setdefault("partial_rotary_factor", reader.left.pop("partial_rotary_factor", 1.0))
    inner.require("partial_rotary_factor", 1.0)
    if kind not in _ROPE_KEYS:
        inner.problems.append(f"rope_type must be one of {', '.join(_ROPE_KEYS)}, got {kind!r}")
        inner.left.clear()
    values = {}
    for key in sorted(_ROPE_KEYS.get(kind, ())):
        is_length = key == "original_max_position_embeddings"
        field = "original_max_positions" if is_length else key
        values[field] = inner.take(key, int if is_length else float, max_positions if is_length else ...)
    if theta is not None and inner_theta != theta:
        inner.problems.append(f"rope_theta is {inner_theta} here and {theta} outside")
    inner.problems += [f"{key} = {value!r} is not supported" for key, value in sorted(inner.left.items())]
    if not inner.problems and kind == "llama3" and values["low_freq_factor"] >= values["high_freq_factor"]:
        inner.problems.append(f"low_freq_factor must be < high_freq_factor, got {values}")
    reader.problems += [f"rope_parameters: {problem}" for problem in inner.problems]
    return None if inner.problems else Rope(inner_theta, kind, **values)


def _read_window(reader: _Reader, family: _Family, num_layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """Sliding-window attention: all layers of Mistral, the layers that Qwen names."""
    if "sliding_window" not in family.keys:
        return None, ()
    # JSON null switches the window off; only an absent key means the default.
    window = reader.take("sliding_window", int, None if "sliding_window" in reader.nulls else family.sliding_window)
    if "use_sliding_window" not in family.keys:
        return window, (True,) * num_layers if window else ()
    in_use = reader.take("use_sliding_window", bool, False)
    first = reader.left.pop("max_window_layers", 28)
    if not isinstance(first, int) or isinstance(first, bool) or first < 0:
        reader.problems.append(f"max_window_layers must be a whole number >= 0, got {first!r}")
        first = 0
    kinds = reader.take("layer_types", list, None)
    if kinds is None:
        num_full = first if in_use and window else num_layers
        kinds = ["full_attention"] * min(num_full, num_layers) + ["sliding_attention"] * (num_layers - num_full)
    if len(kinds) != num_layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
        reader.problems.append(
            f"layer_types must name full_attention or sliding_attention for {num_layers} layers, got {kinds}"
        )
    sliding = tuple(kind == "sliding_attention" for kind in kinds)
    if any(sliding) and not (in_use and window):
        reader.problems.append("layer_types names sliding_attention, but use_sliding_window or sliding_window is off")
    return (window, sliding) if any(sliding) else (None, ())
