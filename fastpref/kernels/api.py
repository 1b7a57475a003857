"""`linear_logps`: log-probabilities of sequences straight from hidden states and the vocabulary projection.

The op ends at log-probabilities. It has three steps: find the labelled rows (`rows`), compute one log-probability
per row (`reference`, or a tiled backend), sum rows to sequences. Only the middle step is fused; the rest is plain
PyTorch, so a gradient to any returned log-probability reaches `hidden`, `weight` and `bias` by the ordinary rules of
autograd.

Dims: `S` sequences, `L` padded length, `T` tokens, `R` rows (tokens with a label), `H` hidden, `V` vocabulary,
`P` ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastpref.kernels import active, checks, plan_options
from fastpref.kernels.engine import Head
from fastpref.kernels.engines import resolve_backend
from fastpref.kernels.ops import ForwardOptions, Operands, Screen, Settings
from fastpref.kernels.outputs import STATISTICS, SequenceLogps
from fastpref.kernels.reference import RowOutputs, reference_rows
from fastpref.kernels.rows import check_rows, derive_rows, gather_rows, rows_on_device, segment_sum
from fastpref.kernels.screening import ScreenedHead, check_screened
from fastpref.kernels.transforms import score_rows
from fastpref.kernels.vocab_parallel import shard_start, vocabulary_size
from fastpref.kernels.weight_sum import check_is_current, check_weight_sum


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    rows: Tensor | None = None,
    cu_rows: Tensor | None = None,
    nll_labels: Tensor | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    tp_group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    sequence_parallel: bool = False,
    main_grad: Tensor | None = None,
    weight_sum: Tensor | None = None,
    screened: ScreenedHead | None = None,
    backend: str = "auto",
    forward: str = "exact",
    backward: str = "auto",
    active_eps: float | None = None,
    cache_bytes: int | None = None,
    stats: Sequence[str] = (),
    debug: bool = False,
) -> SequenceLogps:
    """Sum the log-probabilities of each sequence's labels without holding its logits.

    Equals: `z = logit_scale * (hidden @ weight.T + bias)`, then with a softcap `z = softcap * tanh(z / softcap)`
    (Gemma-2's order: scale, then cap); `logps[s]` = sum of `log_softmax(z[t])[labels[t]]` over the labelled tokens t of
    sequence s.

    Args:
        hidden: padded [S, L, H] or flat [T, H]; fp32, bf16, fp16 or fp64, any strides.
        weight: [V, H], or this rank's shard [V_local, H] (any size, 0 included) with `tp_group`; dtype of `hidden`.
        labels: int64 [S, L] or [T], already shifted: `labels[t]` is the token that `hidden[t]` predicts, or
            `ignore_index`.
        cu_seqlens: int32 or int64 [S+1], token bounds of the sequences in flat `hidden`.
        rows: int64 [R], indices into the flat [T] (or S*L) token axis of the tokens to score, grouped by sequence,
            tokens in any order; instead of `cu_seqlens`. Only these tokens are scored; a token may occur twice. On the
            host, like `cu_rows`, they cost no device sync; on the device one, and none in a CUDA graph.
        cu_rows: int32 or int64 [S+1], bounds of each sequence's group in `rows`.
        nll_labels: like `labels`: a second mask in the same pass, may cover other tokens. Where both label a token the
            labels must agree.
        bias: [V], dtype of `hidden`.
        logit_scale: factor on the logits (1/temperature, or muP's output multiplier).
        softcap: bound of the logits, > 0.
        ignore_index: the value that means "no label".
        tp_group: ranks that each hold a shard of the vocabulary; every rank must make the call, with the same labels.
        vocab_start: id of this shard's first row. None derives it from all ranks' sizes, in rank order, by one more
            (tiny) collective.
        sequence_parallel: `hidden` is this rank's contiguous slice [T/P, H] of the flat token axis; everything else
            describes all T tokens.
        main_grad: [V_local, H] in fp32 (fp64 for fp64 inputs): the backward pass adds the weight's gradient to it in
            place, unrounded, and `weight` gets None (Megatron's gradient accumulation fusion).
        weight_sum: [H], what `sum_weight(weight)` returns, for "active", whose backward pass otherwise reads all of
            `weight` once to know it; under autocast too that of `weight` as it is given. One computed before the weight
            was last written to, through `.data` too, gives wrong gradients of `hidden`; `debug` finds out.
        screened: what `screen_weight(weight)` returns, for forward="screened", which otherwise makes it anew in every
            call. One of another weight or of an earlier version is refused.
        backend: "triton" (GPU), "torch" (tiled, any device; on a CPU with native passes where they are built),
            "reference" (holds the logits); "auto" = "triton" on a GPU that has it, else "torch".
        forward: which logits are multiplied exactly:
            "exact" - all.
            "screened" - those of the active columns (see `backward`), which an int8 pass over all columns finds. What
            that pass adds for the others is at most `active_eps` of a row's probability on average: on real text a
            log-probability is off by 2e-4 nat (root mean square; docs/numerics.md). Labels, and the largest logits,
            are exact. For a flat distribution, rows or weights that are not finite, and less than 4096 columns the
            exact pass takes its place; `active_fraction` is 1.0 then, or what the exact pass finds. No CUDA graph.
        backward: which logits the backward pass looks at, and where it has them from:
            "active" - only of the columns that matter: all labels, and those that hold all but `active_eps` of the
            probability of a row on average, and more than that of any single row. The rest enters the gradient of
            `hidden` by its mean, that of `weight` not at all. On real text the relative L2 errors are 0.15 to 0.75 of
            `active_eps` for `hidden` and 0.03 to 0.13 of it for `weight` (docs/numerics.md); a flat distribution has no
            columns to leave out, and gets exact gradients.
            "recompute" - all of them, multiplied out again block by block.
            "cached" - all of them, kept from the forward pass as bf16 exponentials, 2 bytes per row and column.
            "exact" - "cached" for 16-bit inputs that fit `cache_bytes`, else "recompute".
            "auto" - "active" for 16-bit inputs and forward="screened", "exact" for others.
        active_eps: for "active", in (0, 1); None = 2**-8.
        cache_bytes: budget of "exact" and "cached" in bytes; None = 512 MiB on a GPU and 0 on a CPU for "exact", no
            limit for "cached".
        stats: results of `SequenceLogps` that cost more: any of "token_logps" and the statistics, "entropy", "hits" and
            so on; with "active", also "active_fraction" and "cold_mass". What is not asked for is not computed.
        debug: look at the labels before any work, and raise IndexError for the first that is no id; waits for the
            device, and for all ranks of `tp_group`. Also compares `weight_sum` with the weight.

    Returns:
        SequenceLogps. A label outside [0, V) other than `ignore_index`, or a token whose two labels disagree, gives NaN
        for that token and its sequence, no gradient for that token, and leaves every other sequence untouched.
        Sequences without labels give logp 0.0, count 0 and zero gradients.

    Autocast: where it is on and the inputs' dtypes differ, all are cast to its dtype, as for `nn.Linear`. Equal dtypes
    are left alone: what is in fp32 stays in fp32.

    Memory: O(R * H) and a few tiles of logits, never R x V; "cached" holds its budget.

    Determinism: bitwise repeatable; a sequence's log-probabilities do not depend, bit for bit, on what else is in the
    batch or on packing (excepted are forward="screened", whose active columns are those of the whole call; fp64, meant
    for gradient checks, which BLAS rounds by position where H is odd; and "reference", whose products have as many
    rows as the batch).

    Raises:
        TypeError, ValueError: arguments that do not fit, before any work is done; among them tensors that keep their
            numbers elsewhere (DTensor, quantised, sparse, nested, meta).
        IndexError: with `debug`, a label outside [0, V) other than `ignore_index`; names the token.
        MissingDependencyError: a backend whose dependency is not installed.
        NotImplementedError: a second derivative, or one in forward mode; "reference" has both. `torch.func.grad`,
            `vjp`, `jacrev` and `vmap` are right with every backend.
        RuntimeError: in backward, an input was changed in place since the forward pass ("reference": one that its
            gradients need; it has copies of the rows).
    """
    checks.check_stats(stats)
    checks.check_scalars(logit_scale, softcap, ignore_index)
    given_weight = weight
    hidden, weight, bias = _autocast(hidden, weight, bias)
    checks.check_model_tensors(hidden, weight, bias)
    checks.check_layout(hidden, cu_seqlens, rows, cu_rows, sequence_parallel)
    checks.check_choice("backend", backend, checks.BACKENDS)
    backend = resolve_backend(backend, hidden)
    checks.check_main_grad(main_grad, hidden, weight, backend)
    plan = plan_options.resolve_plan(backward, backend, hidden, softcap, active_eps, cache_bytes, stats, forward)
    check_weight_sum(weight_sum, hidden, backward, plan.name)
    check_screened(screened, given_weight, forward)
    group = checks.check_parallel(hidden, weight, tp_group, vocab_start, sequence_parallel, backend)
    for name, ids in (("labels", labels), ("nll_labels", nll_labels)):
        if ids is not None or name == "labels":
            checks.check_labels(name, ids, hidden, group.size() if group is not None and sequence_parallel else 1)
    if debug:
        num_ids = weight.shape[0] if group is None else vocabulary_size(weight, group)
        for name, ids in (("labels", labels), ("nll_labels", nll_labels)):
            checks.check_ids(name, ids, num_ids, ignore_index)
        check_is_current(weight_sum, given_weight, group)

    labels_T = labels.reshape(-1)
    nll_labels_T = None if nll_labels is None else nll_labels.reshape(-1)
    if rows is None or cu_rows is None:
        if cu_seqlens is None:
            bounds = torch.arange(hidden.shape[0] + 1, dtype=torch.int64, device="cpu")
            cu_seqlens = bounds * hidden.shape[1]
        rows, cu_rows = derive_rows(labels_T, nll_labels_T, cu_seqlens, ignore_index)
    else:
        rows, cu_rows = check_rows(rows, cu_rows, labels_T.shape[0])
    index_R, bounds = rows, cu_rows
    if rows.device != labels.device or cu_rows.device != labels.device:
        index_R, bounds = rows_on_device(rows, cu_rows, labels_T).split([rows.shape[0], cu_rows.shape[0]])
    labels_R = labels_T[index_R]
    nll_labels_R = None if nll_labels_T is None else nll_labels_T[index_R]
    targets_R = _row_targets(labels_R, nll_labels_R, ignore_index)
    statistics = tuple(name for name in STATISTICS if name in stats)
    activity: dict[str, Tensor] = {}
    if backend == "reference":
        head = Head(weight, bias, logit_scale, softcap)
        outputs = reference_rows(
            gather_rows(hidden, index_R),
            head,
            targets_R,
            statistics,
            plan.active_eps if forward == "screened" else None,
        )
    else:
        group_name = None if group is None else group.group_name
        if vocab_start is not None:
            targets_R = targets_R - vocab_start
        elif group_name is not None:
            targets_R = targets_R - shard_start(weight, group_name)
        # Which rank owns a row is worked out on the host.
        given_rows = rows if sequence_parallel and group is not None else index_R
        operands = Operands(hidden, weight, bias, given_rows, targets_R, weight_sum)
        settings = Settings(logit_scale, softcap, group_name, sequence_parallel, backend)
        screen = Screen(forward == "screened")
        if screened is not None:
            screen = Screen(True, screened.values, screened.scales, weight is given_weight)
        outputs, activity = _fused_rows(operands, settings, main_grad, statistics, plan, stats, screen)
    results = _sum_to_sequences(outputs, labels_R, nll_labels_R, ignore_index, bounds, "token_logps" in stats)
    return SequenceLogps(rows=rows, cu_rows=cu_rows, **results, **activity)


def _fused_rows(
    operands: Operands,
    settings: Settings,
    main_grad: Tensor | None,
    statistics: tuple[str, ...],
    plan: plan_options.BackwardPlan,
    stats: Sequence[str],
    screen: Screen,
) -> tuple[RowOutputs, dict[str, Tensor]]:
    """Score rows by the fused operator; also what it leaves out, where asked and where it leaves something out.

    Args:
        operands: see `ops`.
        settings: see `ops`.
        main_grad: see `ops.ForwardOptions`.
        statistics: those that the operator computes.
        plan: of the backward pass.
        stats: everything that was asked for.
        screen: of the forward pass.
    """
    inputs = [tensor for tensor in (operands.hidden, operands.weight, operands.bias) if tensor is not None]
    needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    name = plan.name if needs_gradient else "none"
    options = ForwardOptions(main_grad, statistics, name, plan.active_eps, plan.cache_bytes)
    saved, report = score_rows(operands, settings, options, screen)
    outputs = RowOutputs(saved.token_logps_R, dict(zip(statistics, report.statistics_KR.unbind(), strict=True)))
    asked = [stat for stat in checks.ACTIVITY_STATS if stat in stats]
    if not asked or not (needs_gradient or screen.is_wanted):
        return outputs, {}
    sizes = operands.labels_R.shape[0], operands.weight.shape[0]
    found = active.summary(saved.num_active.detach(), report.cold_mass.detach(), *sizes)
    return outputs, {stat: found[stat] for stat in asked}


def _autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Bring inputs of different dtypes to the dtype of autocast where it is on; it takes fp32 and 16 bits only."""
    given = [tensor for tensor in (hidden, weight, bias) if isinstance(tensor, Tensor)]
    dtypes, device = {tensor.dtype for tensor in given}, given[0].device.type if given else "cpu"
    if len(dtypes) <= 1 or not dtypes <= set(checks.AUTOCAST_DTYPES) or not torch.is_autocast_enabled(device):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _row_targets(labels_R: Tensor, nll_labels_R: Tensor | None, ignore_index: int) -> Tensor:
    """Choose the one id that each row is scored for; -1, an id that nobody owns, where the two masks disagree."""
    if nll_labels_R is None:
        return labels_R
    is_labelled_R, is_nll_R = labels_R != ignore_index, nll_labels_R != ignore_index
    target_R = torch.where(is_labelled_R, labels_R, nll_labels_R)
    return torch.where(is_labelled_R & is_nll_R & (labels_R != nll_labels_R), -1, target_R)


def _sum_to_sequences(
    outputs: RowOutputs,
    labels_R: Tensor,
    nll_labels_R: Tensor | None,
    ignore_index: int,
    bounds: Tensor,
    keeps_tokens: bool,
) -> dict[str, Tensor]:
    """Mask rows and sum them; selection, never multiplication, so that a masked NaN stays out.

    Returns:
        Attributes of `SequenceLogps`; `bounds` are its `cu_rows` on the device.
    """

    def masked_sum(values_R: Tensor, is_masked_R: Tensor) -> Tensor:
        return segment_sum(values_R.masked_fill(is_masked_R, 0.0), bounds)

    is_ignored_R = labels_R == ignore_index
    results = {
        "logps": masked_sum(outputs.token_logps, is_ignored_R),
        "counts": segment_sum((~is_ignored_R).double(), bounds).long(),
    }
    results |= {name: masked_sum(values_R.detach(), is_ignored_R) for name, values_R in outputs.statistics.items()}
    if keeps_tokens:
        results["token_logps"] = outputs.token_logps.masked_fill(is_ignored_R, 0.0)
    if nll_labels_R is not None:
        is_without_R = nll_labels_R == ignore_index
        results["nll"] = masked_sum(-outputs.token_logps, is_without_R)
        results["nll_counts"] = segment_sum((~is_without_R).double(), bounds).long()
    return results
