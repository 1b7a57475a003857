"""Marks of shards and copies in models that a caller built: complete, or refused."""

from collections.abc import Callable

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.multi_latent_attention import MLASelfAttention

from checks.tiny import stock_model, tiny_pairs
from fastpref.errors import ConfigError
from fastpref.testing.workers import RankPool
from fastpref.trainer import DPOConfig, DPOTrainer, TrainingArguments, initialize_megatron
from fastpref.trainer.model.shards import mark_shards
from fastpref.trainer.ranks.platform import destroy

PAIRS = tiny_pairs(4, seed=4)
LINEAR_BIASES = {"add_bias_linear": True, "add_qkv_bias": True}


def clear_marks(models: list[GPTModel]) -> None:
    for parameter in models[0].parameters():
        for name in ("tensor_model_parallel", "partition_dim", "partition_stride"):
            if hasattr(parameter, name):
                delattr(parameter, name)


def first_step(size: int, is_marked: bool) -> tuple[float, int, int]:
    """A caller's model with biases: its gradient norm, and how many values it counts on this rank and holds."""
    args = TrainingArguments(tensor_model_parallel_size=size, per_device_train_batch_size=4, max_grad_norm=1.0)
    initialize_megatron(args)
    try:
        models = stock_model(0, tensor_model_parallel_size=size, **LINEAR_BIASES)
        for name, _ in models[0].named_parameters():
            assert name.endswith(("weight", "bias")), name
        if not is_marked:
            clear_marks(models)
        trainer = DPOTrainer(models, DPOConfig(), None, args, train_dataset=PAIRS)
        trainer.create_optimizer_and_scheduler(2)
        counted = [p.numel() for p in trainer.model[0].parameters() if param_is_not_tensor_parallel_duplicate(p)]
        result = trainer.engine.run_step(trainer.models_wrapped, trainer.feed.train_batches(0), 1)
        return float(result.grad_norm), sum(counted), sum(p.numel() for p in trainer.model[0].parameters())
    finally:
        destroy()


@pytest.mark.parametrize("is_marked", [True, False])
def test_gradient_norm_of_a_callers_model_is_that_of_one_process(rank_pool_2: RankPool, is_marked: bool) -> None:
    """Without its marks it is a model that was not initialised, as one that takes its weights from files."""
    norm, counted, held = first_step(1, True)
    assert counted == held
    ranks = rank_pool_2.run(first_step, 2, is_marked)
    assert [each[0] for each in ranks] == pytest.approx([norm] * 2, rel=1e-5)
    assert sum(each[1] for each in ranks) == held


def as_if_split(models: list[GPTModel], *, sequence_parallel: bool = False) -> list[GPTModel]:
    """Have one rank look at a model as one of two would."""
    models[0].config.tensor_model_parallel_size = 2
    models[0].config.sequence_parallel = sequence_parallel
    return models


class Gain(torch.nn.Module):
    """A caller's module."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(3))


class GainedNorm(torch.nn.RMSNorm):
    """A known class with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__(8)
        self.gain = torch.nn.Parameter(torch.ones(3))


UNKNOWN: dict[str, tuple[Callable[[], torch.nn.Module], str]] = {
    "Gain": (Gain, "gain"),
    "GainedNorm": (GainedNorm, "gain"),
    "Linear": (lambda: torch.nn.Linear(2, 2, bias=False), "weight"),
    "Conv1d": (lambda: torch.nn.Conv1d(2, 2, 2, bias=False), "weight"),
    "Embedding": (lambda: torch.nn.Embedding(2, 2), "weight"),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_parameters_that_nobody_knows_are_refused_by_name(one_rank, kind: str) -> None:
    make, name = UNKNOWN[kind]
    models = stock_model(0)
    models[0].decoder.layers[1].extra = module = make()
    mark_shards(models)  # nothing is split
    as_if_split(models)
    with pytest.raises(ConfigError, match=rf"not for {kind}\.{name} \(first at decoder\.layers\.1\.extra\.{name}\)"):
        mark_shards(models)
    parameter = getattr(module, name)
    for is_shard in (True, False):
        parameter.tensor_model_parallel = is_shard
        mark_shards(models)
        assert parameter.tensor_model_parallel is is_shard
    as_if_split(models, sequence_parallel=True)
    with pytest.raises(ConfigError, match="under sequence parallelism for a copy also sequence_parallel"):
        mark_shards(models)
    parameter.sequence_parallel = False
    mark_shards(models)
    del parameter.tensor_model_parallel
    parameter.requires_grad_(False)
    mark_shards(models)  # what is not trained has no gradient to count


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_marks_follow_from_the_kind_of_layer(one_rank, sequence_parallel: bool) -> None:
    models = as_if_split(stock_model(0, **LINEAR_BIASES), sequence_parallel=sequence_parallel)
    models[0].decoder.layers[0].input_layernorm = torch.nn.RMSNorm(32)
    clear_marks(models)
    mark_shards(models)
    marks = {name: parameter for name, parameter in models[0].named_parameters() if ".1." not in name}
    found = {name: (parameter.tensor_model_parallel, parameter.partition_dim) for name, parameter in marks.items()}
    layer = "decoder.layers.0."
    assert found == {
        "embedding.word_embeddings.weight": (True, 0),
        f"{layer}input_layernorm.weight": (False, -1),
        f"{layer}self_attention.linear_qkv.weight": (True, 0),
        f"{layer}self_attention.linear_qkv.bias": (True, 0),
        f"{layer}self_attention.linear_proj.weight": (True, 1),
        f"{layer}self_attention.linear_proj.bias": (False, -1),
        f"{layer}pre_mlp_layernorm.weight": (False, -1),
        f"{layer}mlp.linear_fc1.weight": (True, 0),
        f"{layer}mlp.linear_fc1.bias": (True, 0),
        f"{layer}mlp.linear_fc2.weight": (True, 1),
        f"{layer}mlp.linear_fc2.bias": (False, -1),
        "decoder.final_layernorm.weight": (False, -1),
        "output_layer.weight": (True, 0),
    }
    for name in ("input_layernorm", "pre_mlp_layernorm"):
        assert getattr(marks[f"{layer}{name}.weight"], "sequence_parallel", False) == sequence_parallel


def test_norms_of_heads_without_a_sum_over_ranks_are_refused(one_rank) -> None:
    """A rank has some of the heads and so a part of the gradient, which Megatron adds up in two settings alone."""
    models = as_if_split(stock_model(0))
    attention = models[0].decoder.layers[0].self_attention
    attention.q_layernorm = torch.nn.RMSNorm(8)
    attention.k_layernorm = torch.nn.RMSNorm(8)
    with pytest.raises(
        ConfigError, match=r"RMSNorm\.weight \(first at .*q_layernorm\.weight\).* with qk_layernorm, too"
    ):
        mark_shards(models)
    models[0].config.qk_layernorm = True
    mark_shards(models)
    models[0].config.qk_layernorm = False
    mark_shards(as_if_split(models, sequence_parallel=True))
    assert attention.q_layernorm.weight.sequence_parallel


@pytest.mark.parametrize(
    ("kind", "place", "name"),
    [(MLASelfAttention, "self_attention", "linear_kv_down_proj"), (MoELayer, "mlp", "trains experts")],
)
def test_layers_that_need_sequence_parallelism_are_refused_without(one_rank, kind: type, place: str, name: str) -> None:
    models = as_if_split(stock_model(0))
    getattr(models[0].decoder.layers[1], place).__class__ = kind
    with pytest.raises(ConfigError, match=rf"{kind.__name__} under tensor parallelism needs sequence .*{name}"):
        mark_shards(models)


@pytest.mark.parametrize("name", ["tensor_model_parallel_size", "context_parallel_size", "expert_model_parallel_size"])
def test_sizes_that_the_model_was_not_built_with_are_refused(quiet_args, name: str) -> None:
    """Its layers act on their configuration, and so do marks and packing here."""
    models = stock_model(0)
    models[0].config.num_moe_experts = 4
    setattr(models[0].config, name, 2)
    with pytest.raises(ConfigError, match=f"{name}: the model was built with 2, TrainingArguments ask for 1"):
        DPOTrainer(models, DPOConfig(), None, quiet_args(), train_dataset=PAIRS)


def test_layers_that_the_settings_do_not_ask_for_are_refused(quiet_args) -> None:
    args = quiet_args(transformer_impl="transformer_engine")
    with pytest.raises(ConfigError, match="built with local layers, TrainingArguments ask for transformer_engine"):
        DPOTrainer(stock_model(0), DPOConfig(), None, args, train_dataset=PAIRS)
