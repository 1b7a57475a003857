"""One problem cut over worker ranks by vocabulary and by sequence, put together again, and held to one rank."""

import torch
import torch.distributed as dist
from head_oracle import STATS, assert_results_within_rule, flatten, mixture
from torch import Tensor

from fastpref import linear_logps
from fastpref.testing.adversarial import IGNORE, HeadInputs
from fastpref.testing.workers import RankPool

SIZES = {"even": (49, 48), "uneven": (90, 7), "first empty": (0, 97), "last empty": (97, 0)}


def rank_slice(inputs: HeadInputs, sequence_parallel: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Padded input as one rank gets it: as it is, or its slice of Megatron's sequence-major [L, S, H]."""
    if not sequence_parallel:
        return inputs.hidden_SLH, {"labels": inputs.labels_SL, "nll_labels": inputs.nll_labels_SL}
    num_sequences = inputs.labels_SL.shape[0]
    is_row_SL = inputs.labels_SL != IGNORE
    if inputs.nll_labels_SL is not None:
        is_row_SL |= inputs.nll_labels_SL != IGNORE
    s, t = is_row_SL.nonzero().unbind(1)
    layout = {
        "labels": inputs.labels_SL.t().flatten(),
        "nll_labels": None if inputs.nll_labels_SL is None else inputs.nll_labels_SL.t().flatten(),
        "rows": t * num_sequences + s,
        "cu_rows": torch.searchsorted(s, torch.arange(num_sequences + 1)),
    }
    return inputs.hidden_SLH.transpose(0, 1).flatten(0, 1).chunk(dist.get_world_size())[dist.get_rank()], layout


def score_on_rank(
    inputs: HeadInputs, sizes: tuple[int, ...], sequence_parallel: bool, derive_start: bool, needs: tuple[str, ...]
) -> dict[str, Tensor]:
    """One rank's outputs, and its gradients by name."""
    rank = dist.get_rank()
    start = sum(sizes[:rank])
    hidden, layout = rank_slice(inputs, sequence_parallel)
    shard = slice(start, start + sizes[rank])
    leaves = {"hidden": hidden, "weight": inputs.weight_VH[shard]}
    if inputs.bias_V is not None:
        leaves["bias"] = inputs.bias_V[shard]
    leaves = {name: leaf.clone().requires_grad_(name in needs) for name, leaf in leaves.items()}
    result = linear_logps(
        leaves["hidden"],
        leaves["weight"],
        bias=leaves.get("bias"),
        logit_scale=inputs.logit_scale,
        softcap=inputs.softcap,
        tp_group=dist.group.WORLD,
        vocab_start=None if derive_start else start,
        sequence_parallel=sequence_parallel,
        backward="exact",
        stats=STATS,
        **layout,
    )
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    gradients = torch.autograd.grad(mixture(result), list(wanted.values()), materialize_grads=True)
    found = flatten(result, dict(zip(wanted, gradients, strict=True)))
    return {name: values.detach() for name, values in found.items()} | {"counts": result.counts}


def score(
    pool: RankPool,
    inputs: HeadInputs,
    sizes: tuple[int, ...] = SIZES["even"],
    sequence_parallel: bool = False,
    derive_start: bool = False,
    needs: tuple[str, ...] = ("hidden", "weight", "bias"),
) -> dict[str, Tensor]:
    """Outputs and whole gradients; what every rank holds must be the same bits on every rank."""
    ranks = pool.run(score_on_rank, inputs, sizes, sequence_parallel, derive_start, needs)
    found = {}
    for name in ranks[0]:
        parts = [rank[name] for rank in ranks]
        if name in ("d_weight", "d_bias"):
            found[name] = torch.cat(parts)
        elif name == "d_hidden" and sequence_parallel:
            num_sequences, length = inputs.labels_SL.shape
            found[name] = torch.cat(parts).view(length, num_sequences, -1).transpose(0, 1)
        else:
            found[name] = parts[0]
            for part in parts[1:]:
                torch.testing.assert_close(part, parts[0], rtol=0, atol=0, equal_nan=True)
    return found


def assert_equals_one_rank(found: dict[str, Tensor], inputs: HeadInputs) -> None:
    counts = found.pop("counts")
    assert torch.equal(counts, (inputs.labels_SL != IGNORE).sum(1))
    assert_results_within_rule(found, inputs)
