"""Which layers each pipeline stage holds, and what it has to compute for them.

The last stage also computes the vocabulary head. With a large vocabulary and long answers that is the work of several
layers, and a stage that takes longer than the others makes all of them wait: `plan_pipeline` can give it fewer layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fastpref.data import PackedCollator, PreferenceCollator, TokenizedPair
from fastpref.errors import Problem
from fastpref.kernels import plan_name
from fastpref.run.architecture.architecture import Architecture
from fastpref.run.config.arguments import TrainingArguments
from fastpref.run.config.layout import ParallelLayout

# Columns that an active backward pass visits, as a fraction of the vocabulary: not known before the run, measured
# between 0.09 (a trained model) and 0.66 (a flat one) by `bench`.
ACTIVE_FRACTION = 0.25
# An int8 product over all columns, in products of 16-bit numbers: a tensor core takes 8 bits at twice the rate.
INT8_PRODUCT = 0.5
# Pairs that tell the shape of a data set's rows.
SAMPLE_PAIRS = 1024


@dataclass(frozen=True)
class PipelinePlan:
    """Layers of every chunk, in the order in which tokens visit the chunks; chunk i runs on stage i % `num_stages`."""

    num_stages: int
    chunk_layers: tuple[int, ...]

    @property
    def stage_layers(self) -> tuple[int, ...]:
        """Layers of every stage."""
        return tuple(sum(self.chunk_layers[stage :: self.num_stages]) for stage in range(self.num_stages))

    @property
    def layer_stages(self) -> tuple[int, ...]:
        """Stage of every layer."""
        chunks = enumerate(self.chunk_layers)
        return tuple(chunk % self.num_stages for chunk, count in chunks for _ in range(count))

    def megatron_layout(self) -> list[list[str]] | None:
        """Return Megatron's `pipeline_model_parallel_layout`; None where its own equal split says the same."""
        if len(set(self.chunk_layers)) == 1:
            return None
        chunks = [["decoder"] * count for count in self.chunk_layers]
        chunks[0].insert(0, "embedding")
        chunks[-1].append("loss")
        return chunks


def plan_pipeline(num_layers: int, layout: ParallelLayout, head_layers: float = 0.0) -> PipelinePlan:
    """Cut the layers into chunks whose largest load is as small as whole layers allow.

    Args:
        num_layers: layers of the model, at least one per chunk.
        layout: parallel sizes.
        head_layers: cost of the vocabulary head in layers; 0 gives an even cut, what is left over to the first chunks.
    """
    loads = [0.0] * (layout.num_chunks - 1) + [head_layers]
    counts = [0] * layout.num_chunks
    for _ in range(num_layers):
        chunk = loads.index(min(loads))
        loads[chunk] += 1.0
        counts[chunk] += 1
    return PipelinePlan(layout.pp, tuple(counts))


def expert_stage_problems(plan: PipelinePlan, arch: Architecture) -> Iterator[Problem]:
    """Yield which stages hold no layer with experts while others do: their optimizers would wait for each other."""
    with_experts = {stage for layer, stage in enumerate(plan.layer_stages) if arch.has_experts(layer)}
    without = sorted(set(range(plan.num_stages)) - with_experts)
    if with_experts and without:
        yield Problem(
            "pipeline_model_parallel_size",
            f"must leave every stage a layer with experts, got none on stages {without} of {plan.num_stages} "
            f"(layers per stage: {list(plan.stage_layers)}); lower it",
        )


class RowShape(NamedTuple):
    """Rows of a data set as the model sees them: positions that a token attends over, and scored positions in all."""

    length: float
    scored_fraction: float


def row_shape(
    pairs: Sequence[TokenizedPair], collator: PreferenceCollator | PackedCollator, pairs_per_microbatch: int
) -> RowShape:
    """Measure the rows that `collator` makes of the first pairs."""
    pairs = pairs[:SAMPLE_PAIRS]
    sides = [side for pair in pairs for side in pair.sides]
    num_tokens = sum(len(ids) for ids, _ in sides)
    num_scored = num_tokens - sum(num_prompt for _, num_prompt in sides)
    if isinstance(collator, PackedCollator):
        num_positions = sum(map(collator.cost, pairs))
        return RowShape(num_tokens / len(sides), num_scored / num_positions)
    groups = [pairs[start : start + pairs_per_microbatch] for start in range(0, len(pairs), pairs_per_microbatch)]
    num_positions = sum(collator(group)["input_ids"].numel() for group in groups)
    return RowShape(num_positions / len(sides), num_scored / num_positions)


def layer_flops(arch: Architecture, row_length: float) -> float:
    """Floating-point operations of a layer's forward pass for one token of a row, in the mean over the layers."""
    queries, keys = arch.num_heads * arch.head_dim, arch.num_query_groups * arch.head_dim
    widths = [
        arch.experts.experts_per_token * arch.experts.ffn_hidden_size
        if arch.experts is not None and arch.has_experts(layer)
        else arch.ffn_hidden_size
        for layer in range(arch.num_layers)
    ]
    matrices = arch.hidden_size * (2 * queries + 2 * keys + 3 * sum(widths) / len(widths))
    # a causal query meets half of its row, once for the scores and once for the values
    return 2.0 * matrices + 2.0 * row_length * queries


def head_flops(arch: Architecture) -> float:
    """Floating-point operations of the vocabulary head's forward pass for one scored token."""
    return 2.0 * arch.hidden_size * arch.vocab_size


def head_in_layers(arch: Architecture, args: TrainingArguments, rows: RowShape, *, has_reference: bool) -> float:
    """Cost of the vocabulary head over a training step, in layers.

    Args:
        arch: the model.
        args: how both go forward and backward.
        rows: of the data; the head computes only their scored tokens.
        has_reference: a forward pass under the reference precedes every step.

    Source: the usual count of 2 operations per weight and token forward, 4 backward, 2 more for what is recomputed.
    """
    forward = 2.0 if has_reference else 1.0
    layer_passes = forward + (3.0 if args.recompute_granularity == "full" else 2.0)
    is_active = plan_name(args.head_backward, args.params_dtype, args.head_forward) == "active"
    # The cached plan keeps its logits; every other one makes them again.
    backward = 2.0 if args.head_backward == "cached" else 3.0
    head_forward = INT8_PRODUCT + ACTIVE_FRACTION if args.head_forward == "screened" else 1.0
    head_passes = forward * head_forward + backward * (ACTIVE_FRACTION if is_active else 1.0)
    head = head_flops(arch) * head_passes * rows.scored_fraction
    return head / (layer_flops(arch, rows.length) * layer_passes)


def stage_shares(plan: PipelinePlan, head_layers: float) -> list[float]:
    """Fraction of a step's operations on each stage; equal fractions are the best that a pipeline can do."""
    last = plan.num_stages - 1
    loads = [count + (head_layers if stage == last else 0.0) for stage, count in enumerate(plan.stage_layers)]
    return [load / sum(loads) for load in loads]
