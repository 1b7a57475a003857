"""Nothing that a run computes takes its number format, or its device, from PyTorch's global defaults."""

from collections.abc import Iterator

import pytest
import torch

from checks.tiny import TINY_LLAMA, tiny_pairs
from fastpref.data import PreferenceCollator, PreferenceDataset
from fastpref.trainer import DPOConfig, DPOTrainer, LoraConfig, add_lora, build_models, score_reference
from fastpref.trainer.step.batch import Microbatch

DATA = PreferenceDataset(tiny_pairs(6, seed=3))
TIMES = ("perf/", "memory/")


@pytest.fixture(params=[torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
def default(request) -> Iterator[torch.dtype]:
    """A default of the caller's, as it is around the second of two runs."""
    before = torch.get_default_dtype()
    yield request.param
    torch.set_default_dtype(before)


def run(args, config: DPOConfig, lora: bool, cache=None) -> tuple[list[dict], list[torch.Tensor]]:
    """The log without times, and what was trained."""
    models = build_models(TINY_LLAMA, seed=0)
    if lora:
        add_lora(models, TINY_LLAMA, LoraConfig(r=2), seed=1)
    trainer = DPOTrainer(models, config, cache, args, train_dataset=DATA, eval_dataset=DATA)
    trainer.train()
    log = [
        {name: value for name, value in record.items() if not name.startswith(TIMES)} for record in trainer.log_history
    ]
    return log, [parameter.detach() for parameter in models[0].parameters()]


@pytest.mark.parametrize("kind", ["dpo", "shared", "orpo", "lora", "cached"])
def test_two_steps_give_the_same_bits_under_another_default_dtype(quiet_args, tmp_path, default, kind: str) -> None:
    config = DPOConfig(pref_loss="orpo", orpo_nll="prompt_and_response") if kind == "orpo" else DPOConfig()
    packing = {"packing": True, "prefix_sharing": True} if kind == "shared" else {}
    args = quiet_args(max_steps=2, eval_on_start=True, log_token_stats=True, **packing)
    found = []
    for dtype in (torch.float32, default):
        torch.set_default_dtype(dtype)
        cache = None
        if kind == "cached":
            path = tmp_path / str(dtype)
            cache = score_reference(build_models(TINY_LLAMA, seed=0), [DATA], path, args, identity={})
        found.append(run(args, config, kind == "lora", cache))
    (log, weights), (other_log, other_weights) = found
    assert log == other_log
    for one, other in zip(weights, other_weights, strict=True):
        assert one.dtype == other.dtype == torch.float32 and torch.equal(one, other)


def test_microbatch_stays_on_the_host_under_another_default_device() -> None:
    batch = {name: value for name, value in PreferenceCollator(0)(DATA[:3]).items() if name in ("input_ids", "labels")}
    with torch.device("meta"):
        microbatch = Microbatch.from_dict(batch).padded_to(32)
        request = microbatch.head_request()
        counts_S, uncounted_NL = microbatch.counts_S, microbatch.uncounted_NL
    found = [*vars(microbatch).values(), *vars(request).values(), counts_S, uncounted_NL]
    assert {value.device.type for value in found if isinstance(value, torch.Tensor)} == {"cpu"}
