"""Attention over packed rows against softmax under the dense mask of the row, in fp64."""

import itertools

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastpref.data import Segment, Segments
from fastpref.trainer.model.packing import VarlenRows, _varlen_class
from fastpref.trainer.model.segment_attention import SegmentParams, flex_segment_attention, segment_attention

N, D = 4, 8
SCALE = D**-0.5
SHARED = Segments((Segment(0, 5, 9, 12), Segment(12, 12, 15, 22), Segment(22, 30, 31, 33)), 37)
ALONE = Segments((Segment(0, 0, 7, 9), Segment(9, 9, 20, 24)), 24)


def inputs(length: int, num_groups: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(length, 1, heads, D) for heads in (N, num_groups, num_groups)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def dense_attention(query, key, value, allowed_LL: torch.Tensor) -> torch.Tensor:
    """Scores of the whole row, its mask, softmax, sum; zeros where nothing is seen."""
    repeats = query.size(2) // key.size(2)
    key, value = key.repeat_interleave(repeats, 2), value.repeat_interleave(repeats, 2)
    scores = torch.einsum("isnd,jsnd->snij", query, key) * SCALE
    weights = scores.masked_fill(~allowed_LL, float("-inf")).softmax(-1).nan_to_num()
    return torch.einsum("snij,jsnd->isnd", weights, value).flatten(2)


def with_gradients(function, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    output = function(*tensors)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    return [output, *torch.autograd.grad((output * weights.to(output.dtype)).sum(), tensors)]


@pytest.mark.parametrize("window", [None, 1, 3, 6, 40])
@pytest.mark.parametrize("segments", [SHARED, ALONE], ids=["shared", "alone"])
def test_segment_attention_equals_the_dense_mask(segments: Segments, window: int | None) -> None:
    tensors = inputs(segments.length, 2, torch.float64)
    allowed_LL = segments.allowed_LL(window)
    exact = with_gradients(lambda q, k, v: dense_attention(q, k, v, allowed_LL), tensors)
    # fused kernels alone: no score matrix in memory
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        got = with_gradients(lambda q, k, v: segment_attention(q, k, v, segments, SCALE, window), tensors)
    for ours, truth in zip(got, exact, strict=True):
        torch.testing.assert_close(ours, truth, rtol=0, atol=1e-13)
    # FlexAttention has no backward pass on a CPU
    mask = SegmentParams.of(segments, torch.device("cpu")).block_mask(window)
    flexed = flex_segment_attention(*(tensor.detach() for tensor in tensors), mask, SCALE)
    torch.testing.assert_close(flexed, exact[0], rtol=0, atol=1e-13)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    "segments", [SHARED.padded_to(40), ALONE, ALONE.padded_to(120)], ids=["shared", "alone", "short"]
)
def test_segment_attention_of_parts_of_a_row_equals_the_dense_mask(
    segments: Segments, ranks: int, window: int | None
) -> None:
    """As context-parallel ranks hold it. Ranks of the short row hold padding alone, and still take part backward."""
    tensors = inputs(segments.length, 2, torch.float64)
    allowed_LL = segments.allowed_LL(window)
    exact = with_gradients(lambda q, k, v: dense_attention(q, k, v, allowed_LL), tensors)
    parts = torch.arange(segments.length).chunk(2 * ranks)
    length = segments.length // (2 * ranks)
    output = torch.zeros_like(exact[0])
    for rank in range(ranks):
        chunks = tuple(range(index * length, (index + 1) * length) for index in (rank, 2 * ranks - 1 - rank))
        held_l = torch.cat([parts[rank], parts[2 * ranks - 1 - rank]])
        params = SegmentParams.of(segments, torch.device("cpu"), chunks)
        query, key, value = tensors
        part = segment_attention(query[held_l], key, value, segments, SCALE, window, chunks)
        assert all(gradient is not None for gradient in torch.autograd.grad(part.sum(), tensors, retain_graph=True))
        output = output.index_copy(0, held_l, part)
        flexed = flex_segment_attention(
            query.detach()[held_l], key.detach(), value.detach(), params.block_mask(window), SCALE
        )
        torch.testing.assert_close(flexed, exact[0][held_l], rtol=0, atol=1e-13)
    for ours, truth in zip(with_gradients(lambda *_: output, tensors), exact, strict=True):
        torch.testing.assert_close(ours, truth, rtol=0, atol=1e-13)


def test_segment_attention_gives_padding_zeros_and_no_gradient() -> None:
    tensors = inputs(SHARED.length, 2, torch.float32)
    for tensor in tensors:
        tensor.data[SHARED.num_used :] = float("inf")
    output, *gradients = with_gradients(lambda q, k, v: segment_attention(q, k, v, SHARED, SCALE, None), tensors)
    assert not output[SHARED.num_used :].any()
    for gradient in gradients:
        assert not gradient[SHARED.num_used :].any() and gradient[: SHARED.num_used].isfinite().all()


def test_segment_attention_of_a_pair_ignores_its_neighbours() -> None:
    """Bit for bit: the same pair alone in a row."""
    alone = Segments((Segment(0, 8, 9, 11),), 11)
    tensors = [tensor.detach() for tensor in inputs(SHARED.length, 2, torch.float32)]
    among = segment_attention(*tensors, SHARED, SCALE, None)[22:33]
    assert torch.equal(segment_attention(*(tensor[22:33] for tensor in tensors), alone, SCALE, None), among)


def test_segment_params_build_a_block_mask_once() -> None:
    params = SegmentParams.of(SHARED, torch.device("cpu"))
    assert params.block_mask(None) is params.block_mask(None)
    assert params.block_mask(4) is not params.block_mask(None)


class FakeEngine(torch.nn.Module):
    """Transformer Engine's calling convention: `thd` sequences by `cu_seqlens`, else one sequence per row."""

    def forward(self, query, key, value, attention_mask, attn_mask_type, attention_bias=None, packed_seq_params=None):
        if packed_seq_params is None:
            length = query.size(0)
            return dense_attention(query, key, value, torch.ones(length, length, dtype=torch.bool).tril())
        assert type(packed_seq_params) is PackedSeqParams and packed_seq_params.qkv_format == "thd"
        bounds = packed_seq_params.cu_seqlens_q
        assert bounds.dtype == torch.int32 and bounds[-1] == query.size(0)
        assert packed_seq_params.max_seqlen_q == packed_seq_params.max_seqlen_kv == int(bounds.diff().max())
        ranges = [slice(start, stop) for start, stop in itertools.pairwise(bounds.tolist())]
        parts = [[x[one, None] for x in (query, key, value)] for one in ranges]
        return torch.cat([self.forward(*part, None, attn_mask_type) for part in parts]).squeeze(1)


@pytest.mark.parametrize("length", [24, 29])
def test_varlen_rows_hand_a_row_to_the_engine_as_sequences(length: int) -> None:
    engine, segments = FakeEngine(), ALONE.padded_to(length)
    engine.__class__ = _varlen_class(FakeEngine)
    assert isinstance(engine, VarlenRows)
    tensors = inputs(length, 2, torch.float64)
    params = SegmentParams.of(segments, torch.device("cpu"))
    output = engine(*tensors, None, "causal", packed_seq_params=params)
    expected = dense_attention(*tensors, segments.allowed_LL())
    torch.testing.assert_close(output[:24], expected[:24], rtol=0, atol=1e-13)
    assert output.shape == (length, 1, N * D) and output.isfinite().all()
    padded = engine(*tensors, None, "causal")
    assert torch.equal(padded, FakeEngine()(*tensors, None, "causal"))
