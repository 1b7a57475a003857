"""Tiny random transformers models of every supported family, and what they compute in fp64."""

import copy
from pathlib import Path
from typing import NamedTuple

import torch
from megatron_runs import Problem
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SeedOssConfig,
)

SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
# transformers adds the load-balancing loss to no gradient unless it is asked for the router's logits.
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "router_aux_loss_coef": 0.0}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 4.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 16,
}
GEMMA_LAYERS = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
VARIANTS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "llama-tied-odd-vocab": LlamaConfig(**{**SIZES, "vocab_size": 97}, tie_word_embeddings=True),
    "llama-full-heads": LlamaConfig(**{**SIZES, "num_key_value_heads": 4}, rms_norm_eps=1e-3),
    "llama-one-kv-head-wide": LlamaConfig(**{**SIZES, "num_key_value_heads": 1}, head_dim=20),
    "llama3-rope": LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE),
    "llama-linear-rope": LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 3000.0, "factor": 2.5}
    ),
    "mistral": MistralConfig(**{**SIZES, "vocab_size": 97}, head_dim=16, sliding_window=None),
    "mistral-window": MistralConfig(**SIZES, sliding_window=5),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2-tied-window": Qwen2Config(
        **SIZES, tie_word_embeddings=True, use_sliding_window=True, sliding_window=7, max_window_layers=2
    ),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    # local layers see 5 of 24 positions; no token is padding, whose gradient transformers would drop
    "gemma3": Gemma3TextConfig(
        **SIZES, head_dim=16, sliding_window=5, query_pre_attn_scalar=20, pad_token_id=None, layer_types=GEMMA_LAYERS
    ),
    "gemma3-tied-scaled-rope": Gemma3TextConfig(
        **{**SIZES, "vocab_size": 97, "num_key_value_heads": 1},
        head_dim=24,
        sliding_window=7,
        sliding_window_pattern=2,
        tie_word_embeddings=True,
        pad_token_id=None,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 50000.0, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
        },
    ),
    "qwen3-tied-odd-vocab": Qwen3Config(**{**SIZES, "vocab_size": 97}, head_dim=8, tie_word_embeddings=True),
    "qwen3-moe": Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=16, norm_topk_prob=True),
    "qwen3-moe-mixed": Qwen3MoeConfig(**SIZES, **EXPERTS, mlp_only_layers=[1, 2]),
    "seed-oss": SeedOssConfig(**SIZES, head_dim=16, attention_dropout=0.0, residual_dropout=0.0, pad_token_id=None),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, router_aux_loss_coef=0.0, sliding_window=6),
}


class Answer(NamedTuple):
    """Logits, and the gradient of every tensor of the model's files."""

    logits_SLV: torch.Tensor
    gradients: dict[str, torch.Tensor]


def make_problem(vocab_size: int, length: int = 24) -> Problem:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, vocab_size, (2, length), generator=generator)
    return Problem(ids, torch.randn(2, length, vocab_size, generator=generator) / length)


def make_model(variant: str) -> torch.nn.Module:
    return make_model_of(VARIANTS[variant])


def make_model_of(config: PreTrainedConfig) -> torch.nn.Module:
    """A model whose norms and biases differ from their initial values, so that losing one of them shows."""
    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_config(
        copy.deepcopy(config), attn_implementation="sdpa", experts_implementation="eager"
    )
    for name, parameter in model.named_parameters():
        std = 0.2 if parameter.ndim == 1 else 1.5 / parameter.size(-1) ** 0.5
        parameter.data.normal_(std=std)
        if name.endswith("norm.weight") and model.config.model_type != "gemma3_text":
            parameter.data.add_(1.0)
    return model.eval()


def save(model: torch.nn.Module, path: Path, max_shard_size: str = "5GB") -> Path:
    model.save_pretrained(path, max_shard_size=max_shard_size)
    return path


def answer(model: torch.nn.Module, problem: Problem) -> Answer:
    logits = model(problem.input_ids_SL).logits
    model.zero_grad()
    # the mean over microbatches
    ((logits * problem.weights_SLV).sum() / 2).backward()
    return Answer(logits.detach(), gradients_of(model))


def gradients_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    gradients: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        gradients |= as_in_files(model.config.model_type, name, parameter.grad)
    return gradients


def as_in_files(model_type: str, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """A parameter of transformers under the names of its files, where every expert has matrices of its own."""
    if model_type == "mixtral":
        name = name.replace(".mlp.", ".block_sparse_moe.")
    block, _, kind = name.partition(".experts.")
    if not kind:
        return {name: tensor.clone()}
    gate, up, down = ("w1", "w3", "w2") if model_type == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    found = {}
    for index, matrix in enumerate(tensor):
        parts = {down: matrix} if kind == "down_proj" else dict(zip((gate, up), matrix.chunk(2), strict=True))
        found |= {f"{block}.experts.{index}.{part}.weight": value.clone() for part, value in parts.items()}
    return found


def answer_fp64(model: torch.nn.Module, problem: Problem) -> Answer:
    return answer(in_fp64(model), Problem(problem.input_ids_SL, problem.weights_SLV.double()))


def in_fp64(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of a model that computes in fp64 throughout."""
    exact = copy.deepcopy(model).double()
    for module in exact.modules():
        kind = type(module).__name__
        # transformers' own round to fp32 inside
        if kind.endswith("RMSNorm"):
            module.forward = (_zero_centered_norm_fp64 if kind.startswith("Gemma") else _rms_norm_fp64).__get__(module)
        if kind.endswith("TopKRouter"):
            module.forward = _router_fp64.__get__(module)
    return exact


def _rms_norm_fp64(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def _zero_centered_norm_fp64(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (1.0 + self.weight) * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


def _router_fp64(self: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = torch.nn.functional.linear(x.reshape(-1, self.hidden_dim), self.weight)
    values, indices = torch.topk(logits.softmax(-1), self.top_k, dim=-1)
    if getattr(self, "norm_topk_prob", True):
        values = values / values.sum(-1, keepdim=True)
    return logits, values, indices


def assert_as_accurate(got: Answer, fp32: Answer, exact: Answer) -> None:
    """The one rule: at most three times the error of transformers at the same precision, plus four roundings."""
    assert set(got.gradients) == set(exact.gradients)
    pairs = {"logits": (got.logits_SLV, fp32.logits_SLV, exact.logits_SLV)}
    pairs |= {name: (got.gradients[name], fp32.gradients[name], exact.gradients[name]) for name in exact.gradients}
    for name, (ours, theirs, truth) in pairs.items():
        assert ours.shape == truth.shape, name
        assert ours.dtype == torch.float32
        allowed = 3 * (theirs - truth).abs().max() + 4 * torch.finfo(torch.float32).eps * truth.abs().max()
        error = (ours - truth).abs().max()
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same_bits(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert sorted(got) == sorted(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name
