"""Transformer Engine's linear layers and norms, over the stand-in, compute what torch does."""

from collections.abc import Callable

import pytest
import torch
from stand_in import (
    DTYPES,
    assert_same,
    module_with_gradients,
    numbers,
    perturb,
    transformer_engine,
    values_of,
)
from torch import Tensor
from torch.nn.functional import linear

te = transformer_engine()
import transformer_engine_torch as tex  # noqa: E402

IN, OUT, EPS = 24, 40, 1e-3  # eps: large, so that it counts


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = EPS) -> Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, IN), (5, 3, IN)], ids=["rows", "sbh"])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_torchs(dtype: torch.dtype, shape: tuple[int, ...], bias: bool) -> None:
    layer = te.Linear(IN, OUT, bias=bias, params_dtype=dtype, device="cpu")
    perturb(layer)
    x = {"x": numbers(*shape, seed=2, dtype=dtype)}

    def plain(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(x, weight, bias)

    assert_same(module_with_gradients(layer, x), plain, {**x, **values_of(layer)})


def test_linear_whose_bias_is_returned_leaves_it_out() -> None:
    layer = te.Linear(IN, OUT, bias=True, return_bias=True, params_dtype=torch.float32, device="cpu")
    perturb(layer)
    x = numbers(4, IN, seed=2)
    output, bias = layer(x)
    torch.testing.assert_close(output, linear(x, layer.weight))
    torch.testing.assert_close(bias, layer.bias)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("Linear", torch.float32),
        ("Linear", torch.bfloat16),
        ("GroupedLinear", torch.float32),
        ("GroupedLinear", torch.bfloat16),
        ("LayerNormLinear", torch.float32),
    ],
)
def test_weight_gradients_are_summed_in_fp32_where_they_are_accumulated(kind: str, dtype: torch.dtype) -> None:
    """`gradient_accumulation_fusion`: products go into `main_grad` without being rounded first."""
    rows = [6, 0, 5] if kind == "GroupedLinear" else [11]
    sizes = (3, IN, OUT) if kind == "GroupedLinear" else (IN, OUT)
    layer = getattr(te, kind)(*sizes, fuse_wgrad_accumulation=True, params_dtype=dtype, device="cpu")
    perturb(layer)
    weights = [weight for name, weight in layer.named_parameters() if name.startswith("weight")]
    before = [numbers(*weight.shape, seed=5 + number) for number, weight in enumerate(weights)]
    for weight, value in zip(weights, before, strict=True):
        weight.main_grad = value.clone()
    x = numbers(11, IN, seed=2, dtype=dtype)
    output = layer(x, *([rows] if kind == "GroupedLinear" else []))
    grad = numbers(*output.shape, seed=3, dtype=dtype)
    output.backward(grad)

    seen = x.double()
    if kind == "LayerNormLinear":
        seen = layer_norm(seen, layer.layer_norm_weight.double(), layer.layer_norm_bias.double(), layer.eps)
    parts = zip(weights, before, seen.split(rows), grad.double().split(rows), strict=True)
    for weight, value, rows_in, rows_grad in parts:
        torch.testing.assert_close(weight.main_grad.double(), value + rows_grad.mT @ rows_in, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zero_centered", [False, True])
def test_rms_norm_is_torchs(dtype: torch.dtype, zero_centered: bool) -> None:
    norm = te.RMSNorm(IN, eps=EPS, zero_centered_gamma=zero_centered, dtype=dtype, device="cpu")
    perturb(norm)
    x = {"x": 0.3 * numbers(5, 3, IN, seed=2, dtype=dtype)}

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, 1 + weight if zero_centered else weight)

    assert_same(module_with_gradients(norm, x), plain, {**x, **values_of(norm)})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zero_centered", [False, True])
def test_layer_norm_is_torchs(dtype: torch.dtype, zero_centered: bool) -> None:
    norm = te.LayerNorm(IN, eps=EPS, zero_centered_gamma=zero_centered, dtype=dtype, device="cpu")
    perturb(norm)
    x = {"x": 0.3 * numbers(5, 3, IN, seed=2, dtype=dtype)}

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return layer_norm(x, 1 + weight if zero_centered else weight, bias)

    assert_same(module_with_gradients(norm, x), plain, {**x, **values_of(norm)})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_norm_and_linear_in_one_are_torchs(dtype: torch.dtype, kind: str, zero_centered: bool, bias: bool) -> None:
    layer = te.LayerNormLinear(
        IN,
        OUT,
        eps=EPS,
        bias=bias,
        normalization=kind,
        zero_centered_gamma=zero_centered,
        params_dtype=dtype,
        device="cpu",
    )
    perturb(layer)
    x = {"x": 0.3 * numbers(5, 3, IN, seed=2, dtype=dtype)}

    def plain(
        x: Tensor,
        layer_norm_weight: Tensor,
        weight: Tensor,
        layer_norm_bias: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        scale = 1 + layer_norm_weight if zero_centered else layer_norm_weight
        normed = rms_norm(x, scale) if layer_norm_bias is None else layer_norm(x, scale, layer_norm_bias)
        return linear(normed, weight, bias)

    assert_same(module_with_gradients(layer, x), plain, {**x, **values_of(layer)})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [(4, 2, 5), (6, 0, 5), (0, 11, 0)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_grouped_linear_is_torchs_per_group(dtype: torch.dtype, rows: tuple[int, ...], bias: bool) -> None:
    """A group without rows, an expert that got no token, has gradients of 0."""
    layer = te.GroupedLinear(3, IN, OUT, bias=bias, params_dtype=dtype, device="cpu")
    perturb(layer)
    x = {"x": numbers(11, IN, seed=2, dtype=dtype)}

    def plain(x: Tensor, **own: Tensor) -> Tensor:
        parts = enumerate(x.split(rows))
        return torch.cat([linear(part, own[f"weight{number}"], own.get(f"bias{number}")) for number, part in parts])

    found = module_with_gradients(layer, x, list(rows))
    for number in (number for number, length in enumerate(rows) if length == 0):
        gradients = {name: value for name, value in found if name.endswith(str(number))}
        assert len(gradients) == 1 + bias
        assert not any(gradient.any() for gradient in gradients.values())
    assert_same(found, plain, {**x, **values_of(layer)}, allow_zero=not all(rows))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zero_centered", [False, True])
def test_rms_norms_gradient_takes_that_of_a_residual_along(dtype: torch.dtype, zero_centered: bool) -> None:
    x, weight, residual = (numbers(*shape, seed=9, dtype=dtype) for shape in ((6, IN), (IN,), (6, IN)))

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return torch.cat([rms_norm(x, 1 + weight if zero_centered else weight), x])

    grad = torch.cat([numbers(6, IN, seed=99, dtype=dtype), residual])
    expected_x, expected_weight = torch.autograd.grad(
        plain(*(leaves := (x.double().requires_grad_(), weight.double().requires_grad_()))), leaves, grad.double()
    )
    _, _, rsigma = tex.rmsnorm_fwd(x, weight, EPS, None, None, tex.DType.kFloat32, 0, zero_centered)
    found_x, found_weight = tex.rmsnorm_bwd_add(grad[:6], x, residual, rsigma, weight, 0, zero_centered)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(found_x.double(), expected_x, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found_weight.double(), expected_weight, rtol=tolerance, atol=tolerance)


def product(a: Tensor, b: Tensor, into: Tensor | None, dtype: torch.dtype | None, **scales: float) -> Tensor:
    """`b @ a.T`, as weights and rows are handed over."""
    kind = None if dtype is None else te.constants.TE_DType[dtype]
    empty = torch.empty(0)
    fixed = (None, kind, None, tex.DType.kFloat32, False, None, False, empty, 0, into is not None, False)
    return tex.generic_gemm(a, True, b, False, into, *fixed, **scales)[0]


def test_products_are_scaled_and_added_to_scaled_sums() -> None:
    a, b, before = numbers(5, IN, seed=1), numbers(7, IN, seed=2), numbers(7, 5, seed=3)
    found = product(a, b, before.clone(), None, alpha=0.3, beta=0.7)
    torch.testing.assert_close(found, 0.3 * (b @ a.mT) + 0.7 * before)


@pytest.mark.parametrize("dtype", [None, *DTYPES], ids=str)
def test_products_are_of_the_dtype_that_is_asked_for(dtype: torch.dtype | None) -> None:
    a, b = numbers(5, IN, seed=1, dtype=torch.bfloat16), numbers(7, IN, seed=2, dtype=torch.bfloat16)
    expected = (b.float() @ a.float().mT).to(dtype or torch.bfloat16)
    torch.testing.assert_close(product(a, b, None, dtype), expected)


def test_products_of_two_dtypes_are_refused_as_cublas_refuses_them() -> None:
    a, b = numbers(5, IN, seed=1, dtype=torch.bfloat16), numbers(7, IN, seed=2)
    with pytest.raises(TypeError, match=r"products of torch\.bfloat16 and torch\.float32"):
        product(a, b, None, None)


def quantize() -> None:
    tex.quantize(numbers(4, seed=1), None)


def layer_norm_mlp() -> None:
    layer = te.LayerNormMLP(IN, OUT, activation="swiglu", params_dtype=torch.float32, device="cpu")
    layer(numbers(4, IN, seed=1))


@pytest.mark.parametrize(
    ("use", "name"), [(quantize, "quantize"), (layer_norm_mlp, "swiglu")], ids=["function", "through a module"]
)
def test_what_has_no_stand_in_raises_by_name(use: Callable[[], None], name: str) -> None:
    with pytest.raises(NotImplementedError, match=name):
        use()
