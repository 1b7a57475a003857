"""The commands on two ranks, as torchrun starts them."""

import json
import os
from pathlib import Path

import pytest
import torch.distributed
from click.testing import CliRunner
from tiny_project import write_pairs

from fastpref.testing.workers import RankPool
from fastpref.trainer.ranks import platform


def run_on_rank(folders: list[str], arguments: list[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command that this rank runs in its own folder."""
    from fastpref.cli.commands import cli

    platform.initialize_distributed()
    os.chdir(folders[torch.distributed.get_rank()])
    try:
        result = CliRunner().invoke(cli, arguments)
    finally:
        platform.destroy()
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize("layout", ["tensor", "data"])
def test_train_on_two_ranks_equals_one(project: Path, run_cli, rank_pool_2: RankPool, layout: str) -> None:
    settings = ["train", "run.yaml", "training.max_steps=3"]
    assert run_cli(*settings, "training.output_dir=one").exit_code == 0
    change = "training.tensor_model_parallel_size=2" if layout == "tensor" else "training.gradient_accumulation_steps=1"
    arguments = [*settings, change, "training.output_dir=two", "--export", "model"]
    (code, shown, errors), (other_code, other_shown, other_errors) = rank_pool_2.run(
        run_on_rank, [str(project)] * 2, arguments
    )
    assert (code, other_code) == (0, 0), errors
    assert other_shown == "" and "fastpref" not in other_errors
    assert "FutureWarning" not in errors
    assert "optimizer steps" in shown and "Hugging Face model" in shown
    assert {path.name for path in (project / "two").iterdir()} == {"config.yaml", "metrics.jsonl", "checkpoints"}
    assert (project / "model" / "model.safetensors").exists()
    one, two = (
        [json.loads(line) for line in (project / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert [record["step"] for record in two] == [record["step"] for record in one]
    names = ("loss", "eval_loss", "rewards/margins", "logps/chosen", "eval_logps/rejected")
    for name in names:
        ours, theirs = (torch.tensor([record[name] for record in run if name in record]) for run in (two, one))
        assert len(ours) == (1 if name.startswith("eval") else 3)
        torch.testing.assert_close(ours, theirs)


def test_ranks_that_read_other_data_stop(project: Path, rank_pool_2: RankPool) -> None:
    other = project / "node1"
    other.mkdir()
    (other / "run.yaml").write_text((project / "run.yaml").read_text())
    write_pairs(other / "pairs.jsonl", 10, start=1)
    write_pairs(other / "held_out.jsonl", 4, start=10)
    results = rank_pool_2.run(run_on_rank, [str(project), str(other)], ["train", "run.yaml"])
    assert [code for code, _, _ in results] == [3, 3]
    assert "fastpref: data error: ranks 1 read other training or evaluation pairs than rank 0" in results[0][2]
    assert results[1][2] == ""


def test_setting_that_all_ranks_refuse_is_said_once(project: Path, rank_pool_2: RankPool) -> None:
    results = rank_pool_2.run(run_on_rank, [str(project)] * 2, ["train", "run.yaml", "training.sed=1"])
    assert [code for code, _, _ in results] == [2, 2]
    assert "did you mean seed?" in results[0][2]
    assert results[1][2] == ""


def test_data_that_one_rank_refuses_is_said_by_it(project: Path, rank_pool_2: RankPool) -> None:
    arguments = ["check", "run.yaml"]
    other = project / "node1"
    other.mkdir()
    (other / "run.yaml").write_text((project / "run.yaml").read_text())
    results = rank_pool_2.run(run_on_rank, [str(project), str(other)], arguments)
    assert [code for code, _, _ in results] == [0, 2]
    heading, train, evaluation = results[1][2].splitlines()
    assert heading == "[rank 1] fastpref: config error: 2 problems:"
    assert train.startswith("  data.train: 'pairs.jsonl' does not exist; relative paths start at")
    assert evaluation.startswith("  data.eval: 'held_out.jsonl' does not exist")
