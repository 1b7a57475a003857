"""Who hung and where, from dumps in NCCL's format: against PyTorch's own analysis, and with what dumps may be."""

import argparse
import copyreg
import json
import logging
import os
import pickle
import time
import tracemalloc
from pathlib import Path
from typing import Any

import nccl_dumps
import pytest
from click.testing import CliRunner
from nccl_dumps import dump, entry

from fastpref.cli.commands import cli
from fastpref.errors import CheckpointError
from fastpref.run.record import flight_recorder
from fastpref.run.record.flight_recorder import read_dump
from fastpref.run.record.hang import describe_hang, read_hang

TP, DP = "1", "2"
WORLD = {"0": [0, 1, 2, 3]}
GROUPS = {
    0: {TP: [0, 1], DP: [0, 2]},
    1: {TP: [0, 1], DP: [1, 3]},
    2: {TP: [2, 3], DP: [0, 2]},
    3: {TP: [2, 3], DP: [1, 3]},
}


def said_of(folder: Path) -> str:
    return describe_hang(read_hang(folder))


def done(count: int, group: str = TP) -> list[dict]:
    return [entry(number, group, "all_reduce", number + 1) for number in range(count)]


def missing_from_dp(rank_without: int) -> dict[int, dict]:
    """Two data-parallel pairs of tensor-parallel pairs; one rank never makes its second tensor-parallel call."""
    dumps = {}
    for rank, groups in GROUPS.items():
        name = "DATA_PARALLEL_GROUP"
        calls = [*done(1), entry(1, DP, "_reduce_scatter_base", 1, description=name, out=(4, 4))]
        if rank != rank_without:
            calls.append(entry(2, TP, "all_reduce", 2, "started" if rank // 2 == rank_without // 2 else "completed"))
        if rank // 2 != rank_without // 2:  # the other pair goes on to its data-parallel call, and waits there
            calls.append(entry(3, DP, "_reduce_scatter_base", 2, "started", description=name, out=(4, 4)))
        elif rank != rank_without:  # asked for ahead of time, behind the one that hangs
            calls.append(entry(3, DP, "_reduce_scatter_base", 2, "scheduled", description=name, out=(4, 4)))
        dumps[rank] = dump(calls, groups)
    return dumps


@pytest.mark.parametrize("rank", range(4))
def test_the_rank_that_did_not_enter_is_named_behind_all_that_wait_for_each_other(tmp_path: Path, rank: int) -> None:
    said = said_of(nccl_dumps.write(tmp_path, missing_from_dp(rank)))
    other = rank ^ 1
    begin = f"rank {rank} did not enter all_reduce 2 of group 1 (TENSOR_MODEL_PARALLEL_GROUP) (Float [8, 4])"
    assert said.startswith(f"rank {rank} did not enter ") and f"{begin}, in which rank {other} waits:" in said
    assert not [line for line in said.splitlines() if line.startswith("rank ") and not line.startswith(f"rank {rank} ")]
    assert "/job/train.py:41 in train_step" in said
    assert f"rank {rank} was last in _reduce_scatter_base 1 of group 2 (DATA_PARALLEL_GROUP)" in said


def pytorchs_analysis(folder: Path, caplog: pytest.LogCaptureFixture) -> Any:
    from torch.distributed.flight_recorder.components.builder import build_db
    from torch.distributed.flight_recorder.components.loader import read_dir

    args = argparse.Namespace(
        trace_dir=str(folder), prefix="trace_rank_", selected_ranks=None, pg_filters=None, just_print_entries=False,
        allow_incomplete_ranks=False, mismatch_cap=10, print_stack_trace=False, verbose=False, mast_job_id=None,
    )  # fmt: skip
    details, version = read_dir(args)
    with caplog.at_level(logging.INFO):
        return build_db(details, args, version)


def test_pytorchs_own_analysis_finds_the_same_rank(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    builder = pytest.importorskip("torch.distributed.flight_recorder.components.builder")
    assert builder
    calls = [[*done(3), entry(3, TP, "all_reduce", 4, "started")] if rank != 2 else done(3) for rank in range(4)]
    folder = nccl_dumps.write(tmp_path, {rank: dump(calls[rank], {TP: [0, 1, 2, 3]}) for rank in range(4)})
    missing = {
        rank for collective in pytorchs_analysis(folder, caplog).collectives for rank in collective.missing_ranks or ()
    }
    assert missing == {2}
    said = said_of(folder)
    assert said.startswith("rank 2 did not enter all_reduce 4 of group 1") and "ranks 0, 1, 3 wait:" in said


@pytest.mark.parametrize(
    ("odd", "told"),
    [
        (entry(1, TP, "_allgather_base", 2, "started"), "_allgather_base 2"),
        (entry(1, TP, "all_reduce", 2, "started", shape=(9, 4)), "Float [9, 4]"),
        (entry(1, TP, "all_reduce", 2, "started", dtype="BFloat16"), "BFloat16 [8, 4]"),
    ],
    ids=["operation", "shape", "dtype"],
)
def test_a_call_that_differs(tmp_path: Path, odd: dict, told: str) -> None:
    calls = {rank: [*done(1), odd if rank == 1 else entry(1, TP, "all_reduce", 2, "started")] for rank in range(4)}
    said = said_of(nccl_dumps.write(tmp_path, {rank: dump(calls[rank], {TP: [0, 1, 2, 3]}) for rank in range(4)}))
    assert "Call 2 of group 1 (TENSOR_MODEL_PARALLEL_GROUP) is not the same on all ranks" in said
    first, second = [line for line in said.splitlines() if " on rank" in line]
    assert told in first and first.endswith("on rank 1:") and second.endswith("on ranks 0, 2, 3:")


def test_shapes_that_may_differ_are_no_fault(tmp_path: Path) -> None:
    calls = {
        rank: [*done(1), entry(1, TP, "all_to_allv", 2, "started", shape=(rank, 4))] if rank else done(1)
        for rank in range(3)
    }
    said = said_of(nccl_dumps.write(tmp_path, {rank: dump(calls[rank], {TP: [0, 1, 2]}) for rank in range(3)}))
    assert "not the same" not in said and said.startswith("rank 0 did not enter all_to_allv 2")


def test_a_rank_without_a_dump(tmp_path: Path) -> None:
    calls = [*done(3), entry(3, TP, "all_reduce", 4, "started")]
    folder = nccl_dumps.write(tmp_path, {rank: dump(calls, {TP: [0, 1, 2, 3]}) for rank in (0, 1, 3)})
    said = said_of(folder)
    assert said.startswith("rank 2 left no record of all_reduce 4") and "it left no dump" in said
    assert "No dump: rank 2." in said


def test_two_ranks_in_each_others_groups(tmp_path: Path) -> None:
    """Ranks 0 and 1 make the same two calls in another order."""
    both = {TP: [0, 1], DP: [0, 1]}
    calls = [entry(1, TP, "all_reduce", 2, "started"), entry(2, DP, "all_reduce", 1, "scheduled", description="DP")]
    turned = [entry(1, DP, "all_reduce", 1, "started", description="DP"), entry(2, TP, "all_reduce", 2, "scheduled")]
    dumps = {0: dump([*done(1), *calls], both), 1: dump([*done(1), *turned], both)}
    said = said_of(nccl_dumps.write(tmp_path, dumps))
    assert "rank 0 itself waits in all_reduce 2 of group 1" in said
    assert "rank 1 itself waits in all_reduce 1 of group 2" in said


def test_all_are_there_and_nothing_moves(tmp_path: Path) -> None:
    calls = [*done(1), entry(1, TP, "all_reduce", 2, "started")]
    said = said_of(nccl_dumps.write(tmp_path, {rank: dump(calls, {TP: [0, 1]}) for rank in range(2)}))
    assert said.startswith("Every rank entered all_reduce 2") and "network" in said


def test_no_hang_is_none(tmp_path: Path) -> None:
    said = said_of(nccl_dumps.write(tmp_path, {rank: dump(done(3), {TP: [0, 1]}) for rank in range(2)}))
    assert "show no hang" in said


def test_a_receive_that_nobody_sends_for(tmp_path: Path) -> None:
    groups = {"5": [4, 6]}
    received = entry(1, "5", "recv 1<-0", 1, "started", p2p=True, description="PIPELINE")
    dumps = {6: dump([*done(1), received], {**groups, TP: [6]}), 4: dump(done(1), {**groups, TP: [4]})}
    said = said_of(nccl_dumps.write(tmp_path, dumps))
    assert said.startswith("rank 4 did not enter recv 1 of group 5 (PIPELINE)") and "rank 6 waits" in said


def test_what_a_full_recorder_forgot_was_done(tmp_path: Path) -> None:
    """Rank 0's record begins after the call in which rank 1 seems alone: it is rank 2 that is missing."""
    late = [entry(5000 + number, DP, "all_reduce", number + 1, description="DP") for number in range(2)]
    waiting = [*done(1), entry(1, TP, "all_reduce", 2, "started")]
    groups = {TP: [0, 1, 2], DP: [0, 3]}
    dumps = {0: dump(late, groups), 1: dump(waiting, {TP: [0, 1, 2]}), 2: dump(done(1), {TP: [0, 1, 2]})}
    assert said_of(nccl_dumps.write(tmp_path, dumps)).startswith("rank 2 did not enter all_reduce 2")


def test_many_ranks_are_named_shortly(tmp_path: Path) -> None:
    members = list(range(64))
    calls = [*done(1), entry(1, TP, "all_reduce", 2, "started")]
    dumps = {rank: dump(done(1) if rank == 17 else calls, {TP: members}) for rank in members}
    said = said_of(nccl_dumps.write(tmp_path, dumps))
    assert "rank 17 did not enter all_reduce 2" in said and "ranks 0 to 16, 18 to 63 wait" in said
    assert len(said) < 2000


def batch(first: int, group: str, exchanges: tuple[str, ...], state: str) -> list[dict]:
    """Sends and receives started together: each is recorded, and only the call that starts them tells its state."""
    parts = [entry(first + n, group, op, 1, "scheduled", p2p=True) for n, op in enumerate(exchanges)]
    return [*parts, entry(first + len(parts), group, "coalesced", 1, state, p2p=True)]


@pytest.mark.parametrize("missing", range(4))
@pytest.mark.parametrize("is_ring", [True, False])
def test_the_rank_that_all_exchanges_wait_for(tmp_path: Path, missing: int, is_ring: bool) -> None:
    """Whichever of its two exchanges with neighbours was recorded first."""
    dumps = {}
    for rank in range(4):
        neighbours = [rank + 1, rank - 1] if is_ring else [other for other in (rank - 1, rank + 1) if 0 <= other < 4]
        ends = zip(("send", "recv"), neighbours, strict=False) if is_ring else [("sr", other) for other in neighbours]
        operations: list[str] = []
        for op, other in ends:
            operations += [f"send {rank}->{other % 4}"] if "s" in op else []
            operations += [f"recv {rank}<-{other % 4}"] if "r" in op else []
        dumps[rank] = dump(batch(0, "9", tuple(operations), "started") if rank != missing else [], {"9": [0, 1, 2, 3]})
    said = said_of(nccl_dumps.write(tmp_path, dumps))
    accused = {line.split(" did not")[0] for line in said.splitlines() if " did not " in line}
    assert accused == {f"rank {missing}"} and "network" not in said


@pytest.mark.parametrize("size", [2, 3])
def test_a_circle_of_sends_is_no_fault_of_the_network(tmp_path: Path, size: int) -> None:
    sends = {rank: [entry(0, "9", f"send {rank}->{(rank + 1) % size}", 1, "started", p2p=True)] for rank in range(size)}
    said = said_of(nccl_dumps.write(tmp_path, {rank: dump(sends[rank], {"9": [*range(size)]}) for rank in sends}))
    for rank in range(size):
        other = (rank + 1) % size
        assert f"rank {rank} itself waits in send 1 of group 9 (TENSOR_MODEL_PARALLEL_GROUP) to rank {other} " in said
    assert "network" not in said


def test_both_sides_of_an_exchange_that_does_not_move(tmp_path: Path) -> None:
    calls = [
        entry(0, "9", op, 1, "started", p2p=True, shape=(8 + n,)) for n, op in enumerate(("send 0->1", "recv 1<-0"))
    ]
    said = said_of(nccl_dumps.write(tmp_path, {rank: dump([calls[rank]], {"9": [3, 5]}) for rank in (0, 1)}))
    assert "network" in said
    said = said_of(nccl_dumps.write(tmp_path / "job", {3 + 2 * n: dump([calls[n]], {"9": [3, 5]}) for n in (0, 1)}))
    assert said.startswith("ranks 3, 5 entered send 1 of group 9") and "to rank 5 (Float [8])" in said
    assert "from rank 3 (Float [9])" in said and "network" in said


def test_a_group_that_a_full_recorder_never_saw_was_not_entered(tmp_path: Path) -> None:
    """The group is first used after thousands of other calls, of which rank 1's record remembers the last ones."""
    busy = [entry(5000 + number, TP, "all_reduce", number + 1) for number in range(9)]
    waiting = [*busy, entry(5009, DP, "all_reduce", 1, "started", description="DP")]
    dumps = {rank: dump(waiting if rank == 0 else busy, {TP: [0, 1], DP: [0, 1]}) for rank in range(2)}
    assert said_of(nccl_dumps.write(tmp_path, dumps)).startswith("rank 1 did not enter all_reduce 1 of group 2 (DP)")


def test_ranks_of_which_the_same_is_to_be_said_are_named_together(tmp_path: Path) -> None:
    calls = [*done(1), entry(1, TP, "all_reduce", 2, "started")]
    members = [*range(64)]
    node = nccl_dumps.write(tmp_path / "node", {rank: dump(calls, {TP: members}) for rank in range(8)})
    said = said_of(node)
    assert said.startswith("ranks 8 to 63 left no record of all_reduce 2") and len(said.splitlines()) < 10
    alone = {rank: dump(done(1) if rank else calls, {TP: members}) for rank in members}
    said = said_of(nccl_dumps.write(tmp_path / "alone", alone))
    assert said.startswith("ranks 1 to 63 did not enter all_reduce 2") and len(said.splitlines()) < 10
    for rank in range(64):
        (node / f"trace_rank_{rank}").write_bytes(b"")
    assert len(said_of(node).splitlines()) < 30


# --- files


@pytest.mark.parametrize("dumps", [{}, {0: dump([], {})}, {rank: dump(done(2), {TP: [0, 1]}) for rank in (0, 1)}])
def test_where_ranks_stand_is_said_where_dumps_say_nothing(tmp_path: Path, dumps: dict) -> None:
    folder = nccl_dumps.write(tmp_path, dumps)
    for rank in (1, 2):
        (folder / f"state_rank_{rank}").write_bytes(state(rank))
    said = said_of(folder)
    assert said.startswith("ranks 1, 2 stood for most of the timeout:") and "no hang" not in said
    assert "step 7, reading data, for 540 s on node-3, in\n    /job/feed.py:12 in train_batches" in said


def test_a_timeout_of_days_is_no_earlier_start(tmp_path: Path) -> None:
    """A state is written at nine tenths of the timeout, and dumps up to one apart."""
    dumps = missing_from_dp(1)
    for content in dumps.values():
        for call in content["entries"]:
            call["timeout_ms"] = 2 * 86_400_000
    folder = nccl_dumps.write(tmp_path, dumps)
    (folder / "state_rank_1").write_bytes(json.dumps({**json.loads(state(1)), "seconds": 1.8 * 86400}).encode())
    ages = {"state_rank_1": 0.2 * 86400, "trace_rank_2": 86400}
    for name, age in ages.items():
        when = time.time() - age
        os.utime(folder / name, (when, when))
    said = said_of(folder)
    assert "older" not in said and "No dump" not in said and "step 7, reading data" in said


LIST, DICT, KEEP, GET = b"]", b"}", b"q\x01", b"h\x01"
DOUBLED = b"".join(GET + GET + b"\x86" + KEEP for _ in range(60))  # pairs of pairs of pairs ...
HOSTILE = {
    "key": b"\x80\x02" + DICT + b"(" + b")" + KEEP + DOUBLED + b"K\x01u.",
    "bytearray": b"\x80\x05\x96" + (2**36).to_bytes(8, "little") + b".",
    "registered": b"\x80\x02\x82\x01.",
    "lists": b"\x80\x02" + LIST * 1002,
    "references": b"\x80\x04" + LIST + b"\x94" * 1002,
}


def doubled() -> list:
    value: list = []
    for _ in range(60):
        value = [value, value]
    return value


@pytest.mark.parametrize("name", HOSTILE)
def test_a_small_pickle_that_asks_for_much_gets_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(flight_recorder, "_MAX_THINGS", 1000)
    (tmp_path / "trace_rank_0").write_bytes(HOSTILE[name])
    copyreg.add_extension("posix", "system", 1)
    try:
        with pytest.raises(CheckpointError, match="cut off or damaged"):
            read_dump(tmp_path / "trace_rank_0")
    finally:
        copyreg.remove_extension("posix", "system", 1)


@pytest.mark.parametrize("field", ["profiling_name", "state", "version", "ranks", "input_sizes"])
def test_values_inside_of_each_other_are_not_written_out(tmp_path: Path, field: str) -> None:
    content = dump([{**done(1)[0], **({field: doubled()} if field in done(1)[0] else {})}], {TP: [0]})
    content |= {"version": doubled()} if field == "version" else {}
    content |= {"pg_config": {TP: {"ranks": doubled()}}} if field == "ranks" else {}
    nccl_dumps.write(tmp_path, {0: content})
    with pytest.raises(CheckpointError, match="cut off or damaged"):
        read_dump(tmp_path / "trace_rank_0")


def test_what_is_written_once_is_kept_once(tmp_path: Path) -> None:
    """A thousand calls share a stack and shapes; memory is that of one dump's objects, whatever is shared."""
    frames = [{"name": "f", "filename": "/job/train.py", "line": line} for line in range(1000)]
    shapes = [[8] * 64] * 1000
    calls = [{**call, "frames": frames, "input_sizes": shapes} for call in done(1000)]
    nccl_dumps.write(tmp_path, {0: dump(calls, {TP: [0]})})
    tracemalloc.start()
    read = read_dump(tmp_path / "trace_rank_0")
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 2**20 and len({id(call.frames) for call in read.calls}) == 1


def state(rank: int) -> bytes:
    return json.dumps({
        "world_size": 4, "step": 7, "phase": "reading data", "seconds": 540.0, "host": "node-3", "time": 0.0,
        "stack": ["/job/feed.py:12 in train_batches"], "groups": {},
    }).encode()  # fmt: skip


def test_what_a_rank_was_doing_is_said(tmp_path: Path) -> None:
    folder = nccl_dumps.write(tmp_path, missing_from_dp(1))
    (folder / "state_rank_1").write_bytes(state(1))
    said = said_of(folder)
    assert "step 7, reading data, for 540 s on node-3, in\n    /job/feed.py:12 in train_batches" in said


class Evil:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("inside", [False, True])
def test_a_pickle_that_would_run_something_is_refused(tmp_path: Path, inside: bool) -> None:
    folder = nccl_dumps.write(tmp_path / "hang", missing_from_dp(1))
    evil = Evil(str(tmp_path / "ran"))
    content = {**dump([], {}), "entries": [evil]} if inside else evil
    (folder / "trace_rank_0").write_bytes(pickle.dumps(content))
    said = said_of(folder)
    assert not (tmp_path / "ran").exists()
    assert "trace_rank_0 asks for posix.system" in said and "was not run" in said
    with pytest.raises(CheckpointError, match=r"asks for posix\.system"):
        read_dump(folder / "trace_rank_0")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "cut off or damaged"),
        (b"\x80\x02}q\x00", "cut off or damaged"),
        (b"\x80\x04Nr\xff\xff\xff\x7f.", "holds no dict"),  # an index that a faster reader makes room for
        (b"\x80\x02]" + b"(" * 100_000, "cut off or damaged"),
        (b"\x80\x02\x8b\x04\x00\x00\x00", "cut off or damaged"),
        (b"{" * 100_000, "cut off or damaged"),
        (pickle.dumps([1]), "holds no dict"),
        (pickle.dumps(dump(done(1), {TP: [0]}, version="3.0")), "version 3.0"),
        (pickle.dumps(dump(done(1), {TP: [0]}, version="1.5")), "version 1.5"),
        (pickle.dumps({**dump(done(1), {}), "entries": [{}]}), "cut off or damaged"),
        (pickle.dumps(dump([{**done(1)[0], "collective_seq_id": 10**5000}], {})), "cut off or damaged"),
        (pickle.dumps({**dump(done(1), {}), "pg_config": {"1": {"ranks": "__import__('os')"}}}), "cut off or damaged"),
        (pickle.dumps(dump(done(1), {TP: [0, 999_999_999]})), "cut off or damaged"),
        (pickle.dumps(dump(done(1), {TP: [0, 10**20]})), "cut off or damaged"),
    ],
)
def test_a_dump_that_is_none_leaves_the_others_readable(tmp_path: Path, content: bytes, told: str) -> None:
    folder = nccl_dumps.write(tmp_path, missing_from_dp(1))
    (folder / "trace_rank_3").write_bytes(content)
    said = said_of(folder)
    assert "trace_rank_3" in said and told in said
    assert "rank 1 did not enter all_reduce 2" in said


@pytest.mark.parametrize("change", [{"world_size": 10**12}, {"groups": {"1": [10**12]}}, {"world_size": -1}], ids=str)
def test_a_state_of_more_ranks_than_there_are(tmp_path: Path, change: dict) -> None:
    folder = nccl_dumps.write(tmp_path, missing_from_dp(1))
    (folder / "state_rank_1").write_bytes(json.dumps({**json.loads(state(1)), **change}).encode())
    (folder / "trace_rank_999999999").write_bytes(state(1))
    said = said_of(folder)
    assert "state_rank_1 is cut off or damaged" in said and said.startswith("rank 1 did not enter all_reduce 2")
    assert "999999999" not in said


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    folder = nccl_dumps.write(tmp_path, missing_from_dp(1))
    os.mkfifo(folder / "state_rank_0")
    for rank, target in {4: "/dev/zero", 5: "nowhere"}.items():
        (folder / f"trace_rank_{rank}").symlink_to(target)
    (folder / "trace_rank_6").mkdir()
    said = said_of(folder)
    assert said.startswith("rank 1 did not enter all_reduce 2")
    assert all(f"{name} is no file" in said for name in ("state_rank_0", *(f"trace_rank_{n}" for n in (4, 5, 6))))


def test_a_dump_that_was_cut_anywhere(tmp_path: Path) -> None:
    content = pickle.dumps(missing_from_dp(1)[0], protocol=2)
    for length in range(0, len(content) - 1, 37):
        (tmp_path / "trace_rank_0").write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"cut off or damaged|holds no dict"):
            read_dump(tmp_path / "trace_rank_0")


def test_names_that_pytorch_gives_dumps_by_itself(tmp_path: Path) -> None:
    folder = nccl_dumps.write(tmp_path, missing_from_dp(1))
    expected = said_of(folder)
    for prefix in ("nccl_", "comm_lib_"):
        for path in list(folder.iterdir()):
            path.rename(folder / f"{prefix}{path.name.rpartition('lib_')[2].removeprefix('nccl_')}")
        assert CliRunner().invoke(cli, ["diagnose", str(folder)]).stdout == expected
    (folder / "trace_rank_0").write_bytes((folder / "comm_lib_trace_rank_0").read_bytes())
    (folder / "comm_lib_trace_rank_0").write_bytes(b"")
    assert said_of(folder) == expected


def test_json_and_older_versions_say_the_same(tmp_path: Path) -> None:
    dumps = missing_from_dp(1)
    expected = said_of(nccl_dumps.write(tmp_path / "pickle", dumps))
    old = {rank: {**content, "version": "2.3"} for rank, content in dumps.items()}
    for content in old.values():
        content["entries"] = [{k: v for k, v in call.items() if k != "is_p2p"} for call in content["entries"]]
    assert said_of(nccl_dumps.write(tmp_path / "old", old)) == expected
    (tmp_path / "json").mkdir()
    for rank, content in dumps.items():
        (tmp_path / "json" / f"trace_rank_{rank}").write_text(json.dumps(content))
    assert said_of(tmp_path / "json") == expected


def test_dumps_of_an_earlier_day_are_not_of_this_hang(tmp_path: Path) -> None:
    folder = nccl_dumps.write(tmp_path, missing_from_dp(1))
    old = time.time() - 86400
    os.utime(folder / "trace_rank_1", (old, old))
    said = said_of(folder)
    assert "trace_rank_1 is more than an hour older" in said and "its dump says nothing" in said


def test_the_command(tmp_path: Path) -> None:
    nccl_dumps.write(tmp_path / "out" / "hang", missing_from_dp(1))
    for folder in (tmp_path / "out", tmp_path / "out" / "hang"):
        result = CliRunner().invoke(cli, ["diagnose", str(folder)])
        assert result.exit_code == 0 and result.stdout.startswith("rank 1 did not enter all_reduce 2"), result.output
    result = CliRunner().invoke(cli, ["diagnose", str(tmp_path)])
    assert result.exit_code == 4 and "no rank of the last start left a dump" in result.stderr


def test_the_command_says_where_else_to_look(tmp_path: Path) -> None:
    """A job that queued itself again has set aside what its earlier starts left."""
    result = CliRunner().invoke(cli, ["diagnose", str(tmp_path / "nowhere")])
    assert result.exit_code == 4 and f"{tmp_path / 'nowhere'} is not a directory" in result.stderr
    for day in ("20260102", "20260103"):
        nccl_dumps.write(tmp_path / f"hang-{day}-040506", missing_from_dp(1))
    (tmp_path / "hang-20260104-040506").mkdir()
    result = CliRunner().invoke(cli, ["diagnose", str(tmp_path)])
    newest = tmp_path / "hang-20260103-040506"
    assert result.exit_code == 4 and f"an earlier start left {newest}; diagnose that" in result.stderr
    assert CliRunner().invoke(cli, ["diagnose", str(newest)]).stdout.startswith("rank 1 did not enter all_reduce 2")


def test_what_a_terminal_would_obey_is_not_shown(tmp_path: Path) -> None:
    calls = [*done(1), entry(1, TP, "all_reduce\x1b[2J", 2, "started")]
    dumps = {0: dump(calls, {TP: [0, 1]}), 1: dump(done(1), {TP: [0, 1]})}
    assert "\x1b" not in said_of(nccl_dumps.write(tmp_path, dumps))
    calls = [entry(0, TP, "all_reduce", 1, "started\x1b[2J")]
    for content in (pickle.dumps(dump(calls, {TP: [0, 1]})), b"\x80\x02c\x1b[2Jos\nsys\x1btem\n.",
                    pickle.dumps(dump([], {}, version="\x1b[2J3"))):  # fmt: skip
        for rank in range(2):
            (tmp_path / f"trace_rank_{rank}").write_bytes(content)
        assert "\x1b" not in said_of(tmp_path)
