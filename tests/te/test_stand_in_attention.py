"""Transformer Engine's attention, over the stand-in, computes what torch does: layouts, masks, windows, packed rows."""

import inspect
from typing import Any

import pytest
import torch
from stand_in import (
    DTYPES,
    assert_same,
    attend,
    attention_in_fp32,
    module_with_gradients,
    numbers,
    transformer_engine,
    visible_keys,
    with_gradients,
)
from torch import Tensor

te = transformer_engine()
import transformer_engine_torch as tex  # noqa: E402
from transformer_engine.pytorch.attention.dot_product_attention import utils  # noqa: E402
from transformer_engine.pytorch.attention.dot_product_attention.softmax import FusedScaleMaskSoftmax  # noqa: E402
from transformer_engine.pytorch.cpp_extensions import fused_attn  # noqa: E402

HEADS, GROUPS, SIZE, BATCH, SCALE = 4, 2, 8, 2, 0.31
TO_HEADS = {"sbhd": (1, 2, 0, 3), "bshd": (0, 2, 1, 3)}
FROM_HEADS = {"sbhd": (2, 0, 1, 3), "bshd": (0, 2, 1, 3)}


def attention(layout: str, mask: str, window: tuple[int, int] | None = None, groups: int = GROUPS) -> Any:
    return te.DotProductAttention(
        HEADS,
        SIZE,
        num_gqa_groups=groups,
        qkv_format=layout,
        attn_mask_type=mask,
        window_size=window,
        softmax_scale=SCALE,
        attention_dropout=0.0,
    )


def rows(layout: str, length: int, heads: int, seed: int, dtype: torch.dtype) -> Tensor:
    shape = (length, BATCH) if layout == "sbhd" else (BATCH, length)
    return numbers(*shape, heads, SIZE, seed=seed, dtype=dtype)


MASKS = [
    ("causal", 12, None),
    ("no_mask", 20, None),
    ("causal_bottom_right", 20, None),
    ("causal", 12, (3, 0)),
    ("causal_bottom_right", 20, (3, 0)),
    ("no_mask", 20, (3, 1)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", TO_HEADS)
@pytest.mark.parametrize("groups", [1, GROUPS, HEADS])
@pytest.mark.parametrize(("mask", "num_keys", "window"), MASKS)
def test_attention_is_torchs(
    dtype: torch.dtype, layout: str, groups: int, mask: str, num_keys: int, window: tuple[int, int] | None
) -> None:
    """In 16 bits through the fused kernels, in fp32 through Transformer Engine's own products."""
    inputs = {
        "q": rows(layout, 12, HEADS, 1, dtype),
        "k": rows(layout, num_keys, groups, 2, dtype),
        "v": rows(layout, num_keys, groups, 3, dtype),
    }
    visible = visible_keys(12, num_keys, mask, window or (-1, -1))

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output = attend(*(x.permute(TO_HEADS[layout]) for x in (q, k, v)), visible, SCALE)
        return output.permute(FROM_HEADS[layout]).flatten(-2)

    found = module_with_gradients(attention(layout, mask, window, groups), inputs)
    assert_same(found, plain, inputs)


def packed(
    q: Tensor, k: Tensor, v: Tensor, starts: list[int], lengths: list[int], window: tuple[int, int] = (-1, -1)
) -> Tensor:
    """Attention within each sequence of [T, heads, D], 0 between them."""
    output = torch.zeros_like(q)
    for start, length in zip(starts, lengths, strict=True):
        own = slice(start, start + length)
        visible = visible_keys(length, length, "causal", window)
        output[own] = attend(*(x[own].transpose(0, 1) for x in (q, k, v)), visible, SCALE).transpose(0, 1)
    return output.flatten(-2)


def ends(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [(-1, -1), (3, 0)], ids=["whole", "window"])
@pytest.mark.parametrize("lengths", [[5, 1, 9], [15]], ids=str)
def test_attention_of_packed_rows_stays_within_sequences(
    dtype: torch.dtype, window: tuple[int, int], lengths: list[int]
) -> None:
    inputs = queries_keys_values(15, dtype)
    starts = ends(lengths)[:-1].tolist()

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return packed(q, k, v, starts, lengths, window)

    layer = attention("thd", "padding_causal", None if window[0] < 0 else window)
    settings = {f"cu_seqlens_{name}": ends(lengths) for name in ("q", "kv")}
    settings |= {f"max_seqlen_{name}": max(lengths) for name in ("q", "kv")}
    with attention_in_fp32():
        found = module_with_gradients(layer, inputs, **settings)
    assert_same(found, plain, inputs)


def queries_keys_values(length: int, dtype: torch.dtype) -> dict[str, Tensor]:
    heads = {"q": HEADS, "k": GROUPS, "v": GROUPS}
    return {name: numbers(length, heads[name], SIZE, seed=seed, dtype=dtype) for seed, name in enumerate(heads)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [(-1, -1), (3, 0)], ids=["whole", "window"])
def test_attention_of_packed_rows_skips_the_room_between_sequences(dtype: torch.dtype, window: tuple[int, int]) -> None:
    """What stands there, NaN too, is seen by nobody, and has an output and gradients of 0."""
    lengths, room = [5, 1, 9], [8, 4, 12]
    starts = ends(room)[:-1].tolist()
    inputs = queries_keys_values(24, dtype)
    between = torch.ones(24, dtype=torch.bool)
    for start, length in zip(starts, lengths, strict=True):
        between[start : start + length] = False
    layer = attention("thd", "padding_causal", None if window[0] < 0 else window)
    settings: dict[str, Any] = {f"cu_seqlens_{name}": ends(lengths) for name in ("q", "kv")}
    settings |= {f"cu_seqlens_{name}_padded": ends(room) for name in ("q", "kv")}
    settings |= {f"max_seqlen_{name}": max(lengths) for name in ("q", "kv")}
    poisoned = {name: x.masked_fill(between[:, None, None], float("nan")) for name, x in inputs.items()}
    with attention_in_fp32():
        found = module_with_gradients(layer, poisoned, pad_between_seqs=True, **settings)

    assert not any(value[between].any() for _, value in found)
    assert_same(found, lambda q, k, v: packed(q, k, v, starts, lengths, window), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", ["padding", "padding_causal_bottom_right"])
def test_queries_of_packed_rows_attend_to_keys_that_begin_and_end_elsewhere(dtype: torch.dtype, mask: str) -> None:
    """The second sequence has no queries, the last no keys."""
    lengths, room = {"q": [3, 0, 4, 2], "kv": [7, 5, 9, 0]}, {"q": [4, 3, 6, 2], "kv": [9, 5, 10, 2]}
    inputs = {
        "q": numbers(sum(room["q"]), HEADS, SIZE, seed=1, dtype=dtype),
        "k": numbers(sum(room["kv"]), GROUPS, SIZE, seed=2, dtype=dtype),
        "v": numbers(sum(room["kv"]), GROUPS, SIZE, seed=3, dtype=dtype),
    }
    settings: dict[str, Any] = {f"cu_seqlens_{name}": ends(lengths[name]) for name in ("q", "kv")}
    settings |= {f"cu_seqlens_{name}_padded": ends(room[name]) for name in ("q", "kv")}
    settings |= {f"max_seqlen_{name}": max(lengths[name]) for name in ("q", "kv")}

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output = torch.zeros_like(q)
        bounds = zip(ends(room["q"]).tolist(), ends(room["kv"]).tolist(), lengths["q"], lengths["kv"], strict=False)
        for first_query, first_key, queries, keys in bounds:
            if queries and keys:
                rows_q, rows_kv = slice(first_query, first_query + queries), slice(first_key, first_key + keys)
                own = (x[rows].transpose(0, 1) for x, rows in ((q, rows_q), (k, rows_kv), (v, rows_kv)))
                output[rows_q] = attend(*own, visible_keys(queries, keys, mask), SCALE).transpose(0, 1)
        return output.flatten(-2)

    with attention_in_fp32():
        found = module_with_gradients(attention("thd", mask, None), inputs, pad_between_seqs=True, **settings)
    assert_same(found, plain, inputs)


@pytest.mark.parametrize("sizes", [(16, SIZE), (SIZE, 16)], ids=str)
def test_values_have_other_features_than_keys(sizes: tuple[int, int]) -> None:
    inputs = {
        "q": numbers(12, BATCH, HEADS, sizes[0], seed=1, dtype=torch.bfloat16),
        "k": numbers(12, BATCH, GROUPS, sizes[0], seed=2, dtype=torch.bfloat16),
        "v": numbers(12, BATCH, GROUPS, sizes[1], seed=3, dtype=torch.bfloat16),
    }
    settings = {"num_gqa_groups": GROUPS, "attn_mask_type": "causal", "attention_dropout": 0.0}

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """At the scale that is taken where none is given."""
        own = (x.permute(TO_HEADS["sbhd"]) for x in (q, k, v))
        output = attend(*own, visible_keys(12, 12, "causal"), sizes[0] ** -0.5)
        return output.permute(FROM_HEADS["sbhd"]).flatten(-2)

    assert_same(module_with_gradients(te.DotProductAttention(HEADS, sizes, **settings), inputs), plain, inputs)


@pytest.mark.parametrize("mask", ["padding", "padding_causal", "padding_causal_bottom_right"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_padded_rows_sees_what_each_row_has(dtype: torch.dtype, mask: str) -> None:
    """The kernels themselves, in fp32 too: sequences of 9 and 12 queries on 13 and 5 keys of 16."""
    num_queries, num_keys = [9, 12], [13, 5]
    inputs = {
        "q": rows("sbhd", 12, HEADS, 1, dtype),
        "k": rows("sbhd", 16, GROUPS, 2, dtype),
        "v": rows("sbhd", 16, GROUPS, 3, dtype),
    }

    sizes = (12, 16, ends(num_queries), ends(num_keys))

    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *qkv: Tensor) -> Tensor:
            settings = {**SETTINGS, "attn_mask_type": mask}
            output, ctx.aux, *_ = fused_attn.fused_attn_fwd(True, *sizes, *qkv, dtype, BACKEND, **settings)
            ctx.save_for_backward(*qkv, output)
            return output

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
            settings = {**SETTINGS, **BACKWARD_SETTINGS, "attn_mask_type": mask}
            dtypes = (dtype, utils.TE_DType[dtype])[: 2 if "dqkv_dtype" in BACKWARD_NAMES else 1]
            return tuple(
                fused_attn.fused_attn_bwd(*sizes, *ctx.saved_tensors, grad, *dtypes, ctx.aux, BACKEND, **settings)[:3]
            )

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output = torch.zeros_like(q)
        for number, (queries, keys) in enumerate(zip(num_queries, num_keys, strict=True)):
            own = (x[:length, number].transpose(0, 1) for x, length in ((q, queries), (k, keys), (v, keys)))
            output[:queries, number] = _rows_of(*own, visible_keys(queries, keys, mask)).transpose(0, 1)
        return output

    assert_same(with_gradients(lambda q, k, v: Kernel.apply(q, k, v), inputs, dtype), plain, inputs)


BACKEND = tex.NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen
SETTINGS = {"qkv_layout": "sbhd_sbhd_sbhd", "attn_scale": SCALE}
BACKWARD_NAMES = inspect.signature(fused_attn.fused_attn_bwd).parameters
BACKWARD_SETTINGS = {"dqkv_layout": "sbhd_sbhd_sbhd"} if "dqkv_layout" in BACKWARD_NAMES else {}


def _rows_of(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """Attention, 0 for queries without keys."""
    has_keys = visible.any(-1)
    output = torch.zeros_like(q)
    output[:, has_keys] = attend(q[:, has_keys], k, v, visible[has_keys], SCALE)
    return output


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mask", ["causal", "no_mask", "padding"])
def test_softmax_kernels_are_torchs(dtype: torch.dtype, mask: str) -> None:
    """What attention without a fused kernel takes in 16 bits."""
    scores = {"scores": 3 * numbers(2, 2, 32, 32, seed=4, dtype=dtype)}
    hidden = torch.zeros(2, 1, 32, 32, dtype=torch.bool)
    hidden[0, :, :, 20:] = hidden[1, :, :, 5:] = True
    hidden = {"causal": ~visible_keys(32, 32, "causal").expand(2, 1, 32, 32), "padding": hidden}.get(mask)
    softmax = FusedScaleMaskSoftmax(lambda *_: pytest.fail("the kernel was not taken"))

    def plain(scores: Tensor) -> Tensor:
        scaled = scores * SCALE
        return (scaled if hidden is None else scaled.masked_fill(hidden, float("-inf"))).softmax(-1)

    assert_same(with_gradients(lambda scores: softmax(scores, hidden, mask, SCALE), scores, dtype), plain, scores)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_which_all_is_hidden_has_no_weights_and_no_gradient(dtype: torch.dtype) -> None:
    scores = {"scores": 3 * numbers(2, 3, 4, 8, seed=4, dtype=dtype)}
    hidden = torch.zeros(2, 1, 4, 8, dtype=torch.bool)
    hidden[0, :, 1], hidden[1, :, :, 5:] = True, True
    weights = tex.scaled_masked_softmax_forward(scores["scores"], hidden, SCALE)
    gradient = tex.scaled_masked_softmax_backward(numbers(2, 3, 4, 8, seed=5, dtype=dtype), weights, SCALE)
    assert not weights[0, :, 1].any() and not gradient[0, :, 1].any()
    torch.testing.assert_close(weights.float().sum(-1)[1], torch.ones(3, 4), rtol=1e-2, atol=0)


@pytest.mark.parametrize("kind", ["scaled_upper_triang_masked_softmax", "scaled_aligned_causal_masked_softmax"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_causal_softmax_kernels_are_torchs(dtype: torch.dtype, kind: str) -> None:
    """The modules ask for a mask instead; their functions are there."""
    num_keys = 20 if "aligned" in kind else 12
    scores = {"scores": 3 * numbers(2, 3, 12, num_keys, seed=4, dtype=dtype)}

    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, scores: Tensor) -> Tensor:
            ctx.save_for_backward(weights := getattr(tex, f"{kind}_forward")(scores, SCALE))
            return weights

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return getattr(tex, f"{kind}_backward")(grad, *ctx.saved_tensors, SCALE)

    def plain(scores: Tensor) -> Tensor:
        return (
            (scores * SCALE).masked_fill(~visible_keys(12, num_keys, "bottom_right causal"), float("-inf")).softmax(-1)
        )

    assert_same(with_gradients(Kernel.apply, scores, dtype), plain, scores)


def test_a_head_that_no_fused_kernel_takes_is_attended_to_without() -> None:
    inputs = {name: numbers(32, BATCH, HEADS, 6, seed=seed, dtype=torch.bfloat16) for seed, name in enumerate("qkv")}
    layer = te.DotProductAttention(HEADS, 6, attn_mask_type="causal", softmax_scale=SCALE, attention_dropout=0.0)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output = attend(*(x.permute(1, 2, 0, 3) for x in (q, k, v)), visible_keys(32, 32, "causal"), SCALE)
        return output.permute(2, 0, 1, 3).flatten(-2)

    assert_same(module_with_gradients(layer, inputs), plain, inputs)


@pytest.mark.parametrize(
    ("setting", "name"),
    [({"attention_dropout": 0.1}, "dropout"), ({"softmax_type": "off-by-one"}, "softmax_type")],
    ids=["dropout", "softmax"],
)
def test_attention_that_has_no_stand_in_raises_by_name(setting: dict[str, Any], name: str) -> None:
    settings = {"attention_dropout": 0.0, **setting}
    layer = te.DotProductAttention(HEADS, SIZE, attn_mask_type="causal", **settings)
    x = numbers(8, BATCH, HEADS, SIZE, seed=1, dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError, match=f"fused_attn_fwd: {name} has no stand-in"):
        layer(x, x, x)
