"""The table: every Megatron parameter of a model, the file tensors behind it, and their order in the files."""

from __future__ import annotations

import re

from fastpref.run.architecture.architecture import Architecture
from fastpref.run.architecture.families import FAMILIES
from fastpref.run.architecture.layouts import Columns, GateUp, Layout, QueryKeyValue, Replicated, VocabRows

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Transformer Engine keeps a norm inside the linear layer that follows it.
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
# Names that wrappers of a module put among those of its parameters.
_WRAPPER = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
# One module per expert, or Transformer Engine's one module with one weight per expert.
_EXPERT = re.compile(r"mlp\.experts\.(?:local_experts\.(\d+)\.(linear_fc[12])\.weight|(linear_fc[12])\.weight(\d+))")


def parameter_table(arch: Architecture) -> dict[str, Layout]:
    """List the parameters of the whole model.

    Returns:
        Megatron name (local layer spec, layers counted over the whole model) -> layout, in the order of the
        model's files. A tied model has no `output_layer.weight`: its last pipeline stage holds a copy of the
        embedding under that name.
    """
    hidden = arch.hidden_size
    table: dict[str, Layout] = {"embedding.word_embeddings.weight": VocabRows(EMBEDDING, (arch.vocab_size, hidden))}
    for index in range(arch.num_layers):
        prefix = f"model.layers.{index}."
        mlp = _expert_table(arch, prefix) if arch.has_experts(index) else _mlp_table(arch, prefix)
        for name, layout in {**_layer_table(arch, prefix), **mlp}.items():
            table[f"decoder.layers.{index}.{name}"] = layout
    table["decoder.final_layernorm.weight"] = Replicated("model.norm.weight", (hidden,))
    if not arch.tie_embeddings:
        table["output_layer.weight"] = VocabRows(HEAD, (arch.vocab_size, hidden))
    return table


def _layer_table(arch: Architecture, prefix: str) -> dict[str, Layout]:
    attention, hidden = f"{prefix}self_attn.", arch.hidden_size

    def qkv(kind: str, tail: tuple[int, ...]) -> QueryKeyValue:
        query, key, value = (f"{attention}{letter}_proj.{kind}" for letter in "qkv")
        groups = arch.num_query_groups
        return QueryKeyValue(query, key, value, groups, arch.num_heads // groups, arch.head_dim, tail)

    norms = {
        f"{name}.weight": Replicated(f"{prefix}{file_name}.weight", (hidden,))
        for name, file_name in FAMILIES[arch.model_type].norms.items()
    }
    table: dict[str, Layout] = {
        "input_layernorm.weight": norms.pop("input_layernorm.weight"),
        "self_attention.linear_qkv.weight": qkv("weight", (hidden,)),
        "self_attention.linear_proj.weight": Columns(
            f"{attention}o_proj.weight", (hidden, arch.num_heads * arch.head_dim)
        ),
        **norms,
    }
    if arch.qkv_bias:
        table["self_attention.linear_qkv.bias"] = qkv("bias", ())
    if arch.qk_norm:
        for letter in "qk":
            table[f"self_attention.{letter}_layernorm.weight"] = Replicated(
                f"{attention}{letter}_norm.weight", (arch.head_dim,)
            )
    return table


def _mlp_table(arch: Architecture, prefix: str) -> dict[str, Layout]:
    mlp, hidden, width = f"{prefix}mlp.", arch.hidden_size, arch.ffn_hidden_size
    return {
        "mlp.linear_fc1.weight": GateUp(f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight", (width, hidden)),
        "mlp.linear_fc2.weight": Columns(f"{mlp}down_proj.weight", (hidden, width)),
    }


def _expert_table(arch: Architecture, prefix: str) -> dict[str, Layout]:
    experts, family, hidden = arch.experts, FAMILIES[arch.model_type].experts, arch.hidden_size
    assert experts is not None and family is not None
    block, width = f"{prefix}{family.block}.", experts.ffn_hidden_size
    table: dict[str, Layout] = {"mlp.router.weight": Replicated(f"{block}gate.weight", (experts.num_experts, hidden))}
    for index in range(experts.num_experts):
        name, expert = expert_name(index), f"{block}experts.{index}."
        gate, up, down = (f"{expert}{part}.weight" for part in (family.gate, family.up, family.down))
        table[f"{name}.linear_fc1.weight"] = GateUp(gate, up, (width, hidden))
        table[f"{name}.linear_fc2.weight"] = Columns(down, (hidden, width))
    return table


def expert_name(index: int) -> str:
    """Name an expert of a layer in `parameter_table`."""
    return f"mlp.experts.local_experts.{index}"


def is_expert(name: str) -> bool:
    """Whether a name of `parameter_table` is an expert's: spread over expert-parallel ranks."""
    return ".mlp.experts." in name


def file_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """List the tensors of the model's files with their shapes, in file order."""
    return {name: shape for layout in parameter_table(arch).values() for name, shape in layout.shapes.items()}


def unwrapped(name: str) -> str:
    """Take the names of wrappers out of that of a tensor: DDP's, FSDP's, those of compiling and checkpointing."""
    return _WRAPPER.sub("", name)


def table_name(name: str, layer_offset: int, expert_offset: int = 0) -> str:
    """Translate a parameter's name in a model chunk into its name in `parameter_table`.

    Args:
        name: as in `named_parameters()`, of either layer spec.
        layer_offset: number of the model's layers before this chunk.
        expert_offset: number of a layer's experts on the expert-parallel ranks before this one.
    """
    match = _LAYER.fullmatch(name)
    if match is None:
        return name
    inner = _FUSED_NORMS.get(match[2], match[2])
    expert = _EXPERT.fullmatch(inner)
    if expert is not None:
        index, linear = int(expert[1] or expert[4]), expert[2] or expert[3]
        inner = f"{expert_name(index + expert_offset)}.{linear}.weight"
    return f"decoder.layers.{int(match[1]) + layer_offset}.{inner}"
