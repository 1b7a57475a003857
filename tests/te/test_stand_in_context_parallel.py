"""Transformer Engine's context parallelism, over the stand-in and gloo ranks, is one process's in torch."""

import inspect
from typing import Any

import pytest
import torch
from stand_in import DTYPES, Tensors, assert_same, attend, attention_in_fp32, numbers, transformer_engine, visible_keys
from torch import Tensor

from fastpref.testing.workers import RankPool

te = transformer_engine()

HEADS, GROUPS, SIZE, BATCH, SCALE = 4, 2, 8, 2, 0.31
QKV = (("q", HEADS), ("k", GROUPS), ("v", GROUPS))
TO_HEADS = {"sbhd": (1, 2, 0, 3), "bshd": (0, 2, 1, 3)}
FROM_HEADS = {"sbhd": (2, 0, 1, 3), "bshd": (0, 2, 1, 3)}
Found = list[tuple[str, Tensor]]


def own_rows(lengths: list[int], rank: int, ranks: int) -> Tensor:
    """Which rows a rank holds: of every sequence the chunks `rank` and `2 * ranks - 1 - rank` of `2 * ranks`."""
    rows, start = [], 0
    for length in lengths:
        chunks = torch.arange(start, start + length).chunk(2 * ranks)
        rows += [chunks[rank], chunks[2 * ranks - 1 - rank]]
        start += length
    return torch.cat(rows)


def attend_on_ranks(
    layer: dict[str, Any], call: dict[str, Any], inputs: Tensors, grad: Tensor, room: list[int]
) -> Found:
    """What a rank does: attention on its rows. `room` are the lengths of the sequences, padding included."""
    world = torch.distributed.group.WORLD
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    rows, dim = own_rows(room, rank, ranks), layer["qkv_format"].replace("t", "s").index("s")
    communication = layer.pop("cp_comm_type")
    attention = te.DotProductAttention(
        HEADS,
        SIZE,
        num_gqa_groups=GROUPS,
        softmax_scale=SCALE,
        attention_dropout=0.0,
        cp_group=world,
        cp_global_ranks=list(range(ranks)),
        cp_stream=torch.cuda.Stream(),
        cp_comm_type=communication,
        **layer,
    )
    leaves = {name: x.index_select(dim, rows).requires_grad_() for name, x in inputs.items()}
    with attention_in_fp32():
        output = attention(*leaves.values(), **call)
    output.backward(grad.index_select(dim, rows))
    return [("output", output.detach()), *((name, leaf.grad) for name, leaf in leaves.items())]


def together(pieces: list[Found], room: list[int], dim: int) -> Found:
    """The rows of all ranks in the order of the sequences."""
    order = torch.cat([own_rows(room, rank, len(pieces)) for rank in range(len(pieces))]).argsort()
    by_name = zip(*pieces, strict=True)
    return [(parts[0][0], torch.cat([x for _, x in parts], dim).index_select(dim, order)) for parts in by_name]


def queries_keys_values(*shape: int, dtype: torch.dtype) -> Tensors:
    return {name: numbers(*shape, heads, SIZE, seed=seed, dtype=dtype) for seed, (name, heads) in enumerate(QKV)}


def gradient_of_output(inputs: Tensors) -> Tensor:
    """The numbers that `assert_same` takes."""
    return numbers(*inputs["q"].shape[:-2], HEADS * SIZE, seed=99, dtype=inputs["q"].dtype)


CASES = {
    "p2p": ("p2p", "causal", None),
    "p2p, all keys": ("p2p", "no_mask", None),
    "all-gather": ("all_gather", "causal", None),
    "all-gather, window": ("all_gather", "causal", (5, 0)),
    "all-gather, window over chunks": ("all_gather", "causal", (13, 0)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", TO_HEADS)
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_attention_over_ranks_is_one_processs(
    dtype: torch.dtype, layout: str, ranks: int, case: str, rank_pool_2: RankPool, rank_pool_4: RankPool
) -> None:
    communication, mask, window = CASES[case]
    shape = (32, BATCH) if layout == "sbhd" else (BATCH, 32)
    inputs = queries_keys_values(*shape, dtype=dtype)
    layer = {"cp_comm_type": communication, "attn_mask_type": mask, "window_size": window, "qkv_format": layout}
    pool = rank_pool_2 if ranks == 2 else rank_pool_4
    pieces = pool.run(attend_on_ranks, layer, {}, inputs, gradient_of_output(inputs), [32])
    visible = visible_keys(32, 32, mask, window or (-1, -1))

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output = attend(*(x.permute(TO_HEADS[layout]) for x in (q, k, v)), visible, SCALE)
        return output.permute(FROM_HEADS[layout]).flatten(-2)

    assert_same(together(pieces, [32], layout.index("s")), plain, inputs)


def ends(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


GATHER = inspect.getsource(te.attention.dot_product_attention.context_parallel.AttnFuncWithCPAndKVAllGather)
GATHERS_PACKED_ROWS = 'assert qkv_format != "thd"' not in GATHER


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("lengths", [[16, 8, 24], [13, 1, 20]], ids=["full", "with room between"])
@pytest.mark.parametrize("window", [None, (5, 0)], ids=["whole", "window"])
@pytest.mark.parametrize("communication", ["p2p", "all_gather"])
def test_attention_of_packed_rows_over_ranks_is_one_processs(
    dtype: torch.dtype,
    ranks: int,
    lengths: list[int],
    window: tuple[int, int] | None,
    communication: str,
    rank_pool_2: RankPool,
    rank_pool_4: RankPool,
) -> None:
    if communication == "all_gather" and not GATHERS_PACKED_ROWS:
        pytest.skip("this release of Transformer Engine gathers no packed rows")
    if communication == "p2p" and window is not None:
        pytest.skip("Transformer Engine passes windows around by no p2p")
    room = [16, 8, 24]
    inputs = queries_keys_values(48, dtype=dtype)
    layer = {
        "cp_comm_type": communication,
        "attn_mask_type": "padding_causal",
        "window_size": window,
        "qkv_format": "thd",
    }
    call: dict[str, Any] = {"pad_between_seqs": lengths != room}
    for name in ("q", "kv"):
        call |= {f"cu_seqlens_{name}": ends(lengths), f"cu_seqlens_{name}_padded": ends(room)}
        call |= {f"max_seqlen_{name}": max(room)}
    pool = rank_pool_2 if ranks == 2 else rank_pool_4
    pieces = pool.run(attend_on_ranks, layer, call, inputs, gradient_of_output(inputs), room)
    is_row = torch.cat([torch.arange(space) < length for space, length in zip(room, lengths, strict=True)])

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outputs = []
        for own_q, own_k, own_v, length in zip(*(x.split(room) for x in (q, k, v)), lengths, strict=True):
            visible = visible_keys(length, length, "causal", window or (-1, -1))
            own = attend(*(x[:length].transpose(0, 1) for x in (own_q, own_k, own_v)), visible, SCALE)
            outputs.append(torch.cat([own.transpose(0, 1), torch.zeros_like(own_q[length:])]))
        return torch.cat(outputs).flatten(-2)

    found = together(pieces, room, 0)
    # What stands between the sequences is nobody's: its output is not looked at, and it has no gradients.
    found[0] = ("output", found[0][1].masked_fill(~is_row[:, None], 0))
    assert_same(found, plain, inputs)
