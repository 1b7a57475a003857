"""What is said of the screened pass's errors is what a plain computation finds."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from peaked_case import peaked_case
from torch import Tensor

from bench import oracle, screened_error, workloads
from fastpref.kernels import screening


@pytest.fixture(scope="module")
def case() -> workloads.Case:
    return peaked_case()


def rounded_to_int8(rows_NH: Tensor) -> Tensor:
    """One scale a row, the largest number 127 of it."""
    scale_N = rows_NH.double().abs().amax(dim=1, keepdim=True) / 127
    return (rows_NH.double() / scale_N).round() * scale_N


def test_int8_logit_error_is_that_of_a_plain_rounding(case: workloads.Case) -> None:
    x_NH = case.hidden_SLH.flatten(0, 1)[case.rows_R][: screened_error.SAMPLE]
    exact_NV = x_NH.double() @ case.weight_VH.double().t()
    expected = (rounded_to_int8(x_NH) @ rounded_to_int8(case.weight_VH).t() - exact_NV).square().mean().sqrt()
    with mock.patch.object(screening, "rotation_size", lambda hidden_size: 1):
        plain = screened_error.int8_logit_error(case)
    assert plain == pytest.approx(float(expected), rel=1e-3)
    assert screened_error.int8_logit_error(case) < 0.8 * plain


def test_lines_have_every_tolerance_with_and_without_a_rotation(
    case: workloads.Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screened_error, "build", lambda name: case)
    monkeypatch.setattr(screened_error, "TOLERANCES", (2.0**-4, 2.0**-8))
    lines = list(screened_error.measure("dry"))
    found = [(line.get("active_eps"), line.get("rotation")) for line in lines]
    assert found == [(2**-4, 64), (2**-4, 1), (2**-8, 64), (2**-8, 1), (2**-8, 16), (None, None), (None, None)]
    coarse, _, fine, unrotated, half, operands, logits = lines
    assert coarse["active_fraction"] < fine["active_fraction"] < 0.6 and coarse["token_rms"] > fine["token_rms"]
    assert coarse["cold_mass"] == pytest.approx(2**-4, rel=0.1)
    assert fine["logit_rms"] < half["logit_rms"] < unrotated["logit_rms"]
    assert 1e-6 < fine["token_rms"] < operands["token_rms"] < logits["token_rms"]
    assert operands["d_weight_error"] < logits["d_weight_error"]
    header, _, *rows = screened_error.table(lines).splitlines()
    assert len(rows) == 7 and {row.count("|") for row in rows} == {header.count("|")}
    assert "| screened, 2^-4 | 64 |" in rows[0] and "| screened, 2^-8 | none |" in rows[3]


@pytest.mark.parametrize("logits_dtype", [None, torch.bfloat16])
def test_solve_rounds_logits_and_their_gradient(logits_dtype: torch.dtype | None) -> None:
    """Against autograd through the same roundings."""
    case = workloads.build("dry")
    x_RH = case.hidden_SLH.flatten(0, 1)[case.rows_R].requires_grad_()
    weight_VH = case.weight_VH.detach().clone().requires_grad_()
    z_RV = x_RH @ weight_VH.t()
    if logits_dtype is not None:
        z_RV = z_RV.to(logits_dtype).float()  # whose gradient autograd rounds as well
    logps_R = torch.log_softmax(z_RV, dim=1).gather(1, case.row_labels_R[:, None]).squeeze(1)
    logps_S = torch.stack([part.sum() for part in logps_R.tensor_split(case.cu_rows[1:-1])])
    oracle_loss = oracle.upstream(case, "dpo", logps_S)
    logps_S.backward(oracle_loss)
    found = oracle.solve(case, "dpo", torch.float32, logits_dtype)
    torch.testing.assert_close(found["logps"], logps_S.detach(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found["d_weight"], weight_VH.grad, rtol=1e-3, atol=1e-6)
    d_x_RH = found["d_hidden"].flatten(0, 1)[case.rows_R]
    torch.testing.assert_close(d_x_RH, x_RH.grad, rtol=1e-3, atol=1e-6)
    tokens_R = workloads.row_logps(replace(case, weight_VH=case.weight_VH), torch.float32, logits_dtype)
    torch.testing.assert_close(tokens_R, logps_R.detach(), rtol=1e-4, atol=1e-4)


def test_store_keeps_the_lines_of_other_workloads(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["screened_error"])
    file = tmp_path / "rows.json"
    for name, rows in (("smollm2-135m", 1), ("gemma3-270m", 2), ("smollm2-135m", 3)):
        screened_error.store(file, name, [{"workload": name, "rows": rows}])
    lines = screened_error.json.loads(file.read_text())["lines"]
    assert [(line["workload"], line["rows"]) for line in lines] == [("gemma3-270m", 2), ("smollm2-135m", 3)]
