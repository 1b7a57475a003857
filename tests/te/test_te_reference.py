"""The reference in memory beside a policy of Transformer Engine's attention over two context-parallel ranks."""

import math

import pytest
import torch
from megatron.core.extensions.transformer_engine import TEDotProductAttention

from checks.tiny import TINY_LLAMA, tiny_pairs
from fastpref.testing.workers import RankPool
from fastpref.trainer import DPOConfig, DPOTrainer, ModelOptions, TrainingArguments, build_models, initialize_megatron
from fastpref.trainer.ranks.platform import destroy


def first_step() -> tuple[bool, float, float]:
    """Whether policy and reference share the stream; loss and gradient norm of the first step."""
    args = TrainingArguments(context_parallel_size=2, per_device_train_batch_size=4, bf16=True)
    initialize_megatron(args)

    class Stream(torch.cuda.Stream):
        """Refuses copies, as CUDA's does; attention over several ranks holds one."""

        def __reduce_ex__(self, protocol: object) -> object:
            raise TypeError("cannot pickle 'Stream' object")

    torch.cuda.Stream, before = Stream, torch.cuda.Stream
    TEDotProductAttention.cp_stream = None  # Megatron makes one for the whole process
    try:
        models = build_models(TINY_LLAMA, ModelOptions(params_dtype=torch.bfloat16), seed=1)
        trainer = DPOTrainer(models, DPOConfig(), None, args, train_dataset=tiny_pairs(8, seed=4))
        cores = [
            next(module for module in chunk.modules() if hasattr(module, "cp_stream"))
            for chunk in (trainer.model[0], trainer.ref_models[0])
        ]
        assert isinstance(cores[0].cp_stream, Stream)
        result = trainer.engine.run_step(trainer.models_wrapped, trainer.feed.train_batches(0), 1)
        return cores[0].cp_stream is cores[1].cp_stream, result.loss, float(result.grad_norm)
    finally:
        torch.cuda.Stream = before
        TEDotProductAttention.cp_stream = None
        destroy()


def test_copy_shares_the_stream_of_context_parallel_attention(rank_pool_2: RankPool) -> None:
    for shares, loss, grad_norm in rank_pool_2.run(first_step):
        assert shares
        assert loss == pytest.approx(math.log(2.0), rel=1e-6)
        assert grad_norm > 0
