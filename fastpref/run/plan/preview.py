"""What a run would do, in numbers and samples: layout, memory, tokenised pairs. Nothing here needs weights or prints.

Dims: `H` hidden, `V` vocabulary, `R` response rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastpref.data import TokenizedPair
from fastpref.run.architecture.adapters import adapter_table
from fastpref.run.architecture.architecture import Architecture
from fastpref.run.architecture.layouts import Layout
from fastpref.run.architecture.lora_config import LoraConfig
from fastpref.run.architecture.names import is_expert, parameter_table
from fastpref.run.config.arguments import TrainingArguments
from fastpref.run.config.layout import ParallelLayout
from fastpref.run.plan.pipeline import PipelinePlan, stage_shares
from fastpref.run.plan.prepare import PreparedRun, reference_is_policy


@dataclass(frozen=True, kw_only=True)
class PairView:
    """A tokenised pair as text, one string per token."""

    source: str
    """`path:line` of the pair."""
    prompt: tuple[str, ...]
    """Tokens that are not scored."""
    chosen: tuple[str, ...]
    """Scored tokens of the preferred answer."""
    rejected: tuple[str, ...]
    """Scored tokens of the other."""


@dataclass(frozen=True, kw_only=True)
class LayoutAxis:
    """One way in which the ranks share the work."""

    name: str
    """tensor, context, data, pipeline or expert."""
    size: int
    """Ranks along it."""
    ranks_with_0: tuple[int, ...]
    """The ranks that rank 0 shares it with, itself included."""


@dataclass(frozen=True, kw_only=True)
class StageLoad:
    """Work of one pipeline stage in a training step."""

    layers: int
    """Layers that it holds."""
    head_layers: float
    """Estimated cost of the vocabulary head, in layers; 0 on every stage but the last."""
    share: float
    """Fraction of the step's operations; the largest one sets the pace of all stages."""


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes of the rank that needs most; weights to screened are exact, the last two are estimates."""

    parameters: int
    """Parameters on the rank (a number, not bytes)."""
    trainable: int
    """Those of them that are trained: all, or the adapters' (a number, not bytes)."""
    model_parameters: int
    """Parameters of the whole model."""
    active_parameters: int
    """Those that one token passes: of the experts of a layer, the ones that it is sent to."""
    weights: int
    """The policy."""
    reference: int
    """A second copy of the weights, where the loss reads a reference that is neither precomputed nor the policy with
    adapters off."""
    gradients: int
    """The fp32 buffer that gradients are summed in."""
    optimizer: int
    """AdamW's moments, and fp32 weights where the model is in half precision."""
    screened: int
    """The int8 forms of the heads, of the policy and a reference with weights of its own; 0 with exact heads."""
    activations: int
    """What the layers keep for the backward pass, for microbatches of the longest rows."""
    head: int
    """Peak of the fused head over the same microbatch."""

    @property
    def total(self) -> int:
        """Sum of the parts."""
        kept = self.weights + self.reference + self.gradients + self.optimizer + self.screened
        return kept + self.activations + self.head


def pair_views(run: PreparedRun, count: int = 2) -> list[PairView]:
    """Return the first pairs, of the training set where there is one."""
    dataset = run.train if run.train is not None else run.eval
    return [] if dataset is None else [_pair_view(run, pair) for pair in dataset[:count]]


def _pair_view(run: PreparedRun, pair: TokenizedPair) -> PairView:
    prompt = pair.chosen_input_ids[: pair.num_prompt_tokens]
    sides = (ids[len(prompt) :] for ids in (pair.chosen_input_ids, pair.rejected_input_ids))
    texts = [tuple(run.tokenizer.decode([token]) for token in ids) for ids in (prompt, *sides)]
    return PairView(source=pair.source, prompt=texts[0], chosen=texts[1], rejected=texts[2])


def layout_axes(run: PreparedRun) -> list[LayoutAxis]:
    """Return how the ranks are laid out: tensor-parallel ranks next to each other, pipeline stages furthest apart."""
    args, dp = run.config.training, run.data_parallel_size
    axes, stride = [], 1
    for name, size in (
        ("tensor", args.tensor_model_parallel_size),
        ("context", args.context_parallel_size),
        ("data", dp),
        ("pipeline", args.pipeline_model_parallel_size),
    ):
        axes.append(LayoutAxis(name=name, size=size, ranks_with_0=tuple(range(0, stride * size, stride))))
        stride *= size
    if args.expert_model_parallel_size > 1:
        # experts are shared out among neighbours, whatever else these ranks share
        ranks = tuple(range(args.expert_model_parallel_size))
        axes.append(LayoutAxis(name="expert", size=len(ranks), ranks_with_0=ranks))
    return axes


def stage_loads(run: PreparedRun) -> list[StageLoad]:
    """Return what each pipeline stage has to compute in a step."""
    plan, last = run.pipeline_plan, run.pipeline_plan.num_stages - 1
    shares = stage_shares(plan, run.head_layers)
    return [
        StageLoad(layers=layers, head_layers=run.head_layers if stage == last else 0.0, share=shares[stage])
        for stage, layers in enumerate(plan.stage_layers)
    ]


def longest_row(run: PreparedRun) -> int:
    """Return the positions of the longest padded row of any microbatch."""
    datasets = [dataset for dataset in (run.train, run.eval) if dataset is not None]
    # the last token of a row is only a label
    return run.row_length(max(pair.num_tokens - 1 for dataset in datasets for pair in dataset))


def microbatch_positions(run: PreparedRun) -> int:
    """Return the positions of the largest microbatch: one packed row, or padded rows as long as the longest."""
    capacities = [run.row_capacity(dataset) for dataset in (run.train, run.eval) if dataset is not None]
    packed = [capacity for capacity in capacities if capacity is not None]
    if packed:
        return run.row_length(max(packed))
    return 2 * run.config.training.per_device_train_batch_size * longest_row(run)


def estimate_memory(run: PreparedRun) -> MemoryEstimate:
    """Estimate the memory of the rank that needs most while it trains."""
    return max(_stage_memories(run), key=lambda memory: memory.total)


def _stage_memories(run: PreparedRun) -> Iterator[MemoryEstimate]:
    args, dtype = run.config.training, run.config.training.params_dtype
    tp, num_stages, lora = args.tensor_model_parallel_size, args.pipeline_model_parallel_size, run.config.lora
    width = dtype.itemsize
    # fp32 parameters are their own master copy
    state_bytes = 8 if dtype == torch.float32 else 12
    shards = expert_shards = 1
    if args.use_distributed_optimizer:
        shards = run.data_parallel_size * args.context_parallel_size
        expert_shards = args.layout.expert_copies(run.world_size)
    num_tokens = microbatch_positions(run) // args.context_parallel_size
    plan = run.pipeline_plan
    adapters = [0] * num_stages if lora is None else stage_adapters(run.architecture, lora, tp, plan)
    has_model = run.config.loss.use_ref_model and not run.config.precomputes_reference
    has_copy = has_model and (lora is None or not reference_is_policy(run.config))
    whole, active = model_parameters(run.architecture)
    for stage, (shared, experts) in enumerate(stage_parameters(run.architecture, args.layout, plan)):
        parameters = shared + experts
        if lora is not None:
            shared, experts = adapters[stage], 0
        has_head = stage == num_stages - 1
        yield MemoryEstimate(
            parameters=parameters + adapters[stage],
            trainable=shared + experts,
            model_parameters=whole,
            active_parameters=active,
            weights=(parameters + adapters[stage]) * width,
            reference=parameters * width if has_copy else 0,
            gradients=(shared + experts) * 4,
            optimizer=shared * state_bytes // shards + experts * state_bytes // expert_shards,
            screened=_screened_bytes(run) * (1 + has_copy) if has_head else 0,
            activations=_activation_bytes(run, plan, stage, num_tokens),
            head=_head_bytes(run, num_tokens) if has_head else 0,
        )


def model_parameters(arch: Architecture) -> tuple[int, int]:
    """Return the parameters of the model, and how many of them one token passes."""
    shared = experts = 0
    for name, tensors in parameter_table(arch).items():
        size = sum(math.prod(shape) for shape in tensors.shapes.values())
        if is_expert(name):
            experts += size
        else:
            shared += size
    if arch.experts is None:
        return shared, shared
    return shared + experts, shared + experts * arch.experts.experts_per_token // arch.experts.num_experts


def stage_parameters(arch: Architecture, layout: ParallelLayout, plan: PipelinePlan) -> list[tuple[int, int]]:
    """Return the parameters of the first rank of each pipeline stage: those that every token passes, and experts."""
    totals, experts = [0] * plan.num_stages, [0] * plan.num_stages
    for name, tensors in parameter_table(arch).items():
        size = _shard_size(tensors, layout.expert_tp if is_expert(name) else layout.tp)
        if name.startswith("decoder.layers."):
            kind = experts if is_expert(name) else totals
            kind[plan.layer_stages[int(name.split(".")[2])]] += size
        elif name.startswith("embedding."):
            totals[0] += size
            # a tied head on another stage is a copy
            totals[-1] += size if arch.tie_embeddings and plan.num_stages > 1 else 0
        else:
            totals[-1] += size
    return [(shared, all_experts // layout.ep) for shared, all_experts in zip(totals, experts, strict=True)]


def stage_adapters(arch: Architecture, lora: LoraConfig, tp: int, plan: PipelinePlan) -> list[int]:
    """Return the number of adapter parameters of tensor-parallel rank 0 on each pipeline stage."""
    totals = [0] * plan.num_stages
    for name, layout in adapter_table(arch, lora).items():
        totals[plan.layer_stages[int(name.split(".")[2])]] += _shard_size(layout, tp)
    return totals


def _shard_size(layout: Layout, tp: int) -> int:
    def read(name: str, dim: int, start: int, stop: int | None) -> Tensor:
        whole = torch.empty(layout.shapes[name], dtype=torch.float32, device="meta")
        return whole[start:stop] if dim == 0 else whole[:, start:stop]

    return layout.shard(read, 0, tp).numel()


def _activation_bytes(run: PreparedRun, plan: PipelinePlan, stage: int, num_tokens: int) -> int:
    """Estimate what the layers of a stage keep, over the microbatches that are in flight at once."""
    args, arch = run.config.training, run.architecture
    in_flight = _microbatches_in_flight(args, stage)
    numbers = [number for number, owner in enumerate(plan.layer_stages) if owner == stage]
    layers = [_layer_bytes(args, arch, has_experts=arch.has_experts(number)) for number in numbers]
    if args.recompute_granularity == "full":
        stream = arch.hidden_size // (args.layout.tp if args.sequence_parallel else 1)
        kept = len(layers) * stream * args.params_dtype.itemsize * in_flight + max(layers, default=0)
    else:
        kept = sum(layers) * in_flight
    return int(num_tokens * kept)


def _layer_bytes(args: TrainingArguments, arch: Architecture, *, has_experts: bool) -> int:
    """Estimate what one layer keeps of a token."""
    tp = args.layout.tp
    queries, keys = arch.num_heads * arch.head_dim, arch.num_query_groups * arch.head_dim
    stream = arch.hidden_size // (tp if args.sequence_parallel else 1)
    # Counted with autograd's saved-tensor hooks on Megatron's local layers, where half-precision norms work in fp32.
    width = args.params_dtype.itemsize
    norm = 2 if width == 4 else 3 + arch.zero_centered_norms
    layer = (2 + (4 if arch.sandwich_norms else 2) * norm) * stream
    layer += (3 * queries + 3 * keys + (0 if has_experts else 5 * arch.ffn_hidden_size)) // tp
    if args.packing:
        # the sequences' outputs put into one row, and at most every key and value behind its prefix
        layer += (queries + 2 * keys * args.prefix_sharing) // tp
    if arch.qk_norm:
        # an fp32 key is normed where it lies, in the projection's output
        layer += (norm * queries + (norm - (width == 4)) * keys) // tp
    return layer * width + (_expert_bytes(args, arch) if has_experts else 0)


def _expert_bytes(args: TrainingArguments, arch: Architecture) -> int:
    """Estimate what experts that are chosen evenly keep of a token, and the router, whose numbers are fp32."""
    experts, tp = arch.experts, args.layout.tp
    assert experts is not None
    inner = 6 * experts.ffn_hidden_size // tp
    # split experts see every token of the tensor-parallel ranks, whole ones each token once
    stream = arch.hidden_size // (tp if args.layout.ep > 1 else 1)
    routing = 9 * experts.num_experts + 32 * experts.experts_per_token
    return experts.experts_per_token * (stream + inner) * args.params_dtype.itemsize + routing


def _microbatches_in_flight(args: TrainingArguments, stage: int) -> float:
    """Microbatches whose activations a stage holds at once, as multiples of all its layers."""
    pp, vpp = args.layout.pp, args.layout.vpp
    # with packing the number of microbatches follows from the pairs: at most one pair each
    steps = args.gradient_accumulation_steps * (args.per_device_train_batch_size if args.packing else 1)
    if vpp is None:
        return min(pp - stage, steps)
    # The interleaved schedule warms up with this many chunks of a microbatch before the first one goes back.
    warmup_chunks = 2 * (pp - stage - 1) + (vpp - 1) * pp + 1
    return min(warmup_chunks / vpp, steps)


def _screened_bytes(run: PreparedRun) -> int:
    """Return the int8 form of one head: a byte for every weight, and a scale for every row."""
    args, arch = run.config.training, run.architecture
    if args.head_forward == "exact":
        return 0
    return -(-arch.vocab_size // args.tensor_model_parallel_size) * (arch.hidden_size + 4)


def _head_bytes(run: PreparedRun, num_tokens: int) -> int:
    """Estimate the fused head: gathered rows, their gradient, the weight's gradient and one tile of logits."""
    args, arch = run.config.training, run.architecture
    width, columns = args.params_dtype.itemsize, -(-arch.vocab_size // args.tensor_model_parallel_size)
    rows = num_tokens * arch.hidden_size * (2 * width + 4)
    # a frozen head has no gradient
    d_weight = 0 if run.config.lora is not None else columns * arch.hidden_size * width
    return rows + d_weight + 2 * 1024 * min(columns, 8192) * 4


def full_logits_bytes(run: PreparedRun) -> int:
    """Return what the fp32 logits of one microbatch would take on a rank, which the fused head never holds."""
    args = run.config.training
    columns = -(-run.architecture.vocab_size // args.tensor_model_parallel_size)
    return microbatch_positions(run) * columns * 4
