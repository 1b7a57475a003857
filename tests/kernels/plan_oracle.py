"""What the plans of the backward pass must give: the active set, its formula in closed form, gradients of a plan."""

import torch
from torch import Tensor

from fastpref import linear_logps
from fastpref.kernels import active
from fastpref.kernels.ops import FORWARD_OUTPUTS, Screen, linear_logps_fwd
from fastpref.kernels.registration import unflatten
from fastpref.testing.adversarial import HeadInputs


def active_columns(inputs: HeadInputs, active_eps: float) -> tuple[Tensor, Tensor]:
    """The set that a forward pass chooses, bool [V], and what is said of it: share of columns, mass of the others."""
    labels_T = inputs.labels_SL.flatten()
    results = linear_logps_fwd(
        inputs.hidden_SLH.flatten(0, 1),
        inputs.weight_VH,
        inputs.bias_V,
        torch.arange(labels_T.shape[0]),
        labels_T,
        weight_sum=None,
        main_grad=None,
        logit_scale=inputs.logit_scale,
        softcap=inputs.softcap,
        group_name=None,
        sequence_parallel=False,
        stats=(),
        backend="torch",
        plan="active",
        active_eps=active_eps,
        cache_bytes=0,
        **Screen()._asdict(),
    )
    saved, report = unflatten(results, FORWARD_OUTPUTS)
    found = active.summary(saved.num_active, report.cold_mass, labels_T.shape[0], inputs.weight_VH.shape[0])
    assert int(saved.num_active) == int(saved.is_active_V.sum())
    return saved.is_active_V, torch.stack([found["active_fraction"], found["cold_mass"]])


def logits_and_slope(inputs: HeadInputs, x_RH: Tensor) -> tuple[Tensor, Tensor]:
    z_RV = x_RH @ inputs.weight_VH.t()
    if inputs.bias_V is not None:
        z_RV = z_RV + inputs.bias_V
    z_RV = z_RV * inputs.logit_scale
    if inputs.softcap is None:
        return z_RV, torch.full_like(z_RV, inputs.logit_scale)
    capped_RV = torch.tanh(z_RV / inputs.softcap)
    return inputs.softcap * capped_RV, inputs.logit_scale * (1 - capped_RV**2)


def formula(inputs: HeadInputs, coefficients_R: Tensor, is_active_V: Tensor) -> dict[str, Tensor]:
    """What the active plan is to return, written without any code of the package, in fp64."""
    inputs = inputs.cast(torch.float64)
    x_RH, labels_R, weight_VH = inputs.hidden_SLH.flatten(0, 1), inputs.labels_SL.flatten(), inputs.weight_VH
    z_RV, slope_RV = logits_and_slope(inputs, x_RH)
    p_RV = z_RV.softmax(dim=1)
    onehot_RV = torch.nn.functional.one_hot(labels_R, weight_VH.shape[0])
    d_z_RV = torch.where(is_active_V, coefficients_R[:, None] * (onehot_RV - p_RV) * slope_RV, 0.0)
    mean_H = weight_VH[~is_active_V].sum(dim=0) / max(int((~is_active_V).sum()), 1)
    cold_R = p_RV[:, ~is_active_V].sum(dim=1)
    slope_R = torch.full_like(cold_R, inputs.logit_scale)
    if inputs.softcap is not None:
        z_R = x_RH @ mean_H * inputs.logit_scale
        slope_R = inputs.logit_scale * (1 - torch.tanh(z_R / inputs.softcap) ** 2)
    d_x_RH = d_z_RV @ weight_VH - (coefficients_R * cold_R * slope_R)[:, None] * mean_H
    return {"hidden": d_x_RH.view(inputs.hidden_SLH.shape), "weight": d_z_RV.t() @ x_RH, "bias": d_z_RV.sum(dim=0)}


def differentiate(inputs: HeadInputs, coefficients_R: Tensor, **options) -> dict[str, Tensor]:
    """Gradients of `sum(coefficients * token_logps)`."""
    leaves = {"hidden": inputs.hidden_SLH, "weight": inputs.weight_VH, "bias": inputs.bias_V}
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items() if leaf is not None}
    result = linear_logps(
        leaves["hidden"],
        leaves["weight"],
        inputs.labels_SL,
        bias=leaves.get("bias"),
        logit_scale=inputs.logit_scale,
        softcap=inputs.softcap,
        stats=("token_logps",),
        **options,
    )
    gradients = torch.autograd.grad((result.token_logps * coefficients_R).sum(), list(leaves.values()))
    return dict(zip(leaves, gradients, strict=True))


def coefficients(num_rows: int) -> Tensor:
    return torch.where(torch.arange(num_rows) < num_rows // 2, 0.06, -0.05)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())
