"""The int8 form of rows and what a screened pass makes of it, written without any code of the package."""

import torch
from torch import Tensor

from fastpref.kernels.engine import Int8Head, Int8Rows


def hadamard(size: int) -> Tensor:
    """Sylvester's matrix, fp64 [size, size]."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix


def rotated(rows_NH: Tensor, signs_H: Tensor, size: int) -> Tensor:
    """Rows times signs times an orthonormal block-diagonal matrix, fp64."""
    blocks = (rows_NH.double() * signs_H.double()).reshape(rows_NH.shape[0], -1, size)
    return (blocks @ hadamard(size).t() / size**0.5).flatten(1)


def widened(rows: Int8Rows) -> Tensor:
    """The numbers that int8 rows stand for, fp64."""
    return rows.values_NH.double() * rows.scales_N.double().unsqueeze(1)


def int8_logits(rows: Int8Rows, head: Int8Head) -> Tensor:
    """Logits of int8 rows over int8 columns, fp64 [R, V]."""
    z_RV = widened(rows) @ widened(head.columns).t()
    if head.bias_V is not None:
        z_RV = z_RV + head.bias_V.double()
    z_RV = z_RV * head.logit_scale
    return z_RV if head.softcap is None else head.softcap * torch.tanh(z_RV / head.softcap)
