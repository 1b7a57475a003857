"""Per-token log-probabilities of a Hugging Face causal language model, without its logits.

Design decisions:
- A prepared model understands one more keyword: `model(..., labels=labels, fused_lm_head=True)` returns `TokenLogps`.
  It is the call by which TRL's trainers ask for log-probs. Without the keyword the model is what it was (generation,
  saving).
- The model gets a subclass of its class, not a function that remembers it: copies, pickles and replicas of a prepared
  model are prepared models of their own.
- The decoder's hidden states go to the output layer by calling that module, and only the product inside it is
  replaced (`products`). So whatever sits on the layer runs as ever: gathering of sharded weights (FSDP, ZeRO-3),
  placement on devices, offloading, a copy of the layer or a few of its rows that PEFT trains.
- To the op every labelled token is a sequence of its own; so all that it returns per sequence is per token here.
- How a model turns the product into logits is found out at the first call, from its own logits of a few tokens
  (`logit_form`). An architecture that does something else there is refused, not trained wrongly.

Dims: `S` sequences, `L` positions, `N` hidden states, `R` labelled tokens, `H` hidden, `V` vocabulary.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from fastpref.errors import ConfigError
from fastpref.integrations.logit_form import (
    FOR_DECODER,
    IGNORE_INDEX,
    LogitForm,
    balance_loss,
    check_labels,
    decoder_of,
    find_form,
    foundation,
)
from fastpref.integrations.products import AnsweredProduct, Product, own_linear
from fastpref.integrations.supported import refuse_unsupported
from fastpref.kernels import linear_logps

# Field of `TokenLogps` -> statistic of `linear_logps`.
STATS = {"entropy": "entropy", "mean_logits": "mean_logit", "is_top1": "hits"}
# Fields that have a value at the last position, too.
EVERYWHERE = ("mean_logits_everywhere",)


@dataclass
class TokenLogps(ModelOutput):
    """What `fused_lm_head=True` returns: fp32 [S, L-1], 0 where there is no label; None = not asked for.

    Attributes:
        log_probs: log-probability of each next-token label. Differentiable.
        entropy: of the next-token distribution, in nats.
        mean_logits: mean of the logits over the vocabulary.
        is_top1: bool, whether the label has the largest logit (a tie counts).
        log_sum_sq_probs: log of the sum of squared probabilities.
        mean_logits_everywhere: [S, L] `mean_logits` of every position, labelled or not.
        aux_loss: the load-balancing loss of a mixture of experts, where `output_router_logits=True` was passed.
    """

    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits_everywhere: Tensor | None = None
    aux_loss: Tensor | None = None


def add_logps_head(
    model: PreTrainedModel,
    outputs: Sequence[str] = ("log_probs",),
    *,
    forward: str = "exact",
    backward: str = "auto",
) -> None:
    """Teach `model` to answer `model(..., labels=labels, fused_lm_head=True)` by `TokenLogps`.

    Equals: `log_softmax(model(...).logits[:, :-1])` at `labels[:, 1:]`, where these are not -100.

    `type(model)` becomes a subclass of the same name. Copies and pickles of the model are prepared, too; preparing one
    again changes its outputs and its plans.

    Args:
        model: a causal language model (the base model, where PEFT wraps it).
        outputs: fields of `TokenLogps` to compute; `log_probs` always is. `log_sum_sq_probs` costs a second forward
            pass of the output layer.
        forward: forward plan of `linear_logps`; "screened" makes the int8 form of the output layer in every call.
        backward: backward plan of `linear_logps`.

    Raises:
        ConfigError: the model is no text-only decoder, has an adapter that adds to its logits, or a quantized output
            layer; an unknown output. Calls raise it as well, where log-probs differ from those of the model's logits:
            the first call compares them, and the first after a change of the output layer.
    """
    refuse_unsupported(model)
    known = [field.name for field in fields(TokenLogps)]
    unknown = sorted(set(outputs) - set(known))
    if unknown:
        raise ConfigError(f"outputs must be among {', '.join(known)}, got {', '.join(unknown)}; leave these out")
    if not isinstance(model, ScoringModel):
        # A forward of the instance (a hook of accelerate, a patch) would hide that of the class.
        model.__dict__["_forward_before"] = model.__dict__.pop("forward", None)
        own_class: Any = type(model)
        model.__class__ = _scoring_class(own_class)
    model._logps_head = LogpsHead(tuple(outputs), forward, backward)


@contextmanager
def exact_forward(model: torch.nn.Module) -> Iterator[None]:
    """Inside, every logit of the prepared models in `model` is multiplied exactly, whatever their forward plan."""
    heads = [module._logps_head for module in model.modules() if isinstance(module, ScoringModel)]
    plans = [head.forward for head in heads]
    try:
        for head in heads:
            head.forward = "exact"
        yield
    finally:
        for head, plan in zip(heads, plans, strict=True):
            head.forward = plan


class ScoringModel:
    """What the class of a prepared model adds to the model's own, `_own_class`."""

    _own_class: type[PreTrainedModel]
    _logps_head: LogpsHead

    def _own_forward(self, *args: Any, **kwargs: Any) -> ModelOutput:
        """The model's forward as it was, logits and all."""
        before = self.__dict__.get("_forward_before")
        return self._own_class.forward(self, *args, **kwargs) if before is None else before(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Name the model's own class instead of this one, which is in no module."""
        if "_own_class" not in vars(type(self)):  # FSDP2's class, on top of this one
            return super().__reduce_ex__(protocol)
        reduced: Any = super().__reduce_ex__(2)
        return _new, (self._own_class,), *reduced[2:]


def _new(own_class: Any) -> PreTrainedModel:
    """Make an empty prepared model, for `copy` and `pickle` to fill."""
    scoring_class = _scoring_class(own_class)
    return scoring_class.__new__(scoring_class)


@functools.cache
def _scoring_class(own_class: Any) -> Any:
    """Return the subclass of a model's class that understands `fused_lm_head`."""

    # Keyword arguments are whatever this model takes.
    def forward(
        self: Any, *args: Any, fused_lm_head: bool = False, labels: Tensor | None = None, **kwargs: Any
    ) -> ModelOutput:
        if fused_lm_head:
            if "_logps_head" not in self.__dict__:  # a new model of the class
                raise ConfigError("fused_lm_head=True needs a prepared model; call add_logps_head(model) first")
            return self._logps_head(self, labels, args, kwargs)
        return (
            self._own_forward(*args, **kwargs) if labels is None else self._own_forward(*args, labels=labels, **kwargs)
        )

    # `generate` and Trainer look at the signature. Not by `functools.wraps`: accelerate takes every wrapper off a
    # forward, down to what `__wrapped__` names.
    forward.__signature__ = inspect.signature(own_class.forward)  # type: ignore[attr-defined]
    forward.__doc__ = own_class.forward.__doc__
    own = {f"__{name}__": getattr(own_class, f"__{name}__") for name in ("module", "qualname", "doc")}
    return type(own_class.__name__, (ScoringModel, own_class), {"forward": forward, "_own_class": own_class} | own)


class LogpsHead:
    """How one model is scored.

    Attributes:
        outputs: fields of `TokenLogps` to compute.
        forward: forward plan of `linear_logps`.
        backward: its backward plan.
        forms: how the model's logits come about, by what that was found on; only what has passed the comparison.
    """

    def __init__(self, outputs: tuple[str, ...], forward: str, backward: str) -> None:
        self.outputs, self.forward, self.backward = outputs, forward, backward
        self.forms: dict[tuple[Any, ...], LogitForm] = {}

    def __call__(
        self, model: PreTrainedModel, labels_SL: Tensor | None, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> TokenLogps:
        """Run the decoder, then score its hidden states."""
        if labels_SL is None:
            raise ValueError("fused_lm_head=True needs labels [S, L], the input ids with -100 where none is scored")
        if labels_SL.dim() != 2 or not labels_SL.numel() or labels_SL.is_meta:
            raise ValueError(
                "labels must be [S, L] with values, a token at least, got "
                f"{tuple(labels_SL.shape)} on {labels_SL.device}; leave empty batches out"
            )
        if kwargs.get("logits_to_keep"):
            raise ValueError("logits_to_keep chooses among logits, which are not made; label the other tokens -100")
        unanswered = [name for name in ("output_hidden_states", "output_attentions") if kwargs.get(name)]
        if unanswered:
            raise ValueError(
                f"fused_lm_head=True returns log-probs alone, got {' and '.join(unanswered)}; leave it out, or call "
                "the model without fused_lm_head"
            )
        if kwargs.get("return_dict") is False:
            raise ValueError("fused_lm_head=True returns its fields by name; leave return_dict=False out")
        found_on = foundation(model, labels_SL.device.type)
        form = self.forms.get(found_on)
        if form is None:
            # What is compared within the roundings of a logit is no place for 8 bits.
            plain = LogpsHead(("log_probs",), "exact", self.backward)
            form = find_form(model, labels_SL, args, kwargs, lambda *given: plain.score(model, *given)["log_probs"])
            if labels_SL.numel() > 1:  # a single position would not show a layer that moves them
                self.forms[found_on] = form
        decoded = decoder_of(model)(*args, **kwargs | FOR_DECODER)
        check_labels(labels_SL.shape, decoded.last_hidden_state)
        # The last position has no next token here.
        targets_SL = torch.nn.functional.pad(labels_SL[:, 1:], (0, 1), value=IGNORE_INDEX)
        scores = self.score(model, form, decoded.last_hidden_state, targets_SL)
        scores = {name: values if name in EVERYWHERE else values[:, :-1] for name, values in scores.items()}
        if kwargs.get("output_router_logits"):
            scores["aux_loss"] = balance_loss(model, decoded.router_logits, kwargs.get("attention_mask"))
        return TokenLogps(**scores)

    def score(
        self, model: PreTrainedModel, form: LogitForm, hidden_SLH: Tensor, targets_SL: Tensor
    ) -> dict[str, Tensor]:
        """Fields of `TokenLogps`, each [S, L], of the ids `targets` at the hidden states."""
        answer = _Answer(self, form, targets_SL)
        head, device = model.get_output_embeddings(), hidden_SLH.device.type
        name = f"{type(head).__name__} of {type(model).__name__}"
        is_cut_off = torch.is_autocast_enabled(device) and not form.with_autocast
        autocast = torch.autocast(device, enabled=False) if is_cut_off else nullcontext()
        with own_linear(), autocast, AnsweredProduct(form.vocab_size, answer):
            try:
                # What is returned, not what was answered: hooks of sharded layers have put their nodes on it.
                stand_in = head(hidden_SLH.to(form.input_dtype))
            except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
                if not answer.fields or isinstance(error, ConfigError):
                    raise
                raise _changed_product(name, f"which gave {type(error).__name__} ({error})") from error
        if not answer.fields:
            raise ConfigError(
                f"the output layer must be a linear layer with one product of {form.vocab_size} outputs, got {name}; "
                "leave it out of quantization"
            )
        if not isinstance(stand_in, Tensor) or stand_in.numel() != targets_SL.numel():
            shape = getattr(stand_in, "shape", None)
            found = type(stand_in).__name__ if shape is None else f"shape {tuple(shape)}"
            raise _changed_product(name, f"got {found} back")
        return answer.fields | {"log_probs": stand_in.view(targets_SL.shape)}


def _changed_product(head: str, found: str) -> ConfigError:
    return ConfigError(
        f"the output layer, {head}, and hooks on it must leave its product as it is: log-probs stand for it, one a "
        f"position, {found}; remove the hook, or use TRL's own trainer"
    )


class _Answer:
    """Answers the output layer's product by log-probs, as if it had one output; `fields` has all that was asked for."""

    def __init__(self, head: LogpsHead, form: LogitForm, targets_SL: Tensor) -> None:
        self.head, self.form, self.targets_SL = head, form, targets_SL
        # On the host, where the op reads them; one sync.
        self.rows_R = (targets_SL != IGNORE_INDEX).cpu().flatten().nonzero().squeeze(1)
        self.is_differentiable = torch.is_grad_enabled()
        self.fields: dict[str, Tensor] = {}

    def __call__(self, product: Product) -> Tensor:
        """Score the targets, in place of the product."""
        if self.fields:
            raise ConfigError(
                "the output layer must have no adapter, got a second product with an output for each token: an adapter "
                "adds to logits, which are never made; take it out of target_modules, or train the layer itself by "
                "modules_to_save"
            )
        if torch.is_grad_enabled() != self.is_differentiable:
            raise ConfigError(
                "the output layer's product must be differentiable by PyTorch, got one inside an autograd function "
                "with a backward pass of its own; leave the layer out of quantization"
            )
        hidden, weight_VH, bias_V = product
        if hidden.shape[:-1].numel() != self.targets_SL.numel():
            raise ConfigError(
                f"the output layer must multiply the hidden state of each position, {self.targets_SL.numel()} here, "
                f"got {tuple(hidden.shape)}; use TRL's own trainer"
            )
        device = hidden.device
        # What autocast does to a product, whatever dtypes its inputs have.
        if torch.is_autocast_enabled(device.type) and hidden.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device.type)
            hidden, weight_VH = hidden.to(dtype), weight_VH.to(dtype)
            bias_V = None if bias_V is None else bias_V.to(dtype)
        hidden_SLH = hidden.reshape(*self.targets_SL.shape, -1)
        self.fields = self.score(hidden_SLH, weight_VH, bias_V)
        return self.fields["log_probs"].view(*hidden.shape[:-1], 1)

    def score(self, hidden_SLH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> dict[str, Tensor]:
        """Fields of `TokenLogps`, each [S, L]."""
        outputs, form, device = self.head.outputs, self.form, hidden_SLH.device
        rows_R = self.rows_R
        score = functools.partial(
            linear_logps,
            hidden_SLH,
            weight_VH,
            self.targets_SL.to(device),
            rows=rows_R,
            cu_rows=torch.arange(len(rows_R) + 1, dtype=torch.int64, device="cpu"),
            bias=bias_V,
            forward=self.head.forward,
            backward=self.head.backward,
        )
        names = [name for name in STATS if name in outputs]
        scored = score(logit_scale=form.logit_scale, softcap=form.softcap, stats=[STATS[name] for name in names])
        rows = {"log_probs": scored.logps} | {name: getattr(scored, STATS[name]) for name in names}
        if "is_top1" in rows:
            rows["is_top1"] = rows["is_top1"] > 0
        if "log_sum_sq_probs" in outputs:
            # With doubled logits a log-prob is 2 z_y - log(sum_v exp(2 z_v)): subtracted from twice the plain one, the
            # label's logit is gone.
            cap = None if form.softcap is None else 2 * form.softcap
            with torch.no_grad():
                doubled_R = score(logit_scale=2 * form.logit_scale, softcap=cap).logps
                rows["log_sum_sq_probs"] = 2 * scored.logps - doubled_R
        scores = {name: self._spread(values_R, rows_R.to(device)) for name, values_R in rows.items()}
        if "mean_logits_everywhere" in outputs:
            with torch.no_grad():
                scores["mean_logits_everywhere"] = mean_logits(
                    hidden_SLH, weight_VH, bias_V, form.logit_scale, form.softcap, self.head.forward
                )
        return scores

    def _spread(self, values_R: Tensor, rows_R: Tensor) -> Tensor:
        """Values of labelled tokens in their places, [S, L]; connected to the graph without any label too."""
        spread_T = values_R.new_zeros(self.targets_SL.numel()).index_copy(0, rows_R, values_R)
        return spread_T.view(self.targets_SL.shape)


def mean_logits(
    hidden_SLH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    forward: str = "exact",
) -> Tensor:
    """Mean over the vocabulary of every position's logits, fp32 [S, L].

    Without a softcap it is linear in the hidden state: the product with the mean row of the weight. With one it takes
    a forward pass, by the plan `forward`.
    """
    shape = hidden_SLH.shape[:2]
    if softcap is not None:
        num_positions = shape.numel()
        any_ids_SL = torch.zeros(shape, dtype=torch.int64, device=hidden_SLH.device)
        scored = linear_logps(
            hidden_SLH,
            weight_VH,
            any_ids_SL,
            rows=torch.arange(num_positions, dtype=torch.int64, device="cpu"),
            cu_rows=torch.arange(num_positions + 1, dtype=torch.int64, device="cpu"),
            bias=bias_V,
            logit_scale=logit_scale,
            softcap=softcap,
            forward=forward,
            stats=("mean_logit",),
        )
        assert scored.mean_logit is not None
        return scored.mean_logit.view(shape)
    with torch.autocast(hidden_SLH.device.type, enabled=False):
        means_SL = hidden_SLH.float() @ weight_VH.mean(dim=0, dtype=torch.float32)
    return logit_scale * (means_SL if bias_V is None else means_SL + bias_V.float().mean())
