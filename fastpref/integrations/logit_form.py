"""How a Hugging Face model turns hidden states into logits, found out from the logits of a few tokens.

Configs do not tell: the same field is a factor in one family, a divisor in another and ignored in a third. So the
model's own forward pass runs once on the first batch, with its output layer narrowed to a few positions, and what it
makes of them decides between the ways in which the fields of its config can be meant. The hidden states enter once as
they are and once larger, as a softcap shows in large logits only.

The pass is made on every rank alike, with the whole batch: sharded layers meet in it.

Dims: `S` sequences, `L` positions, `N` chosen positions, `G` gains, `H` hidden, `V` vocabulary.
"""

from __future__ import annotations

import copy
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastpref.errors import ConfigError

IGNORE_INDEX = -100
CHECKED_TOKENS = 8
GAINS = (1.0, 8.0)
# Whatever the config says: its hidden states are read by their name, and nothing grows.
FOR_DECODER = {"use_cache": False, "return_dict": True}
# Fields that some families multiply their logits by and others divide by; the usual power of each comes first.
SCALE_POWERS = {
    "logit_scale": (1, -1, 0),
    "lm_head_multiplier": (1, -1, 0),
    "output_multiplier": (1, -1, 0),
    "logits_scaling": (-1, 1, 0),
    "logits_mup_width_multiplier": (-1, 1, 0),
}
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# Of TF32, which a GPU may use for fp32 products.
TF32_EPSILON = 2.0**-10


class LogitForm(NamedTuple):
    """From hidden states to logits.

    Attributes:
        vocab_size: logits of a position.
        logit_scale: factor on the output layer's product.
        softcap: bound of the logits after that, or None.
        input_dtype: what the hidden states are cast to before the layer.
        with_autocast: whether autocast, where it is on, applies to the layer.
    """

    vocab_size: int
    logit_scale: float
    softcap: float | None
    input_dtype: torch.dtype
    with_autocast: bool


class _OwnLogits(NamedTuple):
    """What the model's own forward pass made of some positions, a row of them for each gain."""

    hidden_GNH: Tensor
    logits_GNV: Tensor
    input_dtype: torch.dtype
    with_autocast: bool


def foundation(model: PreTrainedModel, device: str) -> tuple[Any, ...]:
    """Return what a `LogitForm` was found on; with anything else it is not known.

    That is the output layer and its hooks, the fields of the config that are read, dtypes, autocast and the mode.
    """
    head, config = model.get_output_embeddings(), model.config
    modules = tuple(
        (
            f"{type(module).__module__}.{type(module).__qualname__}",
            getattr(module, "out_features", None),
            "forward" in vars(module),
            # Numbers that no two hooks share: one may take the place of another.
            tuple(module._forward_hooks),
            tuple(module._forward_pre_hooks),
        )
        for module in head.modules()
    )
    # Some families keep the numbers of their config in the model.
    given = [getattr(owner, name, None) for owner in (config, model) for name in (*SCALE_POWERS, *SOFTCAPS)]
    numbers = tuple(number if isinstance(number, (int, float)) else None for number in given)
    dtypes = tuple(weight.dtype for weight in head.parameters())
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return modules, getattr(config, "vocab_size", None), numbers, dtypes, autocast, model.training


def decoder_of(model: PreTrainedModel) -> Any:
    """Return the part of a model that makes hidden states; the model itself where it has none."""
    # Llama 4's text model names a decoder that only its multimodal one has.
    return model.base_model if model.base_model is not model else getattr(model, "model", model)


@torch.compiler.disable
@torch.no_grad()
def find_form(
    model: PreTrainedModel,
    labels_SL: Tensor,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    log_probs: Callable[[LogitForm, Tensor, Tensor], Tensor],
) -> LogitForm:
    """Find how the model's logits come about.

    Args:
        model: a prepared model.
        labels_SL: labels of the batch; tokens with a label are looked at first.
        args: of the model's forward.
        kwargs: likewise.
        log_probs: (form, hidden states [G, N, H], ids [G, N]) -> log-probs [G, N] by the op.

    Raises:
        ValueError: labels of another shape than the batch, or weights without numbers.
        ConfigError: no way to read its config gives the model's own log-probs of its least likely tokens, within the
            roundings of the dtype that the layer multiplies in.
    """
    for name, module in model.named_modules():
        # Accelerate's hooks bring the numbers when the module runs.
        if any(weight.is_meta for weight in module.parameters(recurse=False)) and not hasattr(module, "_hf_hook"):
            raise ValueError(
                f"{name} of {type(model).__name__} is on the meta device, without numbers; load its weights"
            )
    is_unlabelled_SL = torch.nn.functional.pad(labels_SL[:, 1:], (0, 1), value=IGNORE_INDEX) == IGNORE_INDEX
    places_N = is_unlabelled_SL.flatten().int().argsort(stable=True)[:CHECKED_TOKENS]
    own = _own_logits(model, places_N, labels_SL.shape, args, kwargs)
    # The least likely tokens feel every change of the logits most. Neighbours get different ones, or a layer that mixes
    # up positions would not show where one token is the least likely everywhere.
    least_GN2 = own.logits_GNV.topk(min(2, own.logits_GNV.shape[2]), dim=2, largest=False).indices
    at_N = torch.arange(len(places_N), dtype=torch.int64, device=least_GN2.device)
    ids_GN = least_GN2[:, at_N, at_N % least_GN2.shape[2]]
    expected_GN = own.logits_GNV.float().log_softmax(dim=2).gather(2, ids_GN[..., None])[..., 0]
    best: tuple[LogitForm, float, float] | None = None
    # Every reading is tried on every rank, so that all make the same calls.
    for scale, softcap in _readings(model.config):
        form = LogitForm(own.logits_GNV.shape[2], scale, softcap, own.input_dtype, own.with_autocast)
        error_GN = (log_probs(form, own.hidden_GNH, ids_GN) - expected_GN).abs()
        limit_GN = _rounding(form, own) * own.logits_GNV.float().abs().amax(dim=2)
        limit_GN = limit_GN + 4 * torch.finfo(torch.float32).eps * expected_GN.abs()
        excess = (error_GN / limit_GN).nan_to_num(nan=math.inf).amax().item()  # a NaN differs, too
        if best is None or (excess <= 1.0 < best[1]):
            best = form, excess, error_GN.amax().item()
    assert best is not None, "there is one reading at least"
    form, excess, error = best
    if excess > 1.0:
        raise ConfigError(
            f"log-probs of {type(model).__name__} must be those of its logits within {error / excess:.2g}, got a "
            f"difference of {error:.2g} on {len(places_N)} tokens: its logits are more than a linear layer, and a "
            "scale and a softcap that its config names; use TRL's own trainer for this model"
        )
    return form


def _readings(config: Any) -> list[tuple[float, float | None]]:
    """Return every (scale, softcap) that the fields of a config may stand for, the usual one first."""
    given = {name: getattr(config, name, None) for name in SCALE_POWERS}
    choices = [
        [factor**power for power in SCALE_POWERS[name] if factor or power >= 0]
        for name, factor in given.items()
        if factor is not None
    ]
    scales = [math.prod(choice) for choice in itertools.product(*choices)]
    softcaps = [cap for cap in (getattr(config, name, None) for name in SOFTCAPS) if cap]
    return list(dict.fromkeys(itertools.product(scales, (*softcaps, None))))


def _rounding(form: LogitForm, own: _OwnLogits) -> float:
    """Bound the relative error that rounding leaves in a log-prob, in units of the largest logit.

    Counted are the roundings of a logit: its product's, its scale's and the three of a softcap; each shifts the label's
    logit and the log-sum-exp by half an epsilon of the dtype that is computed in, not of the one that is returned.
    """
    device = own.hidden_GNH.device.type
    dtype = torch.get_autocast_dtype(device) if form.with_autocast else form.input_dtype
    epsilon = max(torch.finfo(dtype).eps, torch.finfo(own.logits_GNV.dtype).eps)
    # A sum of H products in fp32, in another order.
    epsilon = max(epsilon, own.hidden_GNH.shape[-1] * torch.finfo(torch.float32).eps)
    if device == "cuda" and torch.backends.cuda.matmul.allow_tf32:
        epsilon = max(epsilon, TF32_EPSILON)
    roundings = 1 + (form.logit_scale != 1.0) + 3 * (form.softcap is not None)
    return (1 + roundings) * epsilon


def _own_logits(
    model: PreTrainedModel, places_N: Tensor, shape_SL: torch.Size, args: Sequence[Any], kwargs: dict[str, Any]
) -> _OwnLogits:
    """Run the model's own forward pass, its output layer on some positions alone."""
    seen: dict[str, Any] = {}
    num_positions = shape_SL.numel()

    def narrow(hidden: Tensor) -> Tensor:
        if hidden.shape[:-1].numel() != num_positions:
            raise ConfigError(
                f"the output layer of {type(model).__name__} must get the hidden state of each position, "
                f"{num_positions} in this batch, got {tuple(hidden.shape)}; use TRL's own trainer for this model"
            )
        chosen_NH = hidden.reshape(num_positions, -1)[places_N.to(hidden.device)]
        return torch.stack([gain * chosen_NH for gain in GAINS])

    def before_head(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        names = list(kwargs)
        hidden = args[0] if args else kwargs[names[0]]
        seen["input_dtype"], seen["input_size"] = hidden.dtype, hidden.shape[-1]
        seen["with_autocast"] = torch.is_autocast_enabled(hidden.device.type)
        return ((narrow(hidden), *args[1:]), kwargs) if args else (args, kwargs | {names[0]: narrow(hidden)})

    def after_decoder(module: torch.nn.Module, args: Any, output: Any) -> None:
        check_labels(shape_SL, output.last_hidden_state)
        seen["decoded"] = output

    with (
        _hooks(
            decoder_of(model).register_forward_hook(after_decoder),
            model.get_output_embeddings().register_forward_pre_hook(before_head, prepend=True, with_kwargs=True),
        ),
        torch.random.fork_rng(_devices(model)),
    ):
        own = model._own_forward(*args, **_for_a_trial(kwargs))
        if "decoded" not in seen:  # the pass does not call the decoder as a module
            seen["decoded"] = decoder_of(model)(*args, **_for_a_trial(kwargs))
    decoded = seen["decoded"]
    if seen.get("input_size") != decoded.last_hidden_state.shape[-1]:
        raise ConfigError(
            f"the output layer of {type(model).__name__} must get the hidden states of its decoder, "
            f"{decoded.last_hidden_state.shape[-1]} numbers a position, got {seen.get('input_size')}; use TRL's own "
            "trainer for this model"
        )
    _check_balance(model, own, decoded, kwargs)
    hidden_GNH, logits = narrow(decoded.last_hidden_state), own.logits
    if not isinstance(logits, Tensor) or logits.shape[:-1].numel() != hidden_GNH.shape[:-1].numel():
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ConfigError(
            f"{type(model).__name__} must return the logits of its output layer, those of "
            f"{hidden_GNH.shape[:-1].numel()} hidden states here, got {found}; use TRL's own trainer for this model"
        )
    logits_GNV = logits.reshape(*hidden_GNH.shape[:-1], -1)
    return _OwnLogits(hidden_GNH, logits_GNV, seen["input_dtype"], seen["with_autocast"])


def check_labels(shape_SL: torch.Size, hidden: Tensor) -> None:
    """Check the shape of labels against hidden states.

    Raises:
        ValueError: another batch's.
    """
    if hidden.dim() == 3 and hidden.shape[:2] != shape_SL:
        raise ValueError(
            f"labels must be [S, L] = {tuple(hidden.shape[:2])}, one for each position of the batch, got "
            f"{tuple(shape_SL)}; pass the input ids with -100 where none is scored"
        )


def _check_balance(model: PreTrainedModel, own: Any, decoded: Any, kwargs: dict[str, Any]) -> None:
    if not kwargs.get("output_router_logits") or getattr(own, "aux_loss", None) is None:
        return
    found = balance_loss(model, decoded.router_logits, kwargs.get("attention_mask"))
    if not torch.allclose(found, own.aux_loss.to(found)):  # the same function of the same tensors
        raise ConfigError(
            f"the load-balancing loss of {type(model).__name__} must be {float(own.aux_loss):.6g}, as in its own "
            f"forward, got {float(found):.6g}; set router_aux_loss_coef=0.0 to train without it"
        )


def balance_loss(model: PreTrainedModel, router_logits: Any, attention_mask: Tensor | None) -> Tensor:
    """Compute the load-balancing loss of a mixture of experts by the function of the model's own module.

    Raises:
        ConfigError: the module has none.
    """
    # Of the model's own class, as FSDP2 gives the model another one.
    module = sys.modules[model._own_class.__module__]
    compute = getattr(module, "load_balancing_loss_func", None)
    if compute is None:
        raise ConfigError(
            f"{type(model).__name__} has no load-balancing loss that can be computed without its logits; set "
            "router_aux_loss_coef=0.0 to train without it"
        )
    return compute(router_logits, model.num_experts, model.num_experts_per_tok, attention_mask)


@contextmanager
def _hooks(*handles: Any) -> Iterator[None]:
    """Take hooks away in the end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _devices(model: PreTrainedModel) -> list[torch.device]:
    """The GPUs that a model is spread over: dropout of the trial pass draws numbers there."""
    return sorted({weight.device for weight in model.parameters() if weight.is_cuda}, key=lambda device: device.index)


def _for_a_trial(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a pass that leaves no trace: a cache grows in a copy, layer by layer."""
    cache: Any = kwargs.get("past_key_values")
    if hasattr(cache, "layers"):
        cache = copy.copy(cache)
        cache.layers = [copy.copy(layer) for layer in cache.layers]
        kwargs = kwargs | {"past_key_values": cache}
    return kwargs | FOR_DECODER
