"""What ranks leave when a job hangs: under gloo for real, and the settings by which PyTorch does it under NCCL."""

import os
import time
from datetime import timedelta
from pathlib import Path

import nccl_dumps
import pytest
import torch
from nccl_dumps import dump, entry
from torch.distributed import distributed_c10d

from fastpref.errors import PeerError
from fastpref.run.record.hang import FOLDER, describe_hang, read_hang
from fastpref.testing.workers import RankPool
from fastpref.trainer.ranks import platform, traces
from fastpref.trainer.ranks.watch import PeerWatch

TIMEOUT_S = 1.0
VARIABLES = [name for names, _ in traces.SETTINGS for name in names]
VARIABLES += ["TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No variable of PyTorch's is set; afterwards they are as before."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def test_pytorch_is_told_to_record_and_where(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    traces.record_collectives(tmp_path)
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"] == str(tmp_path / "hang" / "trace_rank_")
    found = {name: os.environ[name] for name in VARIABLES if name in os.environ and "FILE" not in name}
    assert found == {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_ENABLE_MONITORING": "1",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
        "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "60000",
    }


def test_a_second_run_of_a_process_leaves_its_dumps_with_itself(
    environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("first", "second"):
        traces.record_collectives(tmp_path / name)
        assert os.environ["TORCH_FR_DUMP_TEMP_FILE"] == str(tmp_path / name / "hang" / "trace_rank_")
    environment.setenv("TORCH_FR_DUMP_TEMP_FILE", "/elsewhere/trace_rank_")
    traces.record_collectives(tmp_path / "third")
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"] == "/elsewhere/trace_rank_"


@pytest.mark.parametrize("name", VARIABLES)
def test_what_the_user_has_set_stays(environment: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    environment.setenv(name, "17")
    traces.record_collectives(tmp_path)
    assert os.environ[name] == "17"
    names = next((names for names, _ in traces.SETTINGS if name in names), VARIABLES[-2:])
    assert [other for other in names if other in os.environ] == [name]


@pytest.mark.parametrize(("world_size", "is_told"), [("2", True), ("1", False)])
def test_pytorch_is_told_before_the_group_is_made(
    environment: pytest.MonkeyPatch, tmp_path: Path, world_size: str, is_told: bool
) -> None:
    """Its watchdog and its recorder read the variables when they begin."""

    def join(timeout_s: float, launched: int | None) -> None:
        assert ("TORCH_FR_DUMP_TEMP_FILE" in os.environ) == is_told
        raise OSError("no network")

    launcher = {"WORLD_SIZE": world_size, "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in launcher.items():
        environment.setenv(name, value)
    environment.setattr(platform, "_join", join)
    with pytest.raises(OSError, match="no network"):
        platform.initialize_distributed(report_dir=tmp_path)


def hung(folder: Path, group: str) -> None:
    calls = [entry(0, group, "all_reduce", 1), entry(1, group, "all_reduce", 2, "started")]
    nccl_dumps.write(folder, {0: dump(calls, {group: [0, 1]}), 1: dump(calls[:1], {group: [0, 1]})})


def test_what_an_earlier_start_left_is_set_aside_with_a_report(tmp_path: Path) -> None:
    assert traces.set_aside_earlier(tmp_path) is None and traces.set_aside_earlier(tmp_path / "none") is None
    asides = []
    for group in ("7", "8"):
        hung(tmp_path / FOLDER, group)
        asides.append(traces.set_aside_earlier(tmp_path))
        assert asides[-1] is not None and not (tmp_path / FOLDER).exists()
        assert (asides[-1] / "report.txt").read_text().startswith(f"rank 1 did not enter all_reduce 2 of group {group}")
    assert asides[0] != asides[1]
    # of another node, a moment later; an empty folder is nobody's
    (tmp_path / FOLDER).mkdir()
    assert traces.set_aside_earlier(tmp_path) is None
    assert describe_hang(read_hang(asides[0])).startswith("rank 1 did not enter")


def hang_on_rank_2(folder: str) -> str:
    """Four ranks in two groups; rank 2 stays in its data loader for longer than the timeout."""
    platform.initialize_distributed(TIMEOUT_S)
    platform.initialize_model_parallel(tp=2, timeout_s=TIMEOUT_S)
    distributed_c10d._set_pg_timeout(timedelta(seconds=TIMEOUT_S), None)
    rank = torch.distributed.get_rank()
    state = Path(folder) / FOLDER / f"state_rank_{rank}"
    torch.distributed.all_reduce(torch.ones(3))
    try:
        with PeerWatch(Path(folder), TIMEOUT_S) as watch:
            with watch.phase(1, "reading data"):
                deadline = time.monotonic() + 20
                while rank == 2 and not state.exists() and time.monotonic() < deadline:
                    time.sleep(0.05)
                if rank == 2:
                    return state.read_text()
            with watch.phase(1, "training"):
                torch.distributed.all_reduce(torch.ones(7))
    except PeerError as error:
        return str(error)
    return "nothing"


def test_ranks_of_gloo_leave_a_record_too(tmp_path: Path) -> None:
    with RankPool(4, timeout_s=60.0) as pool:
        said = pool.run(hang_on_rank_2, str(tmp_path))
    assert '"phase": "reading data"' in said[2] and "in hang_on_rank_2" in said[2]
    for rank in (0, 1, 3):
        assert f"rank {rank} got no answer at step 1, training, in all_reduce" in said[rank]
        assert f"fastpref diagnose {tmp_path}" in said[rank]
    report = describe_hang(read_hang(tmp_path / FOLDER))
    assert report.startswith("rank 2 left no record of all_reduce")
    assert "(Float [7]), in which ranks 0, 1, 3 wait:" in report and "in hang_on_rank_2" in report
    assert "it left no dump" in report  # it went on


def stay_long(folder: str) -> list[bool]:
    """A phase that only takes long leaves nothing."""
    platform.initialize_distributed(TIMEOUT_S)
    state = Path(folder) / FOLDER / f"state_rank_{torch.distributed.get_rank()}"
    seen = []
    with PeerWatch(Path(folder), TIMEOUT_S) as watch:
        with watch.phase(1, "evaluating"):
            time.sleep(2)
            seen.append(state.exists())
        with watch.phase(2, "training"):
            time.sleep(0.6)
            seen.append(state.exists())
    platform.destroy()
    return seen


def test_a_long_phase_that_ends_takes_back_what_it_wrote(tmp_path: Path) -> None:
    with RankPool(2, timeout_s=60.0) as pool:
        assert pool.run(stay_long, str(tmp_path)) == [[True, False]] * 2
    assert list(tmp_path.iterdir()) == []


def signs(count: int) -> list[str]:
    platform.initialize_distributed()
    watch = PeerWatch(Path("/nowhere"))
    store = distributed_c10d._get_default_store()
    watch._size = count
    if torch.distributed.get_rank() == 0:
        for rank in range(1, count - 3):
            what = "reading data" if rank == 5 else "training"
            store.set(f"fastpref/sign-of-life/{rank}", f"{time.time() - 600 * (rank == 5):.1f} step 3, {what}")
    torch.distributed.barrier()
    begin = time.monotonic()
    found = watch._signs()
    assert time.monotonic() - begin < 5
    platform.destroy()
    return found


def test_signs_of_512_ranks_fit_into_a_message() -> None:
    with RankPool(2, timeout_s=60.0) as pool:
        found = pool.run(signs, 512)[0]
    assert found[0] == "rank 5: step 3, reading data, 600 s ago"
    assert [text.split(":")[0] for text in found[1:]] == ["ranks 1 to 4, 6 to 508", "ranks 509 to 511"]
