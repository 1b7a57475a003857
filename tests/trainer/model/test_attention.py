"""Core attention and norm against plain formulas in fp64."""

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fastpref.trainer.model.attention import RMSNorm, SDPACoreAttention

L, S, D = 21, 3, 8


def config(**settings) -> TransformerConfig:
    defaults = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "attention_dropout": 0.0}
    defaults |= {"kv_channels": D, "cuda_graph_scope": []}
    return TransformerConfig(**(defaults | settings))


def attention(layer_number: int = 1, softmax_scale: float | None = None, **settings) -> SDPACoreAttention:
    return SDPACoreAttention(config(**settings), layer_number, AttnMaskType.causal, "self", softmax_scale=softmax_scale)


def inputs(num_heads: int, num_groups: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = [(L, S, heads, D) for heads in (num_heads, num_groups, num_groups)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def plain_attention(query, key, value, scale: float, window: int | None) -> torch.Tensor:
    """Scores, mask, softmax, sum: in the dtype of the inputs."""
    repeats = query.size(2) // key.size(2)
    key, value = key.repeat_interleave(repeats, 2), value.repeat_interleave(repeats, 2)
    scores = torch.einsum("isnd,jsnd->snij", query, key) * scale
    distance = torch.arange(L)[:, None] - torch.arange(L)
    allowed = (distance >= 0) & (distance < (window or L))
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    return torch.einsum("snij,jsnd->isnd", weights, value).flatten(2)


def with_gradients(function, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    output = function(*tensors)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(6)).to(output.dtype)
    return [output, *torch.autograd.grad((output * weights).sum(), tensors)]


@pytest.mark.parametrize("num_groups", [1, 2, 4])
@pytest.mark.parametrize(("window", "softmax_scale"), [(None, None), (2, None), (5, None), (L, None), (None, 0.7)])
def test_core_attention_equals_softmax_attention(
    num_groups: int, window: int | None, softmax_scale: float | None
) -> None:
    module = attention(softmax_scale=softmax_scale, window_size=None if window is None else (window - 1, 0))
    scale = softmax_scale or D**-0.5
    tensors = inputs(4, num_groups)
    # only the fused kernel: no score matrix in memory
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        got = with_gradients(module, tensors)
    plain = with_gradients(lambda q, k, v: plain_attention(q, k, v, scale, window), tensors)
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in tensors]
    exact = with_gradients(lambda q, k, v: plain_attention(q, k, v, scale, window), exact_inputs)
    for ours, theirs, truth in zip(got, plain, exact, strict=True):
        allowed = 3 * (theirs - truth).abs().max() + 4 * torch.finfo(torch.float32).eps * truth.abs().max()
        assert (ours - truth).abs().max() <= allowed


def test_core_attention_windows_only_the_named_layers() -> None:
    tensors = inputs(4, 2)
    settings = {"window_size": (3, 0), "window_attn_skip_freq": [0, 1]}
    assert torch.equal(attention(1, **settings)(*tensors), attention()(*tensors))
    assert torch.equal(attention(2, **settings)(*tensors), attention(window_size=(3, 0))(*tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_core_attention_of_a_sequence_ignores_its_padding_and_its_batch(dtype: torch.dtype) -> None:
    tensors = [tensor.detach() for tensor in inputs(4, 2, dtype)]
    expected = attention()(*tensors)
    padded = [tensor.clone() for tensor in tensors]
    for tensor in padded:
        tensor[L - 6 :] = 1e4
    assert torch.equal(attention()(*padded)[: L - 6], expected[: L - 6])
    assert torch.equal(attention()(*(tensor[:, 1:2] for tensor in tensors)), expected[:, 1:2])


def test_core_attention_refuses_what_it_does_not_do() -> None:
    query, key, value = inputs(4, 2)
    mask = torch.ones(1, 1, L, L, dtype=torch.bool)
    module = attention()
    with pytest.raises(NotImplementedError, match=r"attention_mask must be None .* got Tensor; pass one right-padded"):
        module(query, key, value, mask)
    with pytest.raises(NotImplementedError, match="attention_bias must be None"):
        module(query, key, value, attention_bias=mask)
    with pytest.raises(NotImplementedError, match=r"packed_seq_params must be None .* got PackedSeqParams"):
        module(query, key, value, packed_seq_params=PackedSeqParams())
    with pytest.raises(NotImplementedError, match="attn_mask_type must be causal"):
        module(query, key, value, attn_mask_type=AttnMaskType.padding)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention_dropout": 0.1}, r"attention_dropout must be 0\.0 .* got 0\.1"),
        ({"softmax_type": "off-by-one"}, "softmax_type must be 'vanilla'"),
    ],
)
def test_core_attention_refuses_settings_it_does_not_honour(settings: dict, message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        attention(**settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", [LlamaRMSNorm, Gemma3RMSNorm])
def test_rms_norm_equals_transformers_bit_for_bit(norm: type, dtype: torch.dtype) -> None:
    theirs = norm(48, eps=1e-3).to(dtype)
    ours = RMSNorm(config(params_dtype=dtype, layernorm_zero_centered_gamma=norm is Gemma3RMSNorm), 48, eps=1e-3)
    assert torch.equal(ours.weight, theirs.weight)
    theirs.weight.data.normal_()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(7, 2, 48, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    results = []
    for module in (ours, theirs):
        output = module(x)
        results.append([output, *torch.autograd.grad(output.float().pow(3).sum(), [x, module.weight])])
    for got, expected in zip(*results, strict=True):
        assert got.dtype == dtype
        assert torch.equal(got, expected)


def test_rms_norm_marks_its_weight_for_sequence_parallelism() -> None:
    assert RMSNorm(config(), 8).weight.sequence_parallel is False
    parallel = config(tensor_model_parallel_size=2, sequence_parallel=True)
    assert RMSNorm(parallel, 8).weight.sequence_parallel is True
