"""Trainers under DeepSpeed ZeRO-3 on two ranks train like TRL's; `make parity-zero3` compares many more settings."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastpref.testing.workers import RankPool

pytest.importorskip("deepspeed", reason="needs DeepSpeed (pip install 'fastpref[deepspeed]')")

from checks.zero3_parity.runs import (
    STRICT,
    TRAINERS,
    ShortRun,
    check_evidence,
    difference,
    tolerance,
    train,
    write_files,
    zero3_ranks,
)

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    with zero3_ranks() as pool:
        yield pool


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("zero3")
    return write_files(folder, EXAMPLES / "tokenizer", EXAMPLES / "data/demo_train.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [{}, {"tied": True, "deepspeed": STRICT}, {"objective": "ORPO", "deepspeed": STRICT}],
    ids=["DPO", "DPO tied, weights freed", "ORPO, weights freed"],
)
def test_trains_like_trl(case: dict[str, Any], ranks: RankPool, files: str, tmp_path: Path) -> None:
    run = ShortRun(files=files, **case)
    theirs, ours = (
        ranks.run(train, run, trainer, str(tmp_path / str(index)))
        for index, trainer in enumerate(TRAINERS[run.objective])
    )
    check_evidence([*theirs, *ours])
    found = difference(ours[0], theirs[0])
    assert found.within(tolerance(theirs[0], None)), found
