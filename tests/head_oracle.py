"""What the op must return, written again without any code of the package, and the comparison by the numeric rule."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from fastpref import SequenceLogps, linear_logps
from fastpref.kernels import native, torch_tiles
from fastpref.kernels.outputs import STATISTICS
from fastpref.testing.adversarial import IGNORE, HeadInputs
from fastpref.testing.numerics import assert_within_rule, max_error

STATS = ("token_logps", *STATISTICS)
OUTPUTS = ("logps", "nll", *STATS)


@contextmanager
def tiles(block_rows: int = 8, bwd_rows: int = 16, columns: int = 32, multiple: int = 1) -> Iterator[None]:
    """PyTorch's engine with tiles so small that a handful of rows and columns crosses many of them."""
    with (
        mock.patch.object(torch_tiles, "CPU_TILES", torch_tiles.TileShape(block_rows, bwd_rows, columns, multiple)),
        mock.patch.object(native, "supports", lambda dtype: False),
    ):
        yield


def peaked_inputs(
    num_rows: int = 40, vocab_size: int = 600, hidden_size: int = 32, num_sequences: int = 2
) -> HeadInputs:
    """Rows that point at their labels, as those of a trained model do; every fifth row is nearly flat."""
    generator = torch.Generator().manual_seed(0)
    weight_VH = torch.randn(vocab_size, hidden_size, generator=generator) * 0.5 + 0.2
    labels_SL = torch.randint(0, vocab_size, (num_sequences, num_rows // num_sequences), generator=generator)
    noise_SLH = torch.randn(*labels_SL.shape, hidden_size, generator=generator)
    hidden_SLH = 6.6 * weight_VH[labels_SL] + 2.2 * noise_SLH
    hidden_SLH[:, ::5] *= 0.3
    return HeadInputs(hidden_SLH, weight_VH, labels_SL)


def statistics(z_RV: Tensor, labels_R: Tensor) -> dict[str, Tensor]:
    """Each statistic of rows of logits, by its definition; a label may be no column."""
    is_here_R = (labels_R >= 0) & (labels_R < z_RV.shape[1])
    target_R = z_RV.gather(1, torch.where(is_here_R, labels_R, 0).unsqueeze(1)).squeeze(1)
    return {
        "entropy": torch.special.entr(torch.log_softmax(z_RV, dim=1).exp()).sum(dim=1),
        "hits": ((target_R == z_RV.amax(dim=1)) & is_here_R).to(z_RV.dtype),
        "mean_logit": z_RV.mean(dim=1),
    }


def oracle(inputs: HeadInputs) -> dict[str, list[float]]:
    """Per-sequence values of padded input, token by token, in fp64; `labels` inside the vocabulary only."""
    inputs = inputs.cast(torch.float64)
    values: dict[str, list[float]] = {name: [] for name in (*OUTPUTS, "counts", "nll_counts")}
    for s in range(inputs.hidden_SLH.shape[0]):
        sums = dict.fromkeys(values, 0.0)
        for t in range(inputs.hidden_SLH.shape[1]):
            label = int(inputs.labels_SL[s, t])
            nll_label = IGNORE if inputs.nll_labels_SL is None else int(inputs.nll_labels_SL[s, t])
            if label == IGNORE and nll_label == IGNORE:
                continue
            z = inputs.weight_VH @ inputs.hidden_SLH[s, t]
            if inputs.bias_V is not None:
                z = z + inputs.bias_V
            z = z * inputs.logit_scale
            if inputs.softcap is not None:
                z = inputs.softcap * torch.tanh(z / inputs.softcap)
            logps = z - z.logsumexp(0)
            if label != IGNORE:
                sums["logps"] += float(logps[label])
                sums["counts"] += 1
                for name, (value,) in statistics(z.unsqueeze(0), inputs.labels_SL[s, t : t + 1]).items():
                    sums[name] += float(value)
            values["token_logps"].append(float(logps[label]) if label != IGNORE else 0.0)
            if nll_label != IGNORE:
                sums["nll"] -= float(logps[nll_label])
                sums["nll_counts"] += 1
        for name in values:
            if name != "token_logps":
                values[name].append(sums[name])
    return values


def run(
    inputs: HeadInputs, backend: str = "torch", backward: str = "exact", **options
) -> tuple[SequenceLogps, dict[str, Tensor]]:
    """Outputs, and gradients of a fixed random mixture of every differentiable one of them."""
    leaves = {
        name: tensor.detach().requires_grad_()
        for name, tensor in (("hidden", inputs.hidden_SLH), ("weight", inputs.weight_VH), ("bias", inputs.bias_V))
        if tensor is not None
    }
    result = linear_logps(
        leaves["hidden"],
        leaves["weight"],
        inputs.labels_SL,
        nll_labels=inputs.nll_labels_SL,
        bias=leaves.get("bias"),
        logit_scale=inputs.logit_scale,
        softcap=inputs.softcap,
        backend=backend,
        backward=backward,
        stats=STATS,
        **options,
    )
    gradients = torch.autograd.grad(mixture(result), list(leaves.values()), materialize_grads=True)
    return result, dict(zip(leaves, gradients, strict=True))


def mixture(result: SequenceLogps) -> Tensor:
    """A fixed random mixture of every differentiable output, of the finite values: a right -inf has no gradient."""
    generator = torch.Generator().manual_seed(99)
    scalar = result.logps.new_zeros(())
    for values in (result.logps, result.nll, result.token_logps):
        if values is not None:
            weights = torch.randn(values.shape, generator=generator, dtype=torch.float64, device="cpu").to(values.dtype)
            scalar = scalar + torch.where(values.isfinite(), values * weights, 0.0).sum()
    return scalar


def torch_errors(inputs: HeadInputs, wide: dict[str, Tensor]) -> dict[str, Tensor]:
    """Plain PyTorch's results in the dtype of `inputs`: of three orders of summation, the one furthest from `wide`.

    One order may hit the exact value by luck, which says nothing about what the dtype can do.
    """
    hidden_size = inputs.weight_VH.shape[1]
    worst: dict[str, Tensor] = {}
    for seed in range(3):
        order = torch.randperm(hidden_size, generator=torch.Generator().manual_seed(seed))
        if seed == 0:
            order = torch.arange(hidden_size)
        permuted = inputs._replace(
            hidden_SLH=inputs.hidden_SLH[..., order], weight_VH=inputs.weight_VH[:, order].contiguous()
        )
        found = flatten(*run(permuted, "reference"))
        for name in ("d_hidden", "d_weight"):
            found[name] = found[name][..., order.argsort()]
        for name, values in found.items():
            if name not in worst or max_error(values, wide[name]) > max_error(worst[name], wide[name]):
                worst[name] = values
    return worst


def flatten(result: SequenceLogps, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every floating result by name, gradients as d_name."""
    outputs = {name: getattr(result, name) for name in OUTPUTS if getattr(result, name) is not None}
    return outputs | {f"d_{name}": gradient for name, gradient in gradients.items()}


def assert_matches_reference(inputs: HeadInputs, dtype: torch.dtype, backend: str = "torch") -> None:
    """Every output and every exact gradient, by the rule, against the reference in fp64 and `dtype`."""
    inputs = inputs.cast(dtype)
    assert_results_within_rule(flatten(*run(inputs, backend)), inputs)


def assert_results_within_rule(found: dict[str, Tensor], inputs: HeadInputs) -> None:
    """Results by name, as `flatten` returns them, by the rule."""
    wide = flatten(*run(inputs.cast(torch.float64), "reference"))
    yardstick = torch_errors(inputs, wide)
    for name, values in found.items():
        kind = "gradient" if name.startswith("d_") else "output"
        assert_within_rule(values, yardstick[name], wide[name], kind=kind)
