"""The head over ranks of tensor parallelism: every part is checked before it is timed, and drawn from stored rows."""

import json
from pathlib import Path

import pytest

from bench import oracle, ranks
from fastpref.testing.workers import RankPool


def test_measure_shard_checks_and_times_every_implementation(rank_pool_2: RankPool) -> None:
    measured = rank_pool_2.run(ranks.measure_shard, "dry", 2)
    for rank in measured:
        assert list(rank) == list(ranks.NAMES)
        for row in rank.values():
            assert row["wrong"] is None and len(row["cpu_s"]) == len(row["wall_s"]) == 2
            assert all(row["errors"][name]["relative_l2"] <= limit for name, limit in oracle.LIMITS.items())


def rows(cpu_s: float, peak_mib: float) -> dict[str, dict]:
    row = {"wrong": None, "cpu_s": [9.0, cpu_s, 0.1], "wall_s": [cpu_s + 1], "extra_peak_mib": peak_mib}
    return {name: dict(row) for name in ranks.NAMES}


def test_busiest_takes_the_largest_median_of_the_ranks() -> None:
    measured = [rows(2.0, 70.0), rows(3.0, 50.0)]
    assert ranks.busiest(measured, "megatron") == (3.0, 4.0, 70.0)
    measured[1]["megatron"]["wrong"] = "d_weight: relative error 1.00e+00 exceeds 5e-04"
    with pytest.raises(ValueError, match="megatron on rank 1 of 2: d_weight"):
        ranks.busiest(measured, "megatron")


def test_draw_writes_a_picture_of_stored_rows(tmp_path: Path) -> None:
    shape = {"rows": 8, "positions": 16, "vocab": 64, "hidden": 4}
    row = json.loads(json.dumps({"shape": shape, "sizes": {1: [rows(2.0, 9.0)], 2: [rows(1.0, 5.0)] * 2}}))
    assert len(ranks.table(row).splitlines()) == 2 + 2 * len(ranks.NAMES)
    ranks.draw(row, tmp_path / "tp.png")
    assert (tmp_path / "tp.png").read_bytes()[:4] == b"\x89PNG"
