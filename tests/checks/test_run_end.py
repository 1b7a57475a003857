"""How a run ended: every bit of its last checkpoint and of its log counts."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from checks.run_end import RunEnd, difference, read_end
from checks.tiny import stock_model, tiny_pairs
from fastpref.checkpoint import manifest
from fastpref.errors import CheckpointError
from fastpref.trainer import DPOConfig, DPOTrainer, TrainingArguments, initialize_megatron
from fastpref.trainer.ranks.platform import destroy


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """Output directory of a run of two steps, and the weights it ended with."""
    output = tmp_path_factory.mktemp("run")
    settings = {"learning_rate": 1e-2, "max_steps": 2, "logging_steps": 1, "report_to": (), "disable_progress": True}
    args = TrainingArguments(output_dir=str(output), **settings)
    initialize_megatron(args)
    try:
        trainer = DPOTrainer(stock_model(0), DPOConfig(), None, args, train_dataset=tiny_pairs(4))
        trainer.train()
        return output, {name: weight.detach().clone() for name, weight in trainer.model[0].named_parameters()}
    finally:
        destroy()


def test_read_end_holds_weights_moments_and_log(trained: tuple[Path, dict[str, torch.Tensor]]) -> None:
    output, weights = trained
    end = read_end(output)
    assert end.step == 2 and [record["step"] for record in end.log] == [1, 2]
    assert "loss" in end.log[0] and not any(name.startswith("perf/") for name in end.log[0])
    embedding = weights["embedding.word_embeddings.weight"]
    assert any(tensor.shape == embedding.shape and torch.equal(tensor, embedding) for tensor in end.tensors.values())
    moments = [name for name in end.tensors if "exp_avg" in name]
    assert len(moments) >= 2 * len(weights) / 2 and all(end.tensors[name].abs().sum() > 0 for name in moments)
    assert end.num_elements >= 3 * sum(weight.numel() for weight in weights.values())


def test_difference_sees_one_bit_of_a_tensor(trained: tuple[Path, dict[str, torch.Tensor]]) -> None:
    end = read_end(trained[0])
    assert difference(end, read_end(trained[0])) is None
    for name in end.tensors:
        changed = end.tensors[name].clone()
        changed.view(-1).view(torch.uint8)[0] ^= 1
        other = replace(end, tensors={**end.tensors, name: changed})
        assert (difference(other, end) or "").startswith(f"{name} differs by up to ")
    name = next(iter(end.tensors))
    without = {key: tensor for key, tensor in end.tensors.items() if key != name}
    assert "not in both" in (difference(replace(end, tensors=without), end) or "")


@pytest.mark.parametrize("field", ["step", "values", "log"])
def test_difference_sees_the_rest(trained: tuple[Path, dict[str, torch.Tensor]], field: str) -> None:
    end = read_end(trained[0])
    changed: dict[str, RunEnd] = {
        "step": replace(end, step=3),
        "values": replace(end, values={**end.values, "state.json.bco_delta": -0.0}),
        "log": replace(end, log=[end.log[0], {**end.log[1], "loss": end.log[1]["loss"] * (1 + 2**-52)}]),
    }
    expected = {"step": "step 3, not 2", "values": "bco_delta is -0.0, not 0.0", "log": "logged loss"}
    assert expected[field] in (difference(changed[field], end) or "")
    assert "logged 1 records, not 2" in (difference(replace(end, log=end.log[:1]), end) or "")


def test_read_end_refuses_a_damaged_checkpoint(trained: tuple[Path, dict[str, torch.Tensor]]) -> None:
    state = trained[0] / "checkpoints" / "step-2" / "state.json"
    content = state.read_text()
    try:
        state.write_text(json.dumps({**json.loads(content), "step": 7}))
        with pytest.raises(CheckpointError, match=r"state\.json has"):
            read_end(trained[0])
    finally:
        state.write_text(content)
    manifest.verify(state.parent)
