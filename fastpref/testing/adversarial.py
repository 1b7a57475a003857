"""Inputs of `linear_logps` chosen to break kernels, each the distilled form of a failure seen somewhere.

Every case has a plain-PyTorch answer; `fastpref.testing.numerics` says how close a backend must come.

Dims: `S` sequences, `L` padded length, `H` hidden, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

IGNORE = -100
NEG_INF = float("-inf")


class HeadInputs(NamedTuple):
    """One call of `linear_logps` on padded input."""

    hidden_SLH: Tensor
    weight_VH: Tensor
    labels_SL: Tensor
    bias_V: Tensor | None = None
    nll_labels_SL: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def cast(self, dtype: torch.dtype) -> HeadInputs:
        """Return the inputs with every floating tensor in `dtype`."""
        return self._replace(
            hidden_SLH=self.hidden_SLH.to(dtype),
            weight_VH=self.weight_VH.to(dtype),
            bias_V=None if self.bias_V is None else self.bias_V.to(dtype),
        )


def bad_labels(vocab_size: int) -> list[int]:
    """Return labels that are neither `ignore_index` nor ids: next to both bounds, and where 32 or 64 bits end."""
    return [-1, -101, vocab_size, 2**31, -(2**63), 2**63 - 1]


def ragged_inputs(
    num_sequences: int = 4,
    length: int = 9,
    hidden_size: int = 33,
    vocab_size: int = 97,
    seed: int = 0,
    logit_std: float = 3.0,
) -> HeadInputs:
    """Draw ordinary fp32 inputs: prompts and padding without labels, sequence 1 without any, 2 with a single one.

    Args:
        num_sequences: S, any.
        length: L, any.
        hidden_size: H.
        vocab_size: V.
        seed: of the draw.
        logit_std: standard deviation of the logits; 3 is that of a trained model's, roughly.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden_SLH = torch.randn(num_sequences, length, hidden_size, generator=generator, dtype=torch.float32, device="cpu")
    weight_VH = torch.randn(vocab_size, hidden_size, generator=generator, dtype=torch.float32, device="cpu")
    weight_VH *= logit_std / hidden_size**0.5
    labels_SL = torch.randint(
        0, vocab_size, (num_sequences, length), generator=generator, dtype=torch.int64, device="cpu"
    )
    for s in range(num_sequences):
        first = int(torch.randint(0, length // 2 + 1, (), generator=generator, dtype=torch.int64, device="cpu"))
        last = int(
            torch.randint((length + 1) // 2, length + 1, (), generator=generator, dtype=torch.int64, device="cpu")
        )
        labels_SL[s, :first] = IGNORE
        labels_SL[s, last:] = IGNORE
    if num_sequences > 2 and length:
        labels_SL[1] = IGNORE
        labels_SL[2] = IGNORE
        labels_SL[2, -1] = vocab_size - 1
    return HeadInputs(hidden_SLH, weight_VH, labels_SL)


def _biased(fill: Callable[[Tensor], object]) -> HeadInputs:
    """Ordinary inputs with a bias that `fill` writes."""
    inputs = ragged_inputs()
    bias_V = torch.zeros(inputs.weight_VH.shape[0], dtype=torch.float32, device="cpu")
    fill(bias_V)
    return inputs._replace(bias_V=bias_V)


def leading_columns_masked() -> HeadInputs:
    """Mask the first 48 columns with -inf: a first vocabulary tile without one finite logit."""
    inputs = _biased(lambda bias_V: bias_V[:48].fill_(NEG_INF))
    return inputs._replace(labels_SL=torch.where(inputs.labels_SL >= 0, inputs.labels_SL.clamp(min=48), IGNORE))


def middle_columns_masked() -> HeadInputs:
    """Mask 40 columns with -inf, labels among them: a log-prob of -inf is then the right answer."""
    return _biased(lambda bias_V: bias_V[30:70].fill_(NEG_INF))


def one_column_left() -> HeadInputs:
    """Mask every column but one: the distribution is certain, its entropy 0."""

    def fill(bias_V: Tensor) -> None:
        bias_V.fill_(NEG_INF)
        bias_V[5] = 0.0

    inputs = _biased(fill)
    return inputs._replace(labels_SL=torch.where(inputs.labels_SL >= 0, 5, IGNORE))


def strongly_negative() -> HeadInputs:
    """Shift all logits to about -1e4: a running maximum that starts at 0 loses them."""
    return _biased(lambda bias_V: bias_V.fill_(-1e4))


def common_offset() -> HeadInputs:
    """Shift whole-numbered logits by 2^15: each is exact in fp32, but `target - log_sum_exp` has lost 15 bits."""
    inputs = _biased(lambda bias_V: bias_V.fill_(2.0**15))
    return inputs._replace(hidden_SLH=inputs.hidden_SLH.round(), weight_VH=inputs.weight_VH.round())


def wide_margin() -> HeadInputs:
    """Spread the logits over 1.5e4: probabilities are 0 or 1, log-probs in the thousands."""
    return _biased(
        lambda bias_V: bias_V.copy_(torch.linspace(-1e4, 5e3, bias_V.numel(), dtype=torch.float32, device="cpu"))
    )


def near_overflow() -> HeadInputs:
    """Take logits of +-6e4 by products of hidden and weight: the edge of fp16, and no overflow in any exponential."""
    inputs = ragged_inputs()
    hidden_SLH, weight_VH = torch.zeros_like(inputs.hidden_SLH), torch.zeros_like(inputs.weight_VH)
    hidden_SLH[..., 0] = 240.0
    weight_VH[:, 0] = torch.linspace(-250.0, 250.0, weight_VH.shape[0], dtype=torch.float32, device="cpu")
    return inputs._replace(hidden_SLH=hidden_SLH, weight_VH=weight_VH)


def uniform() -> HeadInputs:
    """Make all logits of a row equal, exactly: every probability is 1/V and every label a tied maximum."""
    inputs = ragged_inputs()
    return inputs._replace(hidden_SLH=inputs.hidden_SLH.round(), weight_VH=torch.ones_like(inputs.weight_VH))


def certain() -> HeadInputs:
    """Let every label have probability 1 to within rounding: log-probs and gradients near 0."""
    inputs = ragged_inputs(hidden_size=97, vocab_size=97)
    hidden_SLH = torch.nn.functional.one_hot(inputs.labels_SL.clamp(min=0), 97).float()
    return inputs._replace(hidden_SLH=hidden_SLH, weight_VH=torch.eye(97, dtype=torch.float32, device="cpu") * 40.0)


def edge_labels() -> HeadInputs:
    """Label with the first and the last id only."""
    inputs = ragged_inputs()
    is_even_L = torch.arange(inputs.labels_SL.shape[1], dtype=torch.int64, device="cpu") % 2 == 0
    edges_L = torch.where(is_even_L, 0, inputs.weight_VH.shape[0] - 1)
    return inputs._replace(labels_SL=torch.where(inputs.labels_SL >= 0, edges_L, IGNORE))


def repeated_labels() -> HeadInputs:
    """Label every token with one id: all rows write to the same row of the weight's gradient."""
    inputs = ragged_inputs()
    return inputs._replace(labels_SL=torch.where(inputs.labels_SL >= 0, 7, IGNORE))


def scaled_and_capped() -> HeadInputs:
    """Use bias, scale and softcap together, strong enough that the order of scale and cap shows."""
    inputs = ragged_inputs(logit_std=20.0)
    bias_V = torch.randn(
        inputs.weight_VH.shape[0], generator=torch.Generator().manual_seed(1), dtype=torch.float32, device="cpu"
    )
    return inputs._replace(bias_V=bias_V, logit_scale=0.6, softcap=15.0)


def second_mask() -> HeadInputs:
    """Score a second mask: tokens that only it labels, tokens that only `labels` labels, and tokens of both."""
    inputs = ragged_inputs()
    generator = torch.Generator().manual_seed(2)
    drawn_SL = torch.randint(
        0, inputs.weight_VH.shape[0], inputs.labels_SL.shape, generator=generator, dtype=torch.int64, device="cpu"
    )
    agreed_SL = torch.where(inputs.labels_SL >= 0, inputs.labels_SL, drawn_SL)
    is_kept_SL = torch.rand(inputs.labels_SL.shape, generator=generator, dtype=torch.float32, device="cpu") < 0.6
    return inputs._replace(nll_labels_SL=torch.where(is_kept_SL, agreed_SL, IGNORE))


ADVERSARIAL: dict[str, Callable[[], HeadInputs]] = {
    case.__name__: case
    for case in (
        ragged_inputs,
        leading_columns_masked,
        middle_columns_masked,
        one_column_left,
        strongly_negative,
        common_offset,
        wide_margin,
        near_overflow,
        uniform,
        certain,
        edge_labels,
        repeated_labels,
        scaled_and_capped,
        second_mask,
    )
}
"""Name -> inputs in fp32. All are exact questions with finite answers, except where a docstring says -inf."""
