"""A trainer that nobody refers to any more is gone: its weights, its process groups, and the threads of those."""

import gc
import os
import weakref
from pathlib import Path
from typing import Any

import pytest

from checks.layout_parity.runs import EXPERTS, GEMMA, MODEL
from checks.tiny import tiny_pairs
from fastpref.trainer import (
    DPOConfig,
    DPOTrainer,
    ModelOptions,
    TrainingArguments,
    build_models,
    initialize_megatron,
)
from fastpref.trainer.ranks.platform import destroy

KINDS: dict[str, tuple[dict, dict[str, Any]]] = {
    "dense": (MODEL, {}),
    "sharded": (MODEL, {"use_distributed_optimizer": True}),
    "overlapped": (
        MODEL,
        {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True},
    ),
    "gemma": (GEMMA, {}),
    "recomputed": (MODEL, {"recompute_granularity": "full"}),
    "attention recomputed": (MODEL, {"recompute_granularity": "selective"}),
    "packed": (MODEL, {"packing": True}),
    "experts": (EXPERTS, {}),
    "balanced experts": ({**EXPERTS, "router_aux_loss_coef": 0.1}, {}),
    "experts recomputed": (EXPERTS, {"recompute_granularity": "full"}),
}


def gloo_threads() -> int:
    """Loops of gloo's groups; each of them wakes up a hundred times a second."""
    names = (Path("/proc/self/task") / task / "comm" for task in os.listdir("/proc/self/task"))
    return sum(name.read_text().strip() == "gloo_tcp_loop" for name in names)


def trained(kind: str, output_dir: Path) -> weakref.ref:
    config, settings = KINDS[kind]
    args = TrainingArguments(
        output_dir=str(output_dir), max_steps=1, report_to=(), gradient_accumulation_steps=2, **settings
    )
    initialize_megatron(args)
    try:
        models = build_models(config, ModelOptions(recompute_granularity=args.recompute_granularity), seed=0)
        data = tiny_pairs(4, 0, 32)
        trainer = DPOTrainer(models, DPOConfig(pref_loss="orpo"), None, args, train_dataset=data)
        trainer.train()
        return weakref.ref(models[0])
    finally:
        destroy()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_of_a_trainer_that_is_gone(tmp_path: Path, kind: str) -> None:
    trained("dense", tmp_path / "first")  # what is made once in a process
    gc.collect()
    before = gloo_threads()
    model = trained(kind, tmp_path / "run")
    gc.collect()
    assert model() is None
    assert gloo_threads() <= before
