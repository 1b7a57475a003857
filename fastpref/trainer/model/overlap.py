"""Switches of Megatron that overlap, save or fake work at a risk: which are safe here, in the version that runs."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import megatron.core
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from fastpref.errors import Problem, raise_if_any

WAITS_FOR_SENDS = (0, 18)
"""First version whose interleaved schedule waits for an overlapped send before it frees what is sent."""
NOT_IMPLEMENTED = {
    "overlap_moe_expert_parallel_comm": "runs layers by a schedule of its own, around the scoring head",
    "delay_wgrad_compute": "leaves weight gradients to a schedule that does not run",
    "overlap_dispatch_backward_with_experts_wgrad": "leaves gradients of experts to a schedule that does not run",
    "defer_embedding_wgrad_compute": "defers a gradient of the output layer that the scoring head computes at once",
    "qk_clip": "leaves it to the training loop to clip weights behind each update, which this one does not do",
    "use_mup": "multiplies what the head answers, as if it were logits, and leaves learning rates of its own to the "
    "training loop; the same model without it has softmax_scale as it is now, its embeddings (which must not be tied) "
    "times mup_embedding_mult and its output layer times mup_output_mult",
}
"""Fields of a configuration that must be off, and what they would do."""
_DROPS = "leaves out tokens by what else is in a microbatch, padding included"
_RANDOM = "routes tokens at random, which benchmarks want"
NOT_OF_THE_SEQUENCE = {
    "moe_expert_capacity_factor": (None, _DROPS),
    "moe_expert_rank_capacity_factor": (None, _DROPS),
    "moe_input_jitter_eps": (None, "draws noise in every pass, those of evaluations and of the reference, too"),
    "moe_router_force_load_balancing": (False, _RANDOM),
    "moe_router_force_biased": (None, _RANDOM),
}
"""Fields with which experts make of a sequence what does not follow from it: what they must be, and what they do."""


def waits_for_sends() -> bool:
    """Whether the interleaved schedule may free a tensor once it was sent."""
    version = tuple(int(part) for part in megatron.core.__version__.split(".")[:2])
    return version >= WAITS_FOR_SENDS


def settle_overlap(models: Sequence[GPTModel]) -> None:
    """Switch off what is not safe in the configuration of chunks that a caller built, with a warning.

    Raises:
        ConfigError: a switch that cannot be turned off afterwards is not safe; lists all of them.
    """
    config = models[0].config
    problems = [
        Problem(name, f"must be False: it {effect}")
        for name, effect in NOT_IMPLEMENTED.items()
        if getattr(config, name, 0)
    ]
    if config.num_moe_experts is not None:
        problems += [
            Problem(name, f"must be {off}: it {effect}")
            for name, (off, effect) in NOT_OF_THE_SEQUENCE.items()
            if getattr(config, name, off) != off
        ]
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    if len(models) > 1 and stages == 2 and not config.overlap_p2p_comm:
        text = (
            "must be True, and batch_p2p_comm False: with virtual stages on two ranks batched messages meet the wrong "
            "receives, and gradients would be wrong in silence"
        )
        problems.append(Problem("overlap_p2p_comm", text))
    raise_if_any(problems, "the model cannot be trained as it was built; build it with other settings")
    if len(models) > 1 and config.deallocate_pipeline_outputs and config.overlap_p2p_comm and not waits_for_sends():
        for model in models:
            model.config.deallocate_pipeline_outputs = False
        warnings.warn(
            f"deallocate_pipeline_outputs is off now: Megatron-Core {megatron.core.__version__} frees outputs of "
            "virtual stages while they are sent, which 0.18 and newer do not; set it to False, or update megatron-core",
            stacklevel=2,
        )
