"""The benchmark of the head runs on a tiny shape, refuses wrong results, and its parts measure what they say."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from peaked_case import peaked_case
from torch import Tensor

from bench import __main__ as cli
from bench import activity, measure, oracle, workloads
from bench.implementations import IMPLEMENTATIONS, scorers_on
from bench.registry import call, dpo_loss
from fastpref.kernels import screened

FAST = ["naive-rows", "naive-pairs", "ours-active", "ours-exact", "ours-screened-shared"]
SCORED = ["naive-rows", "ours-exact", "ours-screened", "ours-screened-shared"]


def run(*arguments: object) -> str:
    result = CliRunner().invoke(cli.main, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Measure the dry workload with the given implementations and return the stored rows."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def measured(*names: str, kind: str = "head") -> dict:
        run(kind, "--dry", "--repeats", 2, "--only", ",".join(names), "--out", tmp_path)
        return json.loads((tmp_path / f"{kind}-dry.json").read_text())

    return measured


def test_head_dry_passes_the_gate_and_is_timed_in_turns(rows) -> None:
    found = rows(*FAST)
    ours = found["naive-rows"]["ours"]
    assert set(found) == set(FAST)
    for name, row in found.items():
        assert row["status"] in ("ok", "missing"), row
        if row["status"] == "ok":
            assert {ours, name, "bare-product"} <= set(row["times"])
            assert all(len(taken["wall_s"]) == 2 and min(taken["wall_s"]) > 0 for taken in row["times"].values())
    assert found["naive-rows"]["shape"] == {
        **{"sequences": 4, "positions": 192, "rows": 96, "vocab": 512, "hidden": 64},
        "active_fraction": 1.0,
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["liger", "cce", "trl"])
def test_head_dry_with_an_installed_peer(rows, name: str) -> None:
    missing = IMPLEMENTATIONS[name].unavailable(torch.device("cpu"))
    if missing is not None:
        pytest.skip(missing)
    assert rows(name)[name]["status"] == "ok"


def test_head_keeps_rows_that_are_there(rows, tmp_path: Path) -> None:
    first = rows("naive-rows")
    output = run("head", "--dry", "--only", "naive-rows", "--out", tmp_path)
    assert "there already" in output and json.loads((tmp_path / "head-dry.json").read_text()) == first


def test_head_without_repeats_is_checked_and_timed_later(rows, tmp_path: Path) -> None:
    run("head", "--dry", "--repeats", 0, "--only", "naive-rows", "--out", tmp_path)
    untimed = json.loads((tmp_path / "head-dry.json").read_text())["naive-rows"]
    assert untimed["status"] == "untimed" and untimed["extra_peak_mib"] >= 0 and "times" not in untimed
    assert rows("naive-rows")["naive-rows"]["status"] == "ok"


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_head_does_not_time_a_wrong_gradient(rows, monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    naive = IMPLEMENTATIONS["naive-rows"]

    def wrong(case: workloads.Case, hidden_SLH: Tensor, weight_VH: Tensor) -> Tensor:
        logps_S = naive.run(case, hidden_SLH, weight_VH)
        weight_VH.grad[weight_VH.grad.norm(dim=1).argmax()] *= factor
        return logps_S

    monkeypatch.setitem(IMPLEMENTATIONS, "trl", replace(naive, run=wrong))
    row = rows("trl")["trl"]
    assert row["status"] == "wrong" and row["reason"].startswith("d_weight") and "times" not in row


def test_exact_rows_are_held_to_the_numeric_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    naive = {name: {"max": 1e-6, "relative_l2": 1e-7, "scale": 1.0} for name in oracle.LIMITS}
    worse = {name: error | {"max": 4e-6} for name, error in naive.items()}
    assert oracle.verdict(naive, naive, is_exact=True) is None
    assert oracle.verdict(worse, naive, is_exact=False) is None
    assert "numeric rule" in (oracle.verdict(worse, naive, is_exact=True) or "")


def test_rows_of_approximate_plans_are_held_to_what_is_promised() -> None:
    """Drawn activations as text."""
    found = {name: {"max": 1e-6, "relative_l2": 1e-7, "scale": 1.0} for name in oracle.LIMITS}
    for name, error, is_right in (
        ("d_hidden", 2.9e-3, True),
        ("d_hidden", 3.1e-3, False),
        ("d_weight", 6e-4, False),
        ("logps", 2e-4, False),
    ):
        off = found | {name: found[name] | {"relative_l2": error}}
        assert (oracle.verdict(off, None, is_exact=False) is None) == is_right
    assert workloads.is_drawn("synthetic-v131072-r128-f50")
    assert not any(map(workloads.is_drawn, workloads.NAMES))


def test_oracle_agrees_with_autograd() -> None:
    case = workloads.build("dry")
    hidden_SLH, weight_VH = (tensor.double().requires_grad_() for tensor in (case.hidden_SLH, case.weight_VH))
    logps_SLV = torch.log_softmax(hidden_SLH @ weight_VH.t(), dim=-1)
    logps_SL = logps_SLV.gather(2, case.labels_SL.clamp(min=0)[..., None]).squeeze(2)
    logps_S = torch.where(case.labels_SL >= 0, logps_SL, 0.0).sum(1)
    dpo_loss(logps_S, case.ref_logps_S.double()).backward()
    expected = oracle.truth(case)
    torch.testing.assert_close(expected["logps"], logps_S.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(expected["d_hidden"], hidden_SLH.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(expected["d_weight"], weight_VH.grad, rtol=1e-9, atol=1e-12)


def test_check_sees_the_peak_of_a_temporary(monkeypatch: pytest.MonkeyPatch) -> None:
    naive = IMPLEMENTATIONS["naive-rows"]

    def hungry(case: workloads.Case, hidden_SLH: Tensor, weight_VH: Tensor) -> Tensor:
        torch.ones(50 * 2**18).sum()  # 50 MiB
        return naive.run(case, hidden_SLH, weight_VH)

    monkeypatch.setitem(IMPLEMENTATIONS, "naive-rows", replace(naive, run=hungry))
    assert 49 <= measure.check("dry", "naive-rows")["extra_peak_mib"] <= 60


def test_worker_in_a_child_returns_its_row() -> None:
    row = measure.in_child(measure.check, "dry", "naive-rows")
    assert row["shape"] == workloads.build("dry").shape | {"active_fraction": 1.0}
    assert row["errors"]["d_weight"]["relative_l2"] < 1e-6


def test_worker_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match="workload must be one of"):
        measure.in_child(measure.check, "no-such-workload", "naive-rows")


def test_synthetic_case_has_the_rows_its_name_says() -> None:
    case = workloads._finish("dry", *workloads._synthetic(1024, 16, 48, 96, num_pairs=4))
    assert case.shape == {"sequences": 8, "positions": 96, "rows": 48, "vocab": 1024, "hidden": 16}
    assert case.cu_rows.tolist() == list(range(0, 49, 6)) and case.pair_lengths == [12] * 4


def test_head_does_not_time_activations_unlike_real_ones(rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activity, "compare", lambda case: {"active_fraction": 0.9, "reason": "2.00 times the active"})
    row = rows("naive-rows")["naive-rows"]
    assert row["status"] == "wrong" and row["reason"].startswith("2.00 times") and "times" not in row


def test_caches_of_drawn_cases_belong_to_their_law(monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(workloads.build("dry"), name="synthetic-v131072-r512-f50")
    before, real = case.folder, replace(case, name="gemma3-270m")
    monkeypatch.setattr(workloads, "CURVE", 0.0)
    assert case.folder != before and case.folder.parent == before.parent
    assert real.folder == workloads.CACHE / "gemma3-270m"


def test_score_dry_passes_the_gate_and_is_timed_beside_exact(rows, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = replace(IMPLEMENTATIONS["ours-screened"], beside=("ours-exact", "ours-screened-shared", "gone"))
    monkeypatch.setitem(IMPLEMENTATIONS, "ours-screened", entry)
    found = rows(*SCORED, kind="score")
    assert set(found) == set(SCORED)
    for name, row in found.items():
        assert row["status"] == "ok" and row["ours"] == "ours-exact", row
        assert set(row["errors"]) == {"logps", "token_logps"} and row["errors"]["token_logps"]["max"] < 1e-4
        assert all(len(taken["wall_s"]) == 2 and min(taken["wall_s"]) > 0 for taken in row["times"].values())
        assert {"ours-exact", name, "bare-product"} <= set(row["times"])
    beside = {"ours-exact", "ours-screened", "ours-screened-shared", "bare-product"}
    assert set(found["ours-screened"]["times"]) == beside
    # Fewer columns than screening is for: all of them exactly.
    assert found["ours-screened"]["screened"]["active_fraction"] == 1.0


def test_score_takes_what_has_a_pass_without_a_gradient(tmp_path: Path) -> None:
    assert {"naive-rows", "cce", "torch-lce", "trl", "ours-exact", "ours-screened"} <= set(scorers_on("cpu"))
    for name in ("naive-pairs", "liger", "ours-active"):
        result = CliRunner().invoke(cli.main, ["score", "--dry", "--only", name, "--out", str(tmp_path)])
        assert result.exit_code == 2 and f"got {name}" in result.output and name not in scorers_on("cpu")


def test_sweep_times_nothing_beside_its_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    timed = []

    def fake(function, workload: str, *arguments: object) -> dict:
        if function is measure.check:
            return {"activity": {}, "errors": {}, "extra_peak_mib": 1.0, "dtype": "float32"}
        timed.append((workload, arguments[0]))
        return {"times": {}}

    monkeypatch.setattr("bench.commands.head.in_child", fake)
    run("sweep", "rows", "--only", "ours-exact", "--out", tmp_path)
    assert timed == [
        (f"synthetic-v131072-r{rows}-f50", ["ours-active", "ours-exact"]) for rows in (128, 256, 512, 1024)
    ]


@pytest.mark.parametrize("kind", ["head", "score"])
def test_a_token_that_is_wrong_is_seen_where_its_sequence_is_right(
    rows, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Errors of a hundredth of a nat and alternating signs, which every sum of two tokens hides."""
    exact = IMPLEMENTATIONS["ours-exact"]

    def wrong(case: workloads.Case, hidden_SLH: Tensor, weight_VH: Tensor) -> Tensor:
        logps_S = exact.logps(case, hidden_SLH, weight_VH)
        is_single = len(logps_S) == case.rows_R.numel()
        return logps_S + 0.01 * (-1.0) ** torch.arange(len(logps_S)) if is_single else logps_S

    entry = replace(IMPLEMENTATIONS["ours-screened"], logps=wrong, run=None)
    monkeypatch.setitem(IMPLEMENTATIONS, "ours-screened", entry)
    row = rows("ours-screened", kind=kind)["ours-screened"]
    assert row["status"] == "wrong" and row["reason"].startswith("token_logps: rms error 1.00e-02 nat exceeds 3.0e-04")
    assert row["errors"]["logps"]["max"] < 1e-3


def test_token_errors_are_those_of_single_rows() -> None:
    case, naive = workloads.build("dry"), IMPLEMENTATIONS["naive-rows"]
    off_R = torch.zeros(96)
    off_R[7], off_R[90] = 0.3, -0.4
    shifted = replace(naive, logps=lambda *given: naive.logps(*given) + off_R, run=None)
    (found,) = oracle.token_errors(shifted, case, oracle.token_truth(case)).values()
    assert found["max"] == pytest.approx(0.4, abs=1e-4) and found["rms"] == pytest.approx(0.5 / 96**0.5, rel=1e-3)
    logps_R = torch.log_softmax(case.hidden_SLH.double() @ case.weight_VH.double().t(), dim=-1).flatten(0, 1)[
        case.rows_R
    ]
    expected_R = logps_R.gather(1, case.row_labels_R[:, None]).squeeze(1)
    torch.testing.assert_close(oracle.token_truth(case), expected_R, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(
    ("measure_", "error", "is_right"),
    [
        ("rms", 2.9e-4, True),
        ("rms", 3.1e-4, False),
        ("max", 4.9e-3, True),
        ("max", 5.1e-3, False),
        ("rms", float("nan"), False),
    ],
)
def test_screened_rows_are_held_to_limits_for_each_token(measure_: str, error: float, is_right: bool) -> None:
    right = {"max": 1e-4, "rms": 1e-5, "relative_l2": 1e-7, "scale": 1.0}
    found = {"logps": right, "token_logps": right | {measure_: error}}
    for dtype in (torch.float32, torch.bfloat16):
        assert (oracle.verdict(found, None, is_exact=False, is_screened=True, dtype=dtype) is None) == is_right
        is_free = dtype != torch.float32  # peers round their logits
        assert (oracle.verdict(found, None, is_exact=False, dtype=dtype) is None) == (is_right or is_free)
    gradients = {"d_hidden": right | {"relative_l2": 3.4e-3}}
    assert oracle.verdict(gradients, None, is_exact=False, is_screened=True) is None
    assert oracle.verdict(gradients, None, is_exact=False) is not None
    worse = {"d_hidden": right | {"relative_l2": 3.6e-3}}
    assert oracle.verdict(worse, None, is_exact=False, is_screened=True) is not None


def test_the_shared_copy_is_made_of_this_turn_s_weight_and_outside_of_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    quantise_rows = screened.quantise_rows
    monkeypatch.setattr(screened, "quantise_rows", lambda rows: (made.append(len(rows)), quantise_rows(rows))[1])
    monkeypatch.setattr(measure, "build", lambda name: peaked_case())
    row = measure.check("dry", "ours-screened-shared")
    assert row["screened"]["active_fraction"] < 0.5 and row["shared_mib"] == round(8192 * (64 + 4) / 2**20, 1)
    # Another version of the weight in every turn: an old copy would be refused.
    measure.time_in_turns("dry", ["ours-active", "ours-screened-shared"], 2)
    assert 8192 not in made
    monkeypatch.setattr(measure.activity, "screened", lambda case: {})
    own = measure.check("dry", "ours-screened")
    assert made.count(8192) == 2 and "shared_mib" not in own  # with gradients, and token by token
    for error in own["errors"].values():
        assert 0 < error["max"] < 0.1
    assert own["errors"]["token_logps"] == row["errors"]["token_logps"]


def test_an_implementation_that_makes_its_own_copy_is_never_given_one() -> None:
    """Nor is one that multiplies everything exactly, for which the op would refuse it."""
    case = peaked_case()
    shared = IMPLEMENTATIONS["ours-screened-shared"].given(case, case.weight_VH)
    assert shared.screened is not None and case.screened is None
    assert IMPLEMENTATIONS["ours-screened-shared"].given(shared, case.weight_VH) is shared
    for name in ("ours-active", "ours-screened"):
        call(IMPLEMENTATIONS[name], shared, case.hidden_SLH, case.weight_VH)
    with torch.no_grad():
        case.weight_VH.mul_(2.0)
    call(IMPLEMENTATIONS["ours-screened"], shared, case.hidden_SLH, case.weight_VH)
    with pytest.raises(ValueError, match="screened is not of this weight as it is now"):
        call(IMPLEMENTATIONS["ours-screened-shared"], shared, case.hidden_SLH, case.weight_VH)
