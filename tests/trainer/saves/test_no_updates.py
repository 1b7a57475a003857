"""A checkpoint of a run whose steps were all skipped, as while fp16 looks for its loss scale, is one to go on from."""

from pathlib import Path
from typing import Any

import pytest
import torch
from saved_states import Built, built, save, take_steps

from checks.layout_parity.runs import EXPERTS, MODEL
from fastpref.trainer.saves import content

SHARDED, FP16, BF16 = {"use_distributed_optimizer": True}, {"fp16": True}, {"bf16": True}
CASES = {
    "plain fp32": (MODEL, {}),
    "plain fp16": (MODEL, FP16),
    "sharded fp32": (MODEL, SHARDED),
    "sharded fp16": (MODEL, {**SHARDED, **FP16}),
    "sharded bf16 experts": (EXPERTS, {**SHARDED, **BF16}),
    "plain fp16 experts": (EXPERTS, FP16),
}


def skip_a_step(run: Built) -> None:
    for parameter in run.models[0].parameters():
        parameter.main_grad.fill_(torch.inf)
    assert not run.optimizer.step()[0]


def weights(run: Built) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in run.models[0].parameters()]


@pytest.mark.parametrize("name", CASES)
def test_a_run_without_updates_goes_on_bitwise(tmp_path: Path, name: str) -> None:
    model, settings = CASES[name]
    config: dict[str, Any] = {**model, "num_hidden_layers": 2}
    scales = []
    with built(config, settings) as run:
        if settings.get("fp16"):
            skip_a_step(run)
        save(run, str(tmp_path))
        scales.append(run.optimizer.get_loss_scale().item())
        take_steps(run, 2)
        expected = weights(run)
    with built(config, settings, seed=9) as run:
        small = content.load_all(tmp_path / "step-1", run.models, run.optimizer)
        run.scheduler.load_state_dict(small["scheduler"])
        scales.append(run.optimizer.get_loss_scale().item())
        take_steps(run, 2)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(weights(run), expected, strict=True))
    assert scales[0] == scales[1]
