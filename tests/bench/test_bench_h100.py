"""`bench h100` runs all its parts dry, goes on behind what fails, dies or hangs, and says what it did not measure."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from bench import __main__ as cli
from bench import activity, oracle, workloads
from bench.gpu import clock, heads, inputs, parts, sanity, summary, supervisor
from bench.gpu.folder import BROKEN_DEVICE, DeviceBrokenError, Folder, is_broken
from bench.gpu.plots import draw_all
from bench.gpu.published import published_table
from bench.implementations import BARE, names_on
from bench.roofline import intensity

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of a dry run, in a process of its own: the interpreter is chosen before Triton is imported."""
    pytest.importorskip("triton", reason="Triton is not installed")
    out = tmp_path_factory.mktemp("h100")
    command = [sys.executable, "-m", "bench", "h100", "--dry", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def rows(out: Path, file: str) -> dict:
    return json.loads((out / file).read_text())


def test_h100_dry_runs_every_part(dry: Path) -> None:
    checked = rows(dry, "sanity.json")
    assert checked["device"]["status"] == "ok" and checked["device"]["gemm_tflops"] > 0
    assert checked["tests"]["status"] == "ok" and "skipped" in checked["tests"]["summary"]
    assert checked["tiles"]["reason"].startswith("tuning measures on a GPU")
    (workload,) = parts.DRY_WORKLOADS
    found = rows(dry, f"head-{workload}.json")
    assert set(found) == set(parts.DRY_NAMES)
    for name, row in found.items():
        assert row["status"] == "ok", row
        kinds = ["both"] if name == "naive-pairs" else list(heads.PRODUCTS)
        assert list(row["times_ms"]) == kinds == list(row["extra_peak_mib"])
        assert all({name, heads.ANCHOR, BARE} == set(times) for times in row["times_ms"].values())
        # Naive logits are in bf16, as in its peers; ours have no more roundings than operands and the gradient.
        most = oracle.LIMITS_16["d_weight"] if name.startswith("naive") else 2.0**-8
        assert row["errors"]["d_weight"]["relative_l2"] < most, name
        assert row["commit"] and row["command"]
    steps = rows(dry, "steps.json")
    assert {row["status"] for row in steps.values()} == {"ok"}, steps
    assert list(steps) == ["naive", "fused", "active", "packed", "shared", "cached"]
    assert steps["fused"]["active_fraction"] is None
    law = workloads.expected_active(steps["packed"]["shape"]["vocab"], activity.ACTIVE_EPS)
    for name in ("active", "packed", "shared"):
        assert steps[name]["active_fraction"] == pytest.approx(law, rel=0.2), name
    assert steps["cached"]["flops"] == pytest.approx(0.75 * steps["shared"]["flops"])


def test_h100_dry_summary_shows_targets_and_every_table(dry: Path) -> None:
    text = (dry / "summary.md").read_text()
    for expected in ("no figure in it means anything", "<= 34.4", "<= 49.32", ">= 690", "<= 1024", "Part 3"):
        assert expected in text
    assert text.index(parts.LARGE) < text.index(parts.MAIN) and "Liger-Kernel, pull request 1356" in text
    assert text.count("| fastpref, active |") == 3 and "Not measured" not in text


def test_plot_draws_a_roofline_and_an_axis(dry: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(dry, out)
    row = rows(dry, f"head-{parts.DRY_WORKLOADS[0]}.json")
    for workload, vocab in zip(parts.VOCAB_SWEEP[:2], (2**15, 2**16), strict=True):
        moved = {name: each | {"shape": each["shape"] | {"vocab": vocab}} for name, each in row.items()}
        (out / f"head-{workload}.json").write_text(json.dumps(moved))
    drawn = list(draw_all(out, tmp_path / "images"))
    assert [file.name for file in drawn] == ["gpu-head-vocab.png", "gpu-roofline.png"]
    assert all(file.read_bytes()[:4] == b"\x89PNG" for file in drawn)


def test_intensity_counts_each_byte_once() -> None:
    shape = {"rows": 2, "hidden": 8, "vocab": 6}
    forward = intensity(shape, 2, is_backward=False)
    assert forward == 2 * 2 * 8 * 6 / (2 * (2 * 8 + 6 * 8))
    assert intensity(shape, 2, is_backward=True) == 1.5 * forward


def test_h100_measures_no_row_twice(dry: Path) -> None:
    before = {file: file.read_text() for file in dry.glob("*.json")}
    folder = Folder(dry, 60.0, {})
    parts.run_heads(folder, parts.Session(is_dry=True))
    assert {file: file.read_text() for file in dry.glob("*.json")} == before


def test_measure_turns_an_exception_into_a_row_and_goes_on(tmp_path: Path) -> None:
    folder = Folder(tmp_path, 60.0, {"commit": "abc"})

    def fails() -> dict:
        raise AttributeError("no such function\nsecond line")

    folder.measure("rows.json", "peer", 0.0, fails)
    folder.measure("rows.json", "ours", 0.0, lambda: {"figure": 1})
    found = rows(tmp_path, "rows.json")
    assert found["peer"]["status"] == "failed" and "AttributeError: no such function" in found["peer"]["reason"]
    assert found["ours"]["status"] == "ok" and found["ours"]["commit"] == "abc"


def test_measure_ends_the_part_when_the_device_is_lost(tmp_path: Path) -> None:
    def breaks() -> dict:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(DeviceBrokenError):
        Folder(tmp_path, 60.0, {}).measure("rows.json", "peer", 0.0, breaks)
    assert rows(tmp_path, "rows.json")["peer"]["status"] == "failed"
    assert not is_broken(torch.OutOfMemoryError("CUDA error: out of memory"))


def test_measure_begins_nothing_that_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = Folder(tmp_path, 5.0, {})
    folder.measure("rows.json", "late", 30.0, lambda: pytest.fail("begun"))
    assert not (tmp_path / "rows.json").exists() and "no time left" in capsys.readouterr().out


SCRIPT = """
import os, sys, time
from bench.gpu.folder import Folder
folder = Folder(__import__("pathlib").Path(sys.argv[1]), float(sys.argv[2]), {})
folder.measure("rows.json", "first", 0.0, lambda: {})
folder.measure("rows.json", "killer", 0.0, lambda: os._exit(%d))
folder.measure("rows.json", "sleeper", 0.0, lambda: time.sleep(60))
folder.measure("rows.json", "last", 0.0, lambda: {})
"""


def test_supervise_goes_on_behind_rows_that_kill_or_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "POLL_S", 0.05)
    command = [sys.executable, "-c", SCRIPT % BROKEN_DEVICE, str(tmp_path)]
    supervisor.supervise(Folder(tmp_path, 60.0, {}), 2, command, row_limit_s=0.3)
    found = rows(tmp_path, "rows.json")
    assert {name: row["status"] for name, row in found.items()} == {
        **{"first": "ok", "killer": "failed", "sleeper": "failed", "last": "ok"}
    }
    assert "code 75" in found["killer"]["reason"] and "no answer within" in found["sleeper"]["reason"]


def test_sanitizer_reports_a_failing_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text("#!/bin/sh\necho '1 failed in 0.1s'\nexit 9\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    row = sanity.run_sanitizer(tmp_path, 30.0)
    assert row["status"] == "wrong" and row["reason"] == "code 9: 1 failed in 0.1s"
    monkeypatch.setenv("PATH", "")
    assert sanity.run_sanitizer(tmp_path, 30.0)["status"] == "missing"


def test_sanitizer_that_is_cut_short_says_how_far_it_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text("#!/bin/sh\necho one PASSED; echo two PASSED; echo three FAILED; exec sleep 30\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    row = sanity.run_sanitizer(tmp_path, 1.0)
    assert row["reason"] == "not done within 1 s; 2 PASSED, 1 FAILED by then"


def test_head_jobs_begin_with_ours_on_the_main_workload_and_reach_everything() -> None:
    jobs = parts.head_jobs(is_dry=False)
    assert jobs[:5] == [(parts.MAIN, name) for name in (*parts.OURS, parts.SHARED)] and len(set(jobs)) == len(jobs)
    assert {name for _, name in jobs} == set(names_on("cuda"))
    assert sum(parts.BUDGETS_S.values()) <= 25 * 60 and max(parts.BUDGETS_S.values()) <= 9 * 60


@pytest.mark.parametrize(("num_rows", "share"), [(4096, None), (16384, None), (1638, 0.1), (48, None), (4096, 1.0)])
def test_layout_gives_the_rows_asked_for(num_rows: int, share: float | None) -> None:
    length, responses = inputs.layout(num_rows, share)
    assert sum(responses) == num_rows and len(responses) == 2 * max(num_rows // 1024, 1)
    assert min(responses) > 0 and max(responses) <= length
    if share is not None:
        assert num_rows / (length * len(responses)) == pytest.approx(share, rel=0.02)


def test_build_on_refuses_an_unknown_name() -> None:
    with pytest.raises(ValueError, match="workload must be one of llama3"):
        inputs.build_on("llama2-r10", torch.device("cpu"), torch.float32)


def test_drawn_activations_are_like_real_ones() -> None:
    row = inputs.compare_activity("smollm2-135m", 397, torch.device("cpu"), torch.float32)
    assert "reason" not in row and row["rests_on"] == "the measured model", row
    assert row["expected"] == pytest.approx(0.470, abs=0.001) and row["active_fraction"] != row["expected"]


def test_drawn_activations_of_other_shapes_follow_the_rule() -> None:
    row = activity.compare(inputs.build_on("v65536-h32-r256", torch.device("cpu"), torch.float32))
    assert "reason" not in row and row["rests_on"] == "the rule", row


def test_rule_for_active_columns_is_that_of_the_measured_models() -> None:
    """At the default tolerance to a ninth; at others to a quarter, as far as columns are left out at all."""
    for line in json.loads(activity.MEASURED.read_text())["lines"]:
        if line["workload"] in activity.SHAPES:
            share = workloads.expected_active(activity.SHAPES[line["workload"]][0], line["active_eps"])
            within = 0.11 if line["active_eps"] == activity.ACTIVE_EPS else 0.26
            assert share == 1.0 or share == pytest.approx(line["active_fraction"], rel=within), line
    assert workloads.expected_active(2**14, 2.0**-8) == 1.0
    counts = [vocab * workloads.expected_active(vocab, 2.0**-8) for vocab in (128_256, 262_144, 2**20)]
    assert max(counts) < 1.02 * min(counts)


def test_stored_draws_are_like_real_text() -> None:
    lines = json.loads(activity.RESULTS.read_text())["lines"]
    table = activity.table(lines)
    assert len(lines) == sum(len(counts) for _, _, counts in activity.SHAPES.values())
    ratios = [float(row.split("|")[-2]) for row in table.splitlines()[2:]]
    assert activity.ALIKE[0] <= min(ratios) and max(ratios) <= activity.ALIKE[1], table


def test_flat_activations_are_refused_before_they_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLOPE", "CURVE", "SPREAD", "PEAK"):
        monkeypatch.setattr(workloads, name, 0.01)
    case = inputs.build_on("v32768-h16-r96", torch.device("cpu"), torch.float32)
    monkeypatch.undo()
    monkeypatch.setattr(heads, "call", lambda *arguments: pytest.fail("it ran"))
    row = heads.measure(heads.Prepared(case), "naive-rows")
    assert row["status"] == "wrong" and row["reason"] == "1.67 times the active columns that are expected by the rule"


@pytest.mark.parametrize("name", ["v130-h32-r16", "v130-h32-r200"])
def test_nothing_is_expected_of_the_activity_of_tiny_heads(name: str) -> None:
    assert activity.compare(inputs.build_on(name, torch.device("cpu"), torch.float32)) == {}


def test_h100_part_gives_its_rows_device_and_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    monkeypatch.setattr(sanity, "jobs", lambda out, device, left: {"device": lambda: {"left": left()}})
    result = CliRunner().invoke(cli.main, ["h100-part", "1", str(tmp_path), "60"], catch_exceptions=False)
    row = rows(tmp_path, "sanity.json")["device"]
    assert result.exit_code == 0 and 50 < row["left"] <= 60
    assert row["gpu"] == "some GPU" and row["command"] == "python -m bench h100 --part 1" and row["tiles"] == "shipped"


def test_h100_supervises_every_part_and_writes_the_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    supervised = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(supervisor, "supervise", lambda folder, part, command, limit: supervised.append((part, limit)))
    result = CliRunner().invoke(cli.main, ["h100", "--out", str(tmp_path)], catch_exceptions=False)
    assert result.exit_code == 0 and supervised == list(parts.ROW_LIMITS_S.items())
    text = (tmp_path / "summary.md").read_text()
    assert text.count("not measured |") == 14 and "llama3.1-8b-r8192: ours-exact, ours-active" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_h100_without_a_gpu_points_to_the_dry_run(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.main, ["h100", "--out", str(tmp_path)])
    assert result.exit_code == 2 and "--dry runs the same code" in result.output and not list(tmp_path.iterdir())


def test_time_ms_measures_a_call() -> None:
    assert clock.time_ms(lambda: sum(range(100_000)), torch.device("cpu")) > 0.1


def stored(kind_ms: dict[str, float], peak_mib: float = 2048.0) -> dict:
    """A row of the main workload with the same time in every turn."""
    return {
        "status": "ok",
        "shape": {"rows": 8192, "hidden": 4096, "vocab": 128_256},
        "times_ms": {kind: {name: [ms] for name in parts.OURS} for kind, ms in kind_ms.items()},
        "extra_peak_mib": dict.fromkeys(kind_ms, peak_mib),
        "returned_mib": dict.fromkeys(kind_ms, 1400.0),
    }


def test_targets_are_beside_what_others_have_published() -> None:
    """8.607 TFLOP a product at V=128,256: 13.5 ms are 637.6 TFLOP/s. 45 > 34.4, and 47 < 50.4 x V / 131,072."""
    active, exact = stored({"reference": 13.5, "both": 45.0}), stored({"reference": 13.5, "both": 47.0})
    found = list(summary.targets({parts.MAIN: {"ours-active": active, "ours-exact": exact}}))
    assert [target.workload for target in found] == [parts.LARGE] * 7 + [parts.MAIN] * 7
    assert all(target.found is None for target in found[:7])
    large, main = ({target.what: target for target in each} for each in (found[:7], found[7:]))
    assert large["active, forward + backward, ms"].limit == pytest.approx(70.31, abs=0.01)
    assert "missed" in main["active, forward + backward, ms"].line()
    assert main["exact, forward + backward, ms"].limit == pytest.approx(49.317, abs=0.001)
    assert "| met |" in main["exact, forward + backward, ms"].line()
    assert main["cached, forward + backward, ms"].found is None
    assert main["forward (reference pass), TFLOP/s of 2 RHV"].found == pytest.approx(637.6, abs=0.1)
    assert "missed" in main["forward (reference pass), TFLOP/s of 2 RHV"].line()
    assert main["active, forward + backward over forward"].found == pytest.approx(3.333, abs=0.001)
    assert main["active, extra peak memory beyond gradients, MiB"].found == 648.0


def test_published_figures_are_shown_of_what_has_no_row() -> None:
    titles = dict.fromkeys(names_on("cuda"), "a peer")
    table = published_table(titles, {"quack"})
    assert "7.96" not in table and table.count("a peer") == 4 and "| 34.4 ms |" in table and "727 TFLOP/s" in table
    assert published_table(titles, {"quack", "liger-ce-sm90", "liger-ce-scaled"}) == ""
