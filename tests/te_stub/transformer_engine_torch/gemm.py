"""Matrix products, in cuBLAS's order of operands: the output is `op(B) @ op(A)` of row-major tensors.

Dims: T tokens, I features in, O features out.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from transformer_engine_torch.enums import torch_dtype

__all__ = ["generic_gemm", "te_general_grouped_gemm"]


def generic_gemm(
    A: Tensor,
    transa: bool,
    B: Tensor,
    transb: bool,
    D: Tensor | None,
    quantizer: Any,
    output_dtype: Any,
    bias: Tensor | None,
    bias_type: Any,
    gelu: bool,
    gelu_in: Tensor | None,
    grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    comm_overlap: Any = None,
    comm_type: Any = None,
    extra_output: Tensor | None = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """One product: `A` [O, I] and `B` [..., I] give [..., O] forward, other transpositions the two gradients.

    Returns:
        `D` or a new tensor; the gradient of the bias, the column sums of `B`, where `grad` is set and a bias is given;
        None; `extra_output`.
    """
    if gelu or quantizer is not None or comm_overlap is not None:
        raise NotImplementedError("generic_gemm: GELU, quantized outputs and overlap have no stand-in for the CPU")
    product = _product(A, transa, B, transb) * alpha
    bias_grad = None
    if bias is not None and grad:
        bias_grad = B.flatten(0, -2).float().sum(0).to(bias.dtype)
    elif bias is not None:
        product = product + bias.float()
    if D is None:
        shape = product.shape if transb else (*B.shape[:-1], product.shape[-1])
        dtype = A.dtype if output_dtype is None else torch_dtype(output_dtype)
        return product.to(dtype).view(shape), bias_grad, None, extra_output
    _store(D, product, accumulate, beta)
    return D, bias_grad, None, extra_output


def te_general_grouped_gemm(
    A: Sequence[Tensor],
    transa: bool,
    B: Sequence[Tensor],
    transb: bool,
    D: Sequence[Tensor],
    output_dtype: Any,
    m_splits: Sequence[int] | None,
    bias: Sequence[Tensor],
    bias_type: Any,
    single_output: bool,
    pre_gelu_out: Sequence[Tensor],
    grad: bool,
    workspaces: Any,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    math_sm_count: int,
) -> Sequence[Tensor]:
    """One product per pair of `A` and `B`, into `D`: a tensor each, or their rows one after another in `D[0]`.

    Empty tensors stand for biases that are not there. A product without rows, of an expert that got no token, is 0.

    Returns:
        The gradients of the biases where `grad` is set and they are there, filled in place.
    """
    if any(tensor.numel() for tensor in pre_gelu_out):
        raise NotImplementedError("te_general_grouped_gemm: GELU has no stand-in for the CPU")
    outputs = D[0].flatten(0, -2).split([b.flatten(0, -2).shape[0] for b in B]) if single_output else D
    for a, b, output, own_bias in zip(A, B, outputs, bias, strict=True):
        product = _product(a, transa, b, transb)
        if own_bias.numel() and grad:
            own_bias.copy_(b.flatten(0, -2).float().sum(0))
        elif own_bias.numel():
            product = product + own_bias.float()
        _store(output, product, accumulate)
    return bias


def _product(A: Tensor, transa: bool, B: Tensor, transb: bool) -> Tensor:
    """[rows, columns] in fp32, summed in fp64: what differs from another order of sums is then not the stand-in's."""
    if A.dtype != B.dtype:
        raise TypeError(f"products of {A.dtype} and {B.dtype}: cuBLAS takes two matrices of one dtype")
    left, right = B.flatten(0, -2).double(), A.flatten(0, -2).double()
    return ((left.t() if transb else left) @ (right.t() if transa else right)).float()


def _store(output: Tensor, product: Tensor, accumulate: bool, beta: float | None = None) -> None:
    product = product.view(output.shape)
    if accumulate:
        product = product + output.float() * (1.0 if beta is None else beta)
    output.copy_(product)
