"""`bench gpu`: its plan fits two commands of five minutes, and what one step does stops no other."""

import copy
import dataclasses
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from bench import __main__ as cli
from bench.gpu import inputs, supervisor
from bench.gpu.fifteen import command, phases, plan, rehearsal, speed, summary
from bench.gpu.fifteen.phases import Event, by_phase
from bench.gpu.fifteen.plan import Step
from bench.gpu.folder import Folder, ResultsError
from bench.gpu.parts import DRY_WORKLOADS, Session

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def clock() -> rehearsal.Clock:
    return copy.deepcopy(rehearsal.read_clock())


def test_the_plan_fits_the_recorded_clock(clock: rehearsal.Clock) -> None:
    assert rehearsal.faults(clock) == []
    assert rehearsal.faults(clock, seconds=200.0) != []


def test_rehearse_runs_the_steps_of_both_commands_dry(tmp_path: Path) -> None:
    """What continuous integration runs; in a process of its own, as the interpreter is chosen before that."""
    pytest.importorskip("triton", reason="Triton is not installed")
    start = [sys.executable, "-m", "bench", "gpu", "--rehearse", "--out", str(tmp_path), "--carried", str(tmp_path)]
    done = subprocess.run(start, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "both commands fit" in done.stdout, done.stdout + done.stderr
    names = {file.name for file in tmp_path.iterdir()}
    assert names <= set(plan.files()) and len(names) <= plan.MOST_FILES
    for number, steps in plan.COMMANDS.items():
        rows = json.loads((tmp_path / plan.rows_file(number)).read_text())
        assert list(rows) == [step.name for step in steps]
        assert {row["status"] for row in rows.values()} <= {"ok", "missing"}, rows
        assert f"# Command {number}" in (tmp_path / plan.summary_file(number)).read_text()
    rows = json.loads((tmp_path / "command-1.json").read_text())
    assert set(rows["correct"]["plans"]) == {"ours-exact", "ours-active", "ours-cached", "ours-screened"}
    shared = rows[f"ours-screened-shared on {plan.MAIN}"]
    assert shared["screened"]["path"] == "Triton" and "token_logps" in shared["errors"] and "shared_mib" in shared
    assert rows["phases at 10% active"]["plans"]["ours-active"]["times_ms"]["both"]["ours-active"]
    assert "no profile" in rows["phases at 10% active"]["plans"]["ours-exact"]["phases"]["both"]["reason"]


def changed(monkeypatch: pytest.MonkeyPatch, number: int, name: str, **fields: object) -> None:
    """Replace fields of one step of the plan."""
    steps = [dataclasses.replace(step, **fields) if step.name == name else step for step in plan.COMMANDS[number]]
    monkeypatch.setitem(plan.COMMANDS, number, tuple(steps))


def test_rehearsal_finds_a_step_that_takes_too_long(clock: rehearsal.Clock) -> None:
    clock["commands"]["1"]["steps"]["correct"]["s"] = 31.0
    (fault,) = rehearsal.faults(clock)
    assert "'correct' takes 31 s by the recorded clock, 24 are kept for it" in fault


def test_rehearsal_finds_reserves_beyond_the_command(clock: rehearsal.Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    changed(monkeypatch, 2, "tests", reserve_s=180.0)
    (fault,) = rehearsal.faults(clock)
    assert "command 2: 358 s are kept for start, steps and end, 58 more than the 300" in fault


def test_rehearsal_finds_a_ninth_file(clock: rehearsal.Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    changed(monkeypatch, 2, "ncu", files=("ncu.txt",))
    (fault,) = rehearsal.faults(clock)
    assert "8 files and the copy that replaces one are more than the 8 that come back" in fault and "ncu.txt" in fault
    changed(monkeypatch, 2, "ncu", files=("tiles.json",))
    assert any("tiles.json is written by two steps" in fault for fault in rehearsal.faults(clock))


def test_rehearsal_finds_a_step_out_of_its_place(clock: rehearsal.Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, *rest = plan.COMMANDS[1]
    monkeypatch.setitem(plan.COMMANDS, 1, (second, first, *rest))
    (fault,) = rehearsal.faults(clock)
    assert "'correct' stands at place 1, where the recorded clock has 'device'" in fault


def test_rehearsal_finds_steps_that_only_one_side_knows(clock: rehearsal.Clock) -> None:
    steps = clock["commands"]["2"]["steps"]
    steps["other"] = steps.pop("ncu")
    found = rehearsal.faults(clock)
    assert any("has no step 'ncu'" in fault for fault in found) and any(
        "has a step 'other'" in fault for fault in found
    )


def test_rehearsal_finds_what_cannot_be_imported(clock: rehearsal.Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    changed(monkeypatch, 1, "device", run="tools:no_such_function")
    (fault,) = rehearsal.faults(clock)
    assert "'device' cannot be run: AttributeError" in fault


def test_rehearsal_finds_a_peer_that_the_registry_has_not(
    clock: rehearsal.Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed(monkeypatch, 1, f"trl on {plan.MAIN}", arguments=(plan.MAIN, "trl-of-old"))
    (fault,) = rehearsal.faults(clock)
    assert "the registry has no 'trl-of-old' for a GPU" in fault


def test_the_larger_vocabulary_comes_first_with_every_peer_that_can_be_carried() -> None:
    heads = [step for step in plan.COMMANDS[1] if step.run == "speed:head"]
    assert [step.arguments for step in heads[:2]] == [(plan.LARGE, "ours-active"), (plan.LARGE, "ours-exact")]
    kept = {
        name for workload, name in (step.arguments for step in heads if not step.is_extra) if workload == plan.LARGE
    }
    assert kept == {"ours-active", "ours-exact", "ours-screened", "ours-screened-shared", *plan.PEERS}
    assert {step.arguments[1] for step in heads if step.is_extra} == set(plan.HEAVY_PEERS)
    wanted = {"naive-rows", "cce-kernel", "liger-ce", "torch-lce", "trl", "liger-ce-scaled", "quack"}
    assert wanted <= {*plan.PEERS, *plan.HEAVY_PEERS}


def test_rehearsal_finds_rows_too_large_to_come_back(clock: rehearsal.Clock) -> None:
    clock["commands"]["1"]["steps"]["device"]["kib"] = 17 * 1024
    (fault,) = rehearsal.faults(clock)
    assert "command-1.json has 17." in fault and "more than the 16 that come back" in fault


def test_rehearsal_finds_a_start_that_leaves_too_little(clock: rehearsal.Clock) -> None:
    clock["commands"]["1"]["start_s"] = 60.0
    assert ["s are kept for start" in fault for fault in rehearsal.faults(clock)] == [True]


def test_record_takes_the_seconds_of_a_run(tmp_path: Path, clock: rehearsal.Clock) -> None:
    folder = Folder(tmp_path, 60.0, {})
    folder.store("command-1.json", "device", {"status": "ok", "took_s": 3.5})
    found = rehearsal.record(tmp_path, "measured")
    assert found["source"] == "measured" and found["commands"]["1"]["steps"]["device"] == {"s": 3.5, "kib": 0.0}
    assert found["commands"]["1"]["steps"]["correct"] == clock["commands"]["1"]["steps"]["correct"]


def test_allowed_s_gives_what_others_have_saved_and_never_what_others_need() -> None:
    steps = [Step(name=name, run="", reserve_s=10.0) for name in "abc"]
    steps.append(Step(name="extra", run="", reserve_s=40.0, is_extra=True))
    assert plan.allowed_s(steps, "a", 30.0) == 10.0 and plan.allowed_s(steps, "a", 100.0) == 80.0
    assert plan.allowed_s(steps, "c", 12.0) == 12.0 and plan.allowed_s(steps, "b", 12.0) == 10.0


SCRIPT = """
import os, sys, time, types
from pathlib import Path
from bench.gpu.fifteen import command, plan
from bench.gpu.folder import run_to_exit_code
from bench.gpu.parts import Session
steps = types.ModuleType("bench.gpu.fifteen.planted")
def killer(context): context.note({"known": 1}); os._exit(9)
def sleeper(context): context.note({"known": 2}); time.sleep(60)
def lost(context): raise RuntimeError("CUDA error: an illegal memory access was encountered")
def right(context): return {"left": context.left()}
vars(steps).update(killer=killer, sleeper=sleeper, lost=lost, right=right)
sys.modules[steps.__name__] = steps
out, marks, seconds = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
planned = [plan.Step(name=name, run="planted:" + name, reserve_s=1.0) for name in %r]
folder = command.open_folder(1, out, seconds, {}, marks)
run_to_exit_code(lambda: command.run_in_this_process(folder, 1, planned, Session(is_dry=False)))
"""


def test_a_step_that_dies_hangs_or_loses_the_device_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what it had noted stays."""
    monkeypatch.setattr(supervisor, "POLL_S", 0.05)
    names, out, marks = ["killer", "sleeper", "lost", "right"], tmp_path / "out", tmp_path / "marks"
    marks.mkdir()
    steps = [Step(name=name, run="", reserve_s=1.0) for name in names]
    folder = command.open_folder(1, out, 120.0, {}, marks)
    start = [sys.executable, "-c", SCRIPT % names, str(out), str(marks)]
    limit = {"sleeper": 0.5}
    supervisor.supervise(folder, 1, start, lambda name, left: limit.get(name, left), out / plan.log_file(1))
    rows = folder.rows(plan.rows_file(1))
    assert {name: row["status"] for name, row in rows.items()} == dict.fromkeys(names[:3], "failed") | {"right": "ok"}
    assert rows["killer"]["known"] == 1 and "code 9" in rows["killer"]["reason"]
    assert rows["sleeper"]["known"] == 2 and "no answer within 0" in rows["sleeper"]["reason"]
    assert "illegal memory access" in rows["lost"]["reason"] and 0 < rows["right"]["left"] < 120
    assert plan.allowed_s(steps, "right", 5.0) == 5.0
    assert {file.name for file in out.iterdir()} == {"command-1.json", "summary-1.md", "log-1.txt"}
    text = (out / "summary-1.md").read_text()
    assert "| killer | failed |" in text and "| right | ok |" in text


def test_a_dry_run_measures_what_is_one_and_the_same_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of all sizes are the dry workload; other shares and other implementations are not the same."""
    called = []
    monkeypatch.setattr(speed, "head", lambda context, *job: called.append(job) or {"job": len(called)})
    jobs = [(plan.MAIN, "ours-active"), (plan.LARGE, "ours-active"), (plan.LARGE, "ours-exact")]
    steps = [Step(name=f"{name} on {w}", run="speed:head", reserve_s=9.0, arguments=(w, name)) for w, name in jobs]
    folder = command.open_folder(1, tmp_path / "out", 60.0, {}, tmp_path)
    command.run_in_this_process(folder, 1, steps, Session(is_dry=True))
    assert [row["job"] for row in folder.rows("command-1.json").values()] == [1, 1, 2]
    assert called == [(DRY_WORKLOADS[0], "ours-active"), (DRY_WORKLOADS[0], "ours-exact")]


def test_end_session_ends_what_the_process_has_started(tmp_path: Path) -> None:
    script = "import subprocess, sys, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, start_new_session=True)
    assert child.stdout is not None
    grandchild = Path("/proc") / child.stdout.readline().decode().strip() / "stat"
    assert grandchild.exists()
    supervisor.end_session(child)
    deadline = time.monotonic() + 5
    while grandchild.exists() and ") Z " not in grandchild.read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not grandchild.exists() or ") Z " in grandchild.read_text()


def test_shorten_keeps_the_end_of_a_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    log.write_text("first" + "x" * 100 + "last")
    monkeypatch.setattr(command, "MOST_LOG_BYTES", 10)
    command.shorten(log)
    assert log.read_text() == "[the beginning is left out]\nxxxxxxlast"


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_with_activity_reaches_a_share_of_active_columns(share: float) -> None:
    case = inputs.build_on("v16384-h64-r64", torch.device("cpu"), torch.float32)
    case.weight_VH.requires_grad_()  # as an earlier pass leaves it
    found, active = speed.with_activity(case, share)
    assert not found.ref_logps_S.requires_grad
    assert active == pytest.approx(share, rel=speed.CLOSE_ENOUGH)
    softmax_RV = torch.softmax(found.hidden_SLH.flatten(0, 1)[found.rows_R].double() @ found.weight_VH.double().t(), 1)
    above = (softmax_RV.amax(0) > 2**-8).double().mean()
    # What the plan calls active it has from masses; it is no less than what exceeds its tolerance anywhere.
    assert float(above) <= active
    assert not torch.equal(found.ref_logps_S, case.ref_logps_S)


def test_by_phase_adds_up_kernels_and_counts_calls() -> None:
    found = by_phase(
        [
            Event("_linear_logps_fwd_kernel", True, 12000.0, 1),
            Event("nvjet_tst_128x256", True, 3000.0, 2),
            Event("void cutlass::Kernel2", True, 1000.0, 1),
            Event("void at::native::index_elementwise", True, 500.0, 4),
            Event("something", True, 1.0, 1),
            Event("cudaLaunchKernel", False, 0.0, 7),
            Event("cuLaunchKernelEx", False, 0.0, 2),
            Event("cudaStreamSynchronize", False, 0.0, 3),
            Event("aten::mm", False, 0.0, 5),
        ]
    )
    assert found["launches"] == 9 and found["waits"] == 3 and found["kernels_ms"] == 16.501
    assert list(found["phases"]) == ["forward kernel", "products", "gather and scatter", phases.OTHER]
    assert found["phases"]["products"] == {"ms": 4.0, "kernels": 3}


def test_profiled_sees_what_a_call_does() -> None:
    a_MK = torch.ones(8, 8)
    events = phases.profiled(lambda: a_MK @ a_MK, [torch.profiler.ProfilerActivity.CPU])
    assert {event.name: event.count for event in events}["aten::mm"] == 1
    assert not any(event.is_kernel for event in events)


def test_profile_gives_a_reason_where_there_is_no_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    device, events = torch.device("cuda"), [Event("aten::mm", False, 0.0, 1)]
    monkeypatch.setattr(phases.clock, "time_ms", lambda run, device: 1.0)
    monkeypatch.setattr(phases, "profiled", lambda run, activities: events)
    assert "has seen no kernel" in phases.profile(lambda: None, device)["reason"]
    events.append(Event("_linear_logps_fwd_kernel", True, 500.0, 1))
    assert phases.profile(lambda: None, device)["phases"]["forward kernel"]["ms"] == 0.5

    def fails(run: object, activities: object) -> list[Event]:
        raise RuntimeError(message)

    monkeypatch.setattr(phases, "profiled", fails)
    message = "CUPTI_ERROR_INSUFFICIENT_PRIVILEGES\nmore"
    reason = phases.profile(lambda: None, device)["reason"]
    assert reason == "no profile: RuntimeError: CUPTI_ERROR_INSUFFICIENT_PRIVILEGES"
    message = "CUDA error: an illegal memory access was encountered"
    with pytest.raises(RuntimeError, match="illegal memory access"):
        phases.profile(lambda: None, device)


def test_summary_shows_times_phases_and_what_was_not_begun() -> None:
    shape = {"rows": 8192, "hidden": 4096, "vocab": 128256}
    row = {"status": "ok", "title": "fastpref, active", "shape": shape, "took_s": 9.0}
    row["times_ms"] = {"reference": {"ours-active": [13.0, 13.5, 14.0]}}
    row["phases"] = {"reference": by_phase([Event("_linear_logps_fwd_kernel", True, 12000.0, 1)]) | {"taken_ms": 13.5}}
    text = summary.text(1, {"ours-active on llama3.1-8b-r8192": row})
    assert "13.500 ms (13.000 to 14.000), 637.6 TFLOP/s of 2 RHV" in text
    assert "kernels 12.000 of 13.500 ms, 0 launches, 0 waits; forward kernel 12.000 ms in 1" in text
    assert "Not begun: device, correct," in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_gpu_without_a_gpu_points_to_the_rehearsal(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.main, ["gpu", "--command", "1", "--out", str(tmp_path)])
    assert result.exit_code == 2 and "--rehearse runs the same plan without one" in result.output
    result = CliRunner().invoke(cli.main, ["gpu"])
    assert result.exit_code == 2 and "give one of --command 1" in result.output


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(cli.main, list(arguments))
    assert result.exit_code != 0 and isinstance(result.exception, SystemExit), result.exception
    return result.output


def test_gpu_refuses_what_it_could_not_use(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "not in the range" in refused("gpu", "--command", "1", "--seconds", "-3")
    assert "leave out --seconds, --carried" in refused("gpu", "--record", "--seconds", "9", "--carried", str(tmp_path))
    assert "name a new folder" in refused("gpu", "--rehearse", "--out", str(tmp_path))
    assert "name another folder by --out" in refused("gpu", "--record", "--out", str(tmp_path / "file"))
    (tmp_path / "command-1.json").write_text('{"device": ')
    assert "command-1.json is damaged" in refused("gpu", "--record", "--out", str(tmp_path))


def test_watch_finds_a_damaged_file_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "supervise", lambda *args: pytest.fail("started"))
    (tmp_path / "command-1.json").write_text("")
    with pytest.raises(ResultsError, match="damaged"):
        command.watch(1, tmp_path, 300.0, None, {})


def test_watch_without_time_leaves_a_summary(tmp_path: Path) -> None:
    summary = command.watch(1, tmp_path, 0.0, None, {}).read_text(encoding="utf-8")
    assert "Not begun: device, correct, " in summary


def test_watch_watches_the_steps_of_a_command_with_the_rule_of_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = {}
    monkeypatch.setenv(command.CACHE_VARIABLE, str(tmp_path / "triton"))
    monkeypatch.setattr(command, "supervise", lambda *args: watched.update(args=args))
    command.watch(2, tmp_path / "out", 300.0, tmp_path / "no-cache", {"commit": "abc"})
    folder, number, start, limit, log = watched["args"]
    assert number == 2 and start[-4:-1] == ["gpu-part", "2", str(tmp_path / "out")] and log.name == "log-2.txt"
    assert 290 < folder.left() < 300 - plan.END_S + 0.1
    assert isinstance(limit, partial) and limit("tests", 270.0) == 110.0
    row = folder.rows("command-2.json")["carried cache"]
    assert row["status"] == "missing" and "fill it with: python -m bench gpu-cache" in row["reason"]
