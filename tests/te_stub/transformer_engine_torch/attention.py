"""Attention as cuDNN computes it: one softmax per row of queries, whose logarithm of the sum is kept for the backward.

Layouts: SBHD, BSHD and THD, the last with room between sequences. Dims: S queries, K keys, H heads of queries, G heads
of keys and values, H a multiple of G, D features. What is not covered (FP8, dropout, biases, softmax offsets, paged
keys, maximal logits) raises by name.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transformer_engine_torch.enums import DType, NVTE_Fused_Attn_Backend, named_values
from transformer_engine_torch.python_code import bind

__all__ = [
    "NVTE_Bias_Type",
    "NVTE_Mask_Type",
    "NVTE_QKV_Format",
    "NVTE_QKV_Layout",
    "NVTE_Softmax_Type",
    "fused_attn_bwd",
    "fused_attn_fwd",
    "get_fused_attn_backend",
]

NVTE_QKV_Layout = named_values("NVTE_QKV_Layout")
NVTE_QKV_Format = named_values("NVTE_QKV_Format")
NVTE_Bias_Type = named_values("NVTE_Bias_Type")
NVTE_Mask_Type = named_values("NVTE_Mask_Type")
NVTE_Softmax_Type = named_values("NVTE_Softmax_Type")

_FP8 = (DType.kFloat8E4M3, DType.kFloat8E5M2)
_MAX_FEATURES = 256


def get_fused_attn_backend(*args: Any) -> Any:
    """Whose kernels a Hopper takes: those for 16 bits and heads of 8, 16, ... or 256 features, or those for FP8.

    Args:
        args: the numbers of the attention one by one, or one object that has them (newer releases).

    Returns:
        The backend, and with one object a reason why it is none.
    """
    if len(args) == 1:
        features, dtype = (args[0].head_dim_qk, args[0].head_dim_v), args[0].qkv_dtype
    else:
        given = bind("get_fused_attn_backend", args)
        features, dtype = (given["head_dim_qk"], given["head_dim_v"]), given["q_type"]
    backend, reason = NVTE_Fused_Attn_Backend.NVTE_No_Backend, ""
    if int(dtype) in _FP8:
        backend = NVTE_Fused_Attn_Backend.NVTE_FP8
    elif int(dtype) not in (DType.kFloat16, DType.kBFloat16):
        reason = "queries, keys and values are not of 16 bits"
    elif any(number % 8 or number > _MAX_FEATURES for number in features):
        reason = f"heads have {features} features, not a multiple of 8 up to {_MAX_FEATURES}"
    else:
        backend = NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen
    return (backend, reason) if len(args) == 1 else backend


def fused_attn_fwd(*args: Any) -> list[Tensor]:
    """Attend.

    Returns:
        The output, like the queries with the features of the values, 0 where there is no query or no key; the logarithm
        of each row's sum of exponentials, fp32, [B, H, S, 1] or, for THD, [T, H, 1]; the state of the random numbers.
        The logarithm is -inf for a query without keys and 0 where there is no query.
    """
    given = bind("fused_attn_fwd", args)
    _refuse("fused_attn_fwd", given)
    q, k, v = given["q"], given["k"], given["v"]
    out = torch.zeros((*q.shape[:-1], v.shape[-1]), dtype=q.dtype)
    stats = _empty_stats(q, _formats(given)[0])
    for queries, keys in _sequences(given):
        scores = _scores(queries.of(q), keys.of(k), given)
        lse = scores.logsumexp(-1)
        queries.of(out).copy_(_weights(scores, lse) @ _for_queries(keys.of(v), q.shape[-2]))
        queries.of_stats(stats).copy_(lse)
    return [out, stats, torch.zeros(2, dtype=torch.int64)]


def fused_attn_bwd(*args: Any) -> list[Tensor | None]:
    """Return the gradients of queries, keys and values, in their dtypes, None and None.

    It takes the output and the logarithms of the sums as they are given: with context parallelism they are those over
    the keys of all ranks, of which it is handed some.
    """
    given = bind("fused_attn_bwd", args)
    _refuse("fused_attn_bwd", given)
    q, k, v, stats = given["q"], given["k"], given["v"], given["aux_ctx_tensors"][0]
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype) for x in (q, k, v))
    for queries, keys in _sequences(given):
        weights = _weights(_scores(queries.of(q), keys.of(k), given), queries.of_stats(stats))
        grad, out = queries.of(given["d_o"]).float(), queries.of(given["o"]).float()
        grad_weights = grad @ _for_queries(keys.of(v), q.shape[-2]).mT
        grad_scores = weights * (grad_weights - (grad * out).sum(-1, keepdim=True)) * given["attn_scale"]
        queries.of(dq).copy_(grad_scores @ _for_queries(keys.of(k), q.shape[-2]))
        keys.of(dk).copy_(_sum_over_group(grad_scores.mT @ queries.of(q).float(), k.shape[-2]))
        keys.of(dv).copy_(_sum_over_group(weights.mT @ grad, v.shape[-2]))
    return [dq, dk, dv, None, None]


class _Rows(NamedTuple):
    """The rows of one sequence."""

    layout: str
    batch: int
    first: int
    end: int

    def of(self, tensor: Tensor) -> Tensor:
        """[heads, rows, features], a view."""
        if self.layout == "THD":
            rows = tensor[self.first : self.end]
        elif self.layout == "SBHD":
            rows = tensor[self.first : self.end, self.batch]
        else:
            rows = tensor[self.batch, self.first : self.end]
        return rows.transpose(0, 1)

    def of_stats(self, stats: Tensor) -> Tensor:
        """[heads, rows], a view."""
        if self.layout == "THD":
            return stats[self.first : self.end, :, 0].t()
        return stats[self.batch, :, self.first : self.end, 0]


def _empty_stats(q: Tensor, layout: str) -> Tensor:
    if layout == "THD":
        return torch.zeros((*q.shape[:2], 1), dtype=torch.float32)
    batch, length = q.shape[:2] if layout == "BSHD" else (q.shape[1], q.shape[0])
    return torch.zeros((batch, q.shape[2], length, 1), dtype=torch.float32)


def _sequences(given: dict[str, Any]) -> Iterator[tuple[_Rows, _Rows]]:
    """The rows of queries and those of keys of each sequence, without padding."""
    query_layout, key_layout = _formats(given)
    all_queries = _rows(query_layout, given["q"], given["cu_seqlens_q"], given["cu_seqlens_q_padded"], given)
    all_keys = _rows(key_layout, given["k"], given["cu_seqlens_kv"], given["cu_seqlens_kv_padded"], given)
    for queries, keys in zip(all_queries, all_keys, strict=True):
        if queries.end > queries.first:
            yield queries, keys


def _rows(
    layout: str, tensor: Tensor, cu_seqlens: Tensor, cu_seqlens_padded: Tensor | None, given: dict[str, Any]
) -> list[_Rows]:
    lengths = cu_seqlens.diff().tolist()
    if layout == "THD":
        starts = (cu_seqlens if cu_seqlens_padded is None else cu_seqlens_padded)[:-1].tolist()
    else:
        starts = [0] * tensor.shape[1 if layout == "SBHD" else 0]
        if "PADDING" not in _mask_name(given):
            lengths = [tensor.shape[0 if layout == "SBHD" else 1]] * len(starts)
    pairs = zip(starts, lengths, strict=True)
    return [_Rows(layout, batch, start, start + length) for batch, (start, length) in enumerate(pairs)]


def _scores(queries: Tensor, keys: Tensor, given: dict[str, Any]) -> Tensor:
    """[H, S, K] in fp32, -inf where a query does not see a key."""
    scores = queries.float() @ _for_queries(keys, queries.shape[0]).mT * given["attn_scale"]
    mask = _mask_name(given)
    from_end = given.get("bottom_right_diagonal")
    if from_end is None:
        from_end = "BOTTOM_RIGHT" in mask
    num_queries, num_keys = scores.shape[-2:]
    own = torch.arange(num_queries)[:, None] + (num_keys - num_queries if from_end else 0)
    distance = torch.arange(num_keys) - own
    left, right = given["window_size"]
    right = 0 if "CAUSAL" in mask else right
    hidden = torch.zeros(num_queries, num_keys, dtype=torch.bool)
    if left >= 0:
        hidden |= distance < -left
    if right >= 0:
        hidden |= distance > right
    return scores.masked_fill(hidden, float("-inf"))


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    """The softmax, given the logarithm of its sum; 0 for a query without keys."""
    return (scores - lse[..., None]).exp().masked_fill(scores == float("-inf"), 0.0)


def _for_queries(values: Tensor, num_heads: int) -> Tensor:
    """[G, K, D] as [H, K, D] in fp32."""
    return values.float().repeat_interleave(num_heads // values.shape[0], dim=0)


def _sum_over_group(values: Tensor, num_groups: int) -> Tensor:
    """[H, K, D] as [G, K, D]."""
    return values.unflatten(0, (num_groups, -1)).sum(1)


def _mask_name(given: dict[str, Any]) -> str:
    return NVTE_Mask_Type.name_of(given["attn_mask_type"])


def _formats(given: dict[str, Any]) -> tuple[str, str]:
    """Where the dimensions of queries and of keys lie, out of a name such as NVTE_SBHD_SB2HD."""
    parts = NVTE_QKV_Layout.name_of(given["qkv_layout"]).removeprefix("NVTE_").split("_")
    formats = [part.replace("2", "").replace("3", "") for part in parts]
    if not set(formats) <= {"SBHD", "BSHD", "THD"}:
        raise NotImplementedError(f"attention in the layout {'_'.join(parts)} has no stand-in for the CPU")
    return formats[0], formats[-1]


def _refuse(function: str, given: dict[str, Any]) -> None:
    """Raise for what is not covered."""
    layout, absent = _formats(given)[0], object()
    same_layout = (f"NVTE_{layout}", "NVTE_QKV_Format_NOT_SET")
    for name in ("o_format", "do_format"):
        if name in given and NVTE_QKV_Format.name_of(given[name]) not in same_layout:
            raise NotImplementedError(f"{function}: {name} must be that of the queries in the stand-in for the CPU")
    if given.get("dqkv_layout", given["qkv_layout"]) != given["qkv_layout"]:
        raise NotImplementedError(f"{function}: dqkv_layout must be qkv_layout in the stand-in for the CPU")
    if layout == "THD" and "PADDING" not in _mask_name(given):
        raise ValueError(f"{function}: THD needs a mask with padding, got {_mask_name(given)}")
    plain = {
        "attn_bias_type": NVTE_Bias_Type.NVTE_NO_BIAS,
        "softmax_type": NVTE_Softmax_Type.NVTE_VANILLA_SOFTMAX,
        "dropout": 0.0,
        "page_table_k": None,
        "s_quantizer": None,
        "o_quantizer": None,
        "dp_quantizer": None,
        "dqkv_quantizer": None,
        "return_max_logit": False,
    }
    for name, value in plain.items():
        if given.get(name, absent) not in (absent, value):
            raise NotImplementedError(f"{function}: {name} has no stand-in for the CPU, got {given[name]}")
