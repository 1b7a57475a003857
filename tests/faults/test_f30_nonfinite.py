"""Faults 30 to 32: a NaN or an infinity on one rank stops or skips the step on all, and says where it came from."""

import json
from pathlib import Path

import pytest
import torch

from checks.tiny import stock_model, tiny_pairs
from fastpref.errors import ConfigError, NonFiniteError
from fastpref.testing.workers import RankPool
from fastpref.trainer import DPOConfig, DPOTrainer, TrainingArguments, initialize_megatron
from fastpref.trainer.ranks.platform import destroy

PAIRS = tiny_pairs(40, seed=4)


def train_with_poison(output_dir: str, where: str, rank: int, steps: list[int], options: dict) -> dict:
    """Six steps on this rank; at the steps named, `rank` gets a NaN in its reference or in a gradient."""
    args = TrainingArguments(
        output_dir=output_dir,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        max_steps=6,
        logging_steps=1,
        report_to=(),
        disable_progress=True,
        save_on_end=False,
        save_steps=1,
        **options,
    )
    initialize_megatron(args)
    try:
        trainer = DPOTrainer(stock_model(0), DPOConfig(), None, args, train_dataset=PAIRS)
        poison = Poison(trainer, where, steps if torch.distributed.get_rank() == rank else [])
        error = None
        try:
            trainer.train()
        except NonFiniteError as caught:
            error = str(caught)
        weights = torch.cat([parameter.detach().flatten() for parameter in trainer.model[0].parameters()])
        return {"error": error, "log": trainer.log_history, "weights": weights, "batches": poison.batches}
    finally:
        destroy()


class Poison:
    """Wraps a trainer's `run_step`: remembers the pairs of every step, and spoils some of them."""

    def __init__(self, trainer: DPOTrainer, where: str, steps: list[int]) -> None:
        self.batches: list[list[int]] = []
        self._run, self._where, self._steps = trainer.engine.run_step, where, steps
        self._now = False
        trainer.engine.run_step = self.run_step
        trainer.engine.reference.attach = self._spoiled(trainer.engine.reference.attach)
        weight = trainer.model[0].decoder.layers[0].mlp.linear_fc2.weight
        weight.register_hook(lambda d: torch.full_like(d, float("inf")) if self._is_on("gradient") else None)

    def _is_on(self, where: str) -> bool:
        return self._now and self._where == where

    def _spoiled(self, attach):
        def spoil(batches, dataset):
            batches = attach(batches, dataset)
            if self._is_on("loss"):
                batches[0].ref_logps_S[1] = float("nan")
            return batches

        return spoil

    def run_step(self, models, batches, step, signals):
        self.batches.append([pair for batch in batches for pair in batch.pair_ids_B.tolist()])
        self._now = step in self._steps
        return self._run(models, batches, step, signals)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_train_stops_all_ranks_before_the_update(rank_pool_2: RankPool, tmp_path: Path, where: str) -> None:
    """Exactly the parameters of the step before; a record with rank, step, pairs and numbers; checkpoints intact."""
    poisoned = rank_pool_2.run(train_with_poison, str(tmp_path / "bad"), where, 1, [3], {})
    clean = rank_pool_2.run(train_with_poison, str(tmp_path / "clean"), where, 1, [], {"resume_from_checkpoint": None})
    assert poisoned[0]["error"] == poisoned[1]["error"]
    first = "rank 1: loss" if where == "loss" else "rank 0: a gradient"  # which is summed over the ranks by then
    assert f"at step 3; no parameter was updated on any rank. {first} is NaN" in poisoned[0]["error"]
    assert torch.equal(poisoned[0]["weights"], poisoned[1]["weights"])
    assert not torch.equal(poisoned[0]["weights"], clean[0]["weights"])
    resumed = rank_pool_2.run(
        train_with_poison, str(tmp_path / "bad"), where, 1, [], {"resume_from_checkpoint": "latest"}
    )
    assert torch.equal(resumed[0]["weights"], clean[0]["weights"])
    record = json.loads((tmp_path / "bad" / "nonfinite" / "step-3.json").read_text())
    assert record["step"] == 3
    if where == "loss":
        (finding,) = record["findings"]
        (pair,) = finding["pairs"]
        second = poisoned[1]["batches"][2][1]
        assert (finding["rank"], pair["pair_id"], pair["source"]) == (1, second, PAIRS[second].source)
        assert pair["loss"] == pair["ref_logps/chosen"] == "nan" and float(pair["logps/chosen"]) < 0
    else:
        assert record["findings"] == [{"rank": 0, "pairs": []}, {"rank": 1, "pairs": []}]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_train_skips_at_most_three_steps_in_a_row(rank_pool_2: RankPool, tmp_path: Path, where: str) -> None:
    options = {"on_nonfinite": "skip"}
    clean = rank_pool_2.run(train_with_poison, str(tmp_path / "clean"), where, 0, [], options)[0]
    skipped = rank_pool_2.run(train_with_poison, str(tmp_path / "skip"), where, 0, [2, 3, 4, 6], options)[0]
    assert skipped["error"] is None
    assert [record["skipped_iter"] for record in skipped["log"]] == [0, 1, 1, 1, 0, 1]
    assert skipped["batches"] == clean["batches"]  # the data position moves on as if nothing had been left out
    assert skipped["log"][0]["loss"] == clean["log"][0]["loss"] and "loss" not in skipped["log"][1]
    assert skipped["weights"].isfinite().all()
    four = rank_pool_2.run(train_with_poison, str(tmp_path / "four"), where, 0, [2, 3, 4, 5], options)[0]
    assert "at step 5" in four["error"] and len(four["log"]) == 4


def test_on_nonfinite_takes_two_values() -> None:
    with pytest.raises(ConfigError, match="on_nonfinite must be one of stop, skip; got 'ignore'"):
        TrainingArguments(on_nonfinite="ignore")
