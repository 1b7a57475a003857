"""Rotary position embeddings, and what a `config.json` says about them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.errors import Problem
from fastpref.run.architecture.config_reader import ConfigReader

_ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


class Rope(NamedTuple):
    """Rotary position embedding; `kind` is one of "default", "linear", "llama3".

    Checkpoints record it as a list: a further field comes last and has a default.
    """

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
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim
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


def read_ropes(
    reader: ConfigReader, default_thetas: tuple[float, float | None], max_positions: int | None
) -> tuple[Rope | None, Rope | None]:
    """Read the rope of a model and, in families that have one, the rope of its sliding layers.

    Gemma's `rope_parameters` hold one object per kind of layer; older files scale the full layers only.

    Args:
        reader: the model's config; problems go there.
        default_thetas: what an absent theta means, for either rope; the second is None without a second rope.
        max_positions: what an absent `original_max_position_embeddings` means.

    Returns:
        The two ropes; None for one that could not be read, or that the family does not have.
    """
    full_theta, local_theta = default_thetas
    if local_theta is None:
        return _read_rope(reader, max_positions, full_theta), None
    by_kind = reader.take("rope_parameters", dict, {}) or {}
    unknown = sorted(set(by_kind) - {"full_attention", "sliding_attention"})
    if unknown:
        reader.note("rope_parameters", f"must hold full_attention and sliding_attention, got {', '.join(unknown)}")
    full = {key: reader.left.pop(key, None) for key in ("rope_theta", "rope_scaling")}
    local = {"rope_theta": reader.left.pop("rope_local_base_freq", None)}
    ropes = []
    for kind, older, theta in (
        ("full_attention", full, full_theta),
        ("sliding_attention", local, local_theta),
    ):
        inner = ConfigReader({**older, "rope_parameters": by_kind.get(kind)})
        ropes.append(_read_rope(inner, max_positions, theta))
        reader.problems += [problem.under(kind) for problem in inner.problems]
    return ropes[0], ropes[1]


def _read_rope(reader: ConfigReader, max_positions: int | None, default_theta: float) -> Rope | None:
    """`rope_parameters` of transformers 5, or `rope_theta` and `rope_scaling` of older files."""
    theta = reader.take("rope_theta", float, None)
    current, older = reader.left.pop("rope_parameters", None), reader.left.pop("rope_scaling", None)
    if current and older and current != older:
        reader.note("rope_parameters", f"{current} and rope_scaling {older} contradict each other; keep one")
    settings = current or older or {}
    if not isinstance(settings, dict):
        reader.note("rope_parameters", f"must be an object, got {settings!r}")
        return None
    inner = ConfigReader(settings)
    kind = inner.take("type", str, None)
    kind = inner.take("rope_type", str, kind or "default")
    inner_theta = inner.take("rope_theta", float, theta or default_theta)
    inner.left.setdefault("partial_rotary_factor", reader.left.pop("partial_rotary_factor", 1.0))
    inner.require("partial_rotary_factor", 1.0)
    if kind not in _ROPE_KEYS:
        inner.note("rope_type", f"must be one of {', '.join(_ROPE_KEYS)}, got {kind!r}")
        inner.left.clear()
    values = {}
    for key in sorted(_ROPE_KEYS.get(kind, ())):
        is_length = key == "original_max_position_embeddings"
        field = "original_max_positions" if is_length else key
        values[field] = inner.take(key, int if is_length else float, max_positions if is_length else ...)
    if theta is not None and inner_theta != theta:
        inner.note("rope_theta", f"is {inner_theta} here and {theta} outside")
    inner.problems += [Problem(key, f"= {value!r} is not supported") for key, value in sorted(inner.left.items())]
    if not inner.problems and kind == "llama3" and values["low_freq_factor"] >= values["high_freq_factor"]:
        inner.note("low_freq_factor", f"must be < high_freq_factor, got {values}")
    reader.problems += [problem.under("rope_parameters") for problem in inner.problems]
    return None if inner.problems else Rope(inner_theta, kind, **values)
