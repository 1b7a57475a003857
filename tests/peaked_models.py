"""Models that find some tokens far more likely than others, so that a screened head has columns to leave out."""

from collections import Counter
from collections.abc import Mapping
from typing import Any
from unittest import mock

import torch
from megatron.core.models.gpt import GPTModel
from screened_passes import counted_passes

from checks.layout_parity import runs
from checks.layout_parity.runs import MODEL, ShortRun
from checks.tiny import tiny_pairs
from fastpref.trainer import TrainingArguments, build_models

# Both halves have more columns than an exact pass would be taken for; on two ranks one row pads the vocabulary.
VOCAB_SIZE = 8195
LIKELY = 96
PEAKED: dict[str, Any] = {**MODEL, "vocab_size": VOCAB_SIZE}
PAIRS = tiny_pairs(22, seed=11, vocab_size=400)
# What stays in 8 bits is then much, and its error large enough to be seen.
EPS = 2.0**-4
COARSELY = {"head_forward": "screened", "active_eps": EPS}


def make_peaked(models: list[GPTModel], first_id: int = 0) -> list[GPTModel]:
    """Make the first ids likely in some places and unlikely in others; `first_id` is that of the shard's first row."""
    for chunk in models:
        if chunk.share_embeddings_and_output_weights:
            weight_VH = chunk.shared_embedding_or_output_weight()
        elif chunk.post_process:
            weight_VH = chunk.output_layer.weight
        else:
            continue
        num_likely = max(LIKELY - first_id, 0)
        weight_VH.data[:num_likely] *= 8.0
        weight_VH.data[num_likely:] *= 0.8
    return models


def peaked_model(seed: int = 0, config: Mapping[str, Any] = PEAKED) -> list[GPTModel]:
    return make_peaked(build_models(config, seed=seed))


def train_peaked(run: ShortRun, output_dir: str) -> tuple[list[dict[str, float]], Counter[str]]:
    """The log of a short run of peaked models on this rank, and its passes."""
    build = runs._models

    def models(run: ShortRun, args: TrainingArguments) -> tuple[list, list | None]:
        policy, reference = build(run, args)
        rank = torch.distributed.get_rank() % args.tensor_model_parallel_size
        first_id = rank * -(-VOCAB_SIZE // args.tensor_model_parallel_size)
        return make_peaked(policy, first_id), None if reference is None else make_peaked(reference, first_id)

    def arguments(**settings: Any) -> TrainingArguments:
        # Updates in proportion to gradients: Adam's make a full step of next to nothing, so of what is left out.
        return TrainingArguments(**settings | {"adam_epsilon": 1e-2})

    with (
        counted_passes() as seen,
        mock.patch.object(runs, "_models", models),
        mock.patch.object(runs, "TrainingArguments", arguments),
    ):
        return runs.train(run, output_dir, PAIRS), seen
