"""Rotary position embeddings, and what a `config.json` says about them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref.run.architecture.config_reader import ConfigReader

_ROPE_KEYS: dict[str, set[str]] = {
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

    transformers 5 writes `rope_parameters`, older files have `rope_theta` and `rope_scaling`. Gemma's `rope_parameters`
    hold one object per kind of layer, and its older files scale the full layers only.

    Args:
        reader: the model's config; problems go there.
        default_thetas: what an absent theta means, for either rope; the second is None without a second rope.
        max_positions: what an absent `original_max_position_embeddings` means.

    Returns:
        The two ropes; None for one that could not be read, or that the family does not have.
    """
    full_theta, local_theta = default_thetas
    reader.require("partial_rotary_factor", 1.0)
    newer, older = reader.left.pop("rope_parameters", None), reader.left.pop("rope_scaling", None)
    if local_theta is None:
        settings = {"rope_parameters": newer, "rope_scaling": older}
        return _read_rope(reader, settings, ("rope_theta", full_theta), max_positions), None
    by_kind = newer if isinstance(newer, dict) else {}
    if newer is not None and not isinstance(newer, dict):
        reader.note("rope_parameters", f"must be an object, got {newer!r}")
    unknown = sorted(set(by_kind) - {"full_attention", "sliding_attention"})
    if unknown:
        reader.note("rope_parameters", f"must hold full_attention and sliding_attention, got {', '.join(unknown)}")
    full = {"rope_parameters.full_attention": by_kind.get("full_attention"), "rope_scaling": older}
    local = {"rope_parameters.sliding_attention": by_kind.get("sliding_attention")}
    return (
        _read_rope(reader, full, ("rope_theta", full_theta), max_positions),
        _read_rope(reader, local, ("rope_local_base_freq", local_theta), max_positions),
    )


def _read_rope(
    reader: ConfigReader, settings: dict[str, Any], default_theta: tuple[str, float], max_positions: int | None
) -> Rope | None:
    """Read one rope from the objects that may describe it, by key; where several do they must say the same.

    `default_theta` is the key beside these objects that gives theta where they do not, and what its absence means.
    """
    theta_key, default = default_theta
    theta = reader.take(theta_key, float, None)
    # an empty object says as much as an absent one
    given = {key: value for key, value in settings.items() if value is not None and value != {}}
    ropes = []
    for key, value in (given or {theta_key: {}}).items():
        if not isinstance(value, dict):
            reader.note(key, f"must be an object, got {value!r}")
            continue
        inner = ConfigReader(value)
        rope = _read_settings(inner, theta or default, max_positions)
        if rope is not None and theta is not None and rope.theta != theta:
            inner.note("rope_theta", f"is {rope.theta} here and {theta} in {theta_key} beside it; keep one")
        reader.problems += [problem.under(key) for problem in inner.problems]
        ropes.append(rope)
    if len(given) > 1 and None not in ropes and len(set(ropes)) > 1:
        first, second = given
        reader.note(first, f"{given[first]} and {second} {given[second]} contradict each other; keep one")
    return ropes[0] if ropes else None


def _read_settings(inner: ConfigReader, default_theta: float, max_positions: int | None) -> Rope | None:
    """Read an object that describes a rope; problems go to `inner`, which holds it."""
    older_kind = inner.take("type", str, None)
    kind = inner.take("rope_type", str, older_kind or "default")
    if older_kind is not None and kind is not None and kind != older_kind:
        inner.note("rope_type", f"{kind!r} and type {older_kind!r} contradict each other; keep one")
    theta = inner.take("rope_theta", float, default_theta)
    inner.require("partial_rotary_factor", 1.0)
    if kind not in _ROPE_KEYS:
        if kind is not None:
            inner.note("rope_type", f"must be one of {', '.join(_ROPE_KEYS)}, got {kind!r}")
        return None
    if kind == "default":
        inner.drop_neutral({"factor": (1,)})
    if kind != "llama3":
        # the length of pretraining, which these two do not compute with
        inner.take("original_max_position_embeddings", int, None)
    values = {}
    for key in sorted(_ROPE_KEYS[kind]):
        is_length = key == "original_max_position_embeddings"
        field = "original_max_positions" if is_length else key
        values[field] = inner.take(key, int if is_length else float, max_positions if is_length else ...)
    for key, value in sorted(inner.left.items()):
        inner.note(key, f"= {value!r} is not supported; remove it if it has no effect on the model")
    if not inner.problems and kind == "llama3" and values["low_freq_factor"] >= values["high_freq_factor"]:
        inner.note("low_freq_factor", f"must be < high_freq_factor, got {values}")
    return None if inner.problems else Rope(theta, kind, **values)
