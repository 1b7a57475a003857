"""Runs that train some of the layers, or experts alone: saved on two ranks, they go on as one process would have."""

from pathlib import Path
from typing import Any

import pytest
from saved_states import Built, save

from checks.layout_parity.runs import EXPERTS
from checks.tiny import TINY_LLAMA, tiny_pairs
from fastpref.testing.workers import RankPool
from fastpref.trainer import DPOConfig, DPOTrainer, ModelOptions, TrainingArguments, build_models, initialize_megatron
from fastpref.trainer.ranks.platform import destroy
from fastpref.trainer.saves import content

PP2 = {"pipeline_model_parallel_size": 2}
DP2 = {"gradient_accumulation_steps": 1, "use_distributed_optimizer": True}
KINDS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "last layer": ({**TINY_LLAMA, "tie_word_embeddings": False}, ("embedding.", "decoder.layers.0.")),
    "first layer": ({**TINY_LLAMA, "tie_word_embeddings": False}, ("decoder.layers.1.",)),
    "experts": (EXPERTS, ("embedding.", "decoder.final", "output_layer", "norm", "attention", "router")),
}


def steps(kind: str, settings: dict[str, Any], root: str, numbers: list[int]) -> list[float]:
    """Losses and gradient norms of some steps, those behind the first from a checkpoint; one is left behind them."""
    config, frozen = KINDS[kind]
    args = TrainingArguments(
        **{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_grad_norm": 1.0} | settings,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_steps=4,
    )
    initialize_megatron(args)
    try:
        models = build_models(config, ModelOptions(sequence_parallel=args.sequence_parallel), seed=0)
        for chunk in models:
            first = chunk.decoder.layers[0].layer_number - 1 if chunk.decoder.layers else 0
            for name, parameter in chunk.named_parameters():
                number = name.removeprefix("decoder.layers.").partition(".")[0]
                # a stage counts its layers from 0
                whole = name.replace(number, str(first + int(number)), 1) if number.isdigit() else name
                parameter.requires_grad_(not any(part in whole for part in frozen))
        trainer = DPOTrainer(models, DPOConfig(beta=1.0), None, args, train_dataset=tiny_pairs(16, 4, 32))
        trainer.create_optimizer_and_scheduler(4)
        run = Built(trainer.models_wrapped, trainer.engine.optimizer, trainer.engine.lr_scheduler)
        if numbers[0]:
            small = content.load_all(Path(root, "step-1"), run.models, run.optimizer)
            run.scheduler.load_state_dict(small["scheduler"])
        found = []
        for number in numbers:
            result = trainer.engine.run_step(run.models, trainer.feed.train_batches(number), number + 1)
            found += [float(result.loss), float(result.grad_norm)]
        if not numbers[0]:
            save(run, root)
        return found
    finally:
        destroy()


@pytest.mark.parametrize(("kind", "layout"), [("last layer", PP2), ("first layer", DP2), ("experts", PP2)], ids=str)
def test_saved_run_goes_on_as_it_would_have(
    rank_pool_2: RankPool, tmp_path: Path, kind: str, layout: dict[str, Any]
) -> None:
    whole = steps(kind, {}, str(tmp_path / "whole"), [0, 1, 2, 3])
    for found in rank_pool_2.run(steps, kind, layout, str(tmp_path / "two"), [0, 1]):
        assert found == pytest.approx(whole[:4], rel=1e-4)
    alone = {name: value for name, value in layout.items() if name == "use_distributed_optimizer"}
    many = rank_pool_2.run(steps, kind, layout, str(tmp_path / "two"), [2, 3])
    for found in (*many, steps(kind, alone, str(tmp_path / "two"), [2, 3])):
        assert found == pytest.approx(whole[4:], rel=1e-4)
