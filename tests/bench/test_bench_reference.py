"""The benchmark of precomputed log-probs takes steps of both kinds on a tiny model, and refuses another reference."""

import pytest
import torch

from bench import reference
from fastpref.trainer.ranks import platform


@pytest.fixture(autouse=True)
def one_rank():
    yield
    platform.destroy()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_time_steps_times_both_kinds_by_turns(precision: str) -> None:
    row = reference.time_steps("dry", 3, 64, precision, 2)
    assert set(row["times"]) == set(reference.KINDS)
    assert all(len(taken["wall_s"]) == 2 and min(taken["wall_s"]) > 0 for taken in row["times"].values())
    assert row["shape"]["pairs"] == 3 and row["score_s"] > 0
    assert 0 <= row["drift_per_token"] < 1e-2


def test_time_steps_refuses_a_cache_of_another_model(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, made = reference.Setting.weights, []

    def changed(self: reference.Setting) -> list[torch.nn.Module]:
        models = weights(self)
        with torch.no_grad():
            models[0].output_layer.weight.mul_(1.0 + 0.1 * len(made))
        made.append(models)
        return models

    monkeypatch.setattr(reference.Setting, "weights", changed)
    with pytest.raises(RuntimeError, match="nat per token away from the model in memory"):
        reference.time_steps("dry", 3, 64, "fp32", 1)


@pytest.mark.parametrize("kind", reference.KINDS)
def test_measure_memory_reports_sizes(kind: str) -> None:
    row = reference.measure_memory(kind, "dry", 2, 64, "fp32")
    assert row["peak_mib"] >= row["resident_mib"] > row["weights_mib"] > 0
