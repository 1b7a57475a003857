"""Per-token log-probabilities of a Hugging Face causal language model, without its logits.

Design decisions:
- `model.forward` learns one keyword: `model(..., labels=labels, fused_lm_head=True)` returns `TokenLogps`. It is the
  call by which TRL's trainers ask for log-probs. Without the keyword the model is what it was (generation, saving).
- The decoder's hidden states go to the output layer by calling that module, and only the product inside it is
  replaced. So whatever sits on the layer runs as ever: gathering of sharded weights (FSDP, ZeRO-3), placement on
  devices, offloading, a copy of the layer that PEFT trains.
- To the op every labelled token is a sequence of its own; so all that it returns per sequence is per token here.
- How a model turns the product into logits is read from its config. The first call compares a few tokens with the
  model's own logits, so an architecture that does something else there is refused, not trained wrongly.

Dims: `S` sequences, `L` positions, `R` labelled tokens, `H` hidden, `V` vocabulary.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from fastpref.errors import ConfigError
from fastpref.kernels import linear_logps

IGNORE_INDEX = -100
CHECKED_TOKENS = 8
# Field of `TokenLogps` -> statistic of `linear_logps`.
STATS = {"entropy": "entropy", "mean_logits": "mean_logit", "is_top1": "hits"}
# Cohere and Falcon-H1 multiply logits by a field of their config, Granite divides them.
SCALE_FIELDS = {"logit_scale": 1, "lm_head_multiplier": 1, "logits_scaling": -1}
# Of TF32, which a GPU may use for fp32 products.
TF32_EPSILON = 2.0**-10


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


def add_logps_head(model: PreTrainedModel, outputs: Sequence[str] = ("log_probs",), *, backward: str = "auto") -> None:
    """Teach `model` to answer `model(..., labels=labels, fused_lm_head=True)` by `TokenLogps`.

    Equals: `log_softmax(model(...).logits[:, :-1])` at `labels[:, 1:]`, where these are not -100.

    Args:
        model: a causal language model (the base model, where PEFT wraps it).
        outputs: fields of `TokenLogps` to compute; `log_probs` always is. `log_sum_sq_probs` costs a second forward
            pass of the output layer.
        backward: backward plan of `linear_logps`.

    Raises:
        ConfigError: the model is no text-only decoder, or has an adapter on its output layer; an unknown output. The
            first call raises it as well, where log-probs differ from those of the model's logits.
    """
    head = _LogpsHead(model, tuple(outputs), backward)
    own_forward = model.forward

    # Keyword arguments are whatever this model takes.
    @functools.wraps(type(model).forward)
    def forward(
        self: PreTrainedModel, *args: Any, fused_lm_head: bool = False, labels: Tensor | None = None, **kwargs: Any
    ) -> ModelOutput:
        if not fused_lm_head:
            return own_forward(*args, **kwargs) if labels is None else own_forward(*args, labels=labels, **kwargs)
        if labels is None:
            raise ValueError("fused_lm_head=True needs labels [S, L], the input ids with -100 where none is scored")
        if not head.is_checked:
            head.check(self, own_forward, args, kwargs)
        return head(self, labels, args, kwargs)

    model.forward = types.MethodType(forward, model)


class _LogpsHead:
    """How one model is scored."""

    def __init__(self, model: PreTrainedModel, outputs: tuple[str, ...], backward: str) -> None:
        _refuse_unsupported(model)
        known = [field.name for field in fields(TokenLogps)]
        unknown = sorted(set(outputs) - set(known))
        if unknown:
            raise ConfigError(f"outputs must be among {', '.join(known)}, got {', '.join(unknown)}; leave these out")
        self.outputs, self.backward = outputs, backward
        self.logit_scale, self.softcap = logit_transform(model.config)
        # By the name of its class now, as FSDP2 gives the model another class later.
        self.balance_loss = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
        self.is_checked = False

    def __call__(
        self, model: PreTrainedModel, labels_SL: Tensor, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> TokenLogps:
        """Run the decoder, then score its hidden states."""
        decoded = model.base_model(*args, **kwargs | {"use_cache": False})
        scores = self.score(model, decoded.last_hidden_state, labels_SL)
        if kwargs.get("output_router_logits"):
            if self.balance_loss is None:
                raise ConfigError(
                    f"{type(model).__name__} has no load-balancing loss that can be computed without its logits; set "
                    "router_aux_loss_coef=0.0 to train without it"
                )
            scores["aux_loss"] = self.balance_loss(
                decoded.router_logits, model.num_experts, model.num_experts_per_tok, kwargs.get("attention_mask")
            )
        return TokenLogps(**scores)

    def score(self, model: PreTrainedModel, hidden_SLH: Tensor, labels_SL: Tensor) -> dict[str, Tensor]:
        """Fields of `TokenLogps` from the hidden states of all positions."""
        answer = _Answer(self, torch.nn.functional.pad(labels_SL[:, 1:], (0, 1), value=IGNORE_INDEX))
        with answer:
            model.get_output_embeddings()(hidden_SLH)
        if not answer.fields:
            raise ConfigError(
                f"the output layer of {type(model).__name__} must be a linear layer, got "
                f"{type(model.get_output_embeddings()).__name__}; leave it out of quantization"
            )
        return answer.fields

    @torch.compiler.disable
    def check(
        self, model: PreTrainedModel, own_forward: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> None:
        """Compare a few tokens with the model's own logits, at the least likely id, which feels every change most.

        Raises:
            ConfigError: they differ by more than two roundings of the largest logit.
        """
        self.is_checked = True
        if kwargs.get("past_key_values") is not None:
            return  # a prefix for the whole batch, which a part of it does not fit

        def first(value: Any) -> Any:
            return value[:1, :CHECKED_TOKENS] if isinstance(value, Tensor) and value.dim() > 1 else value

        args, kwargs = [first(value) for value in args], {name: first(value) for name, value in kwargs.items()}
        kwargs["use_cache"] = False
        device = model.get_output_embeddings().weight.device
        devices = [device] if device.type == "cuda" else []
        runs = []
        for run in (own_forward, model.base_model):
            with torch.no_grad(), torch.random.fork_rng(devices):
                torch.manual_seed(0)  # the same dropout in both
                runs.append(run(*args, **kwargs))
        logits_LV = runs[0].logits[0].float()
        ids_L = logits_LV.argmin(dim=1)
        labels_1L = torch.nn.functional.pad(ids_L, (1, 0), value=IGNORE_INDEX)[None, :-1]
        with torch.no_grad():
            found_L = self.score(model, runs[1].last_hidden_state, labels_1L)["log_probs"][0]
        expected_L = logits_LV.log_softmax(dim=1).gather(1, ids_L[:, None])[:-1, 0]
        dtypes = (runs[0].logits.dtype, runs[1].last_hidden_state.dtype)
        epsilon = max(TF32_EPSILON, *(torch.finfo(dtype).eps for dtype in dtypes))
        difference, limit = (found_L - expected_L).abs().max(), 2 * epsilon * logits_LV.abs().max()
        if not difference <= limit:  # a NaN differs too
            raise ConfigError(
                f"log-probs of {type(model).__name__} must be those of its logits within {float(limit):.2g}, got a "
                f"difference of {float(difference):.2g} on the first {len(ids_L)} tokens: its logits are more than a "
                "linear layer, a scale and a softcap; use TRL's own trainer for this model"
            )


class _Answer(TorchFunctionMode):
    """While active, the product of the output layer is answered by log-probs, which end up in `fields`."""

    def __init__(self, head: _LogpsHead, labels_SL: Tensor) -> None:
        super().__init__()
        self.head, self.labels_SL = head, labels_SL
        self.fields: dict[str, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is not torch.nn.functional.linear:
            return func(*args, **(kwargs or {}))
        self.fields = self.answer(*args, **(kwargs or {}))
        return self.fields

    def answer(self, hidden_SLH: Tensor, weight_VH: Tensor, bias_V: Tensor | None = None) -> dict[str, Tensor]:
        """Fields of `TokenLogps`, in place of `linear(hidden, weight, bias)`."""
        head, device = self.head, hidden_SLH.device
        if torch.is_autocast_enabled(device.type):  # which a product obeys whatever its inputs are
            dtype = torch.get_autocast_dtype(device.type)
            hidden_SLH, weight_VH = hidden_SLH.to(dtype), weight_VH.to(dtype)
            bias_V = None if bias_V is None else bias_V.to(dtype)
        # On the host, where the op reads them; one sync.
        rows_R = (self.labels_SL != IGNORE_INDEX).cpu().flatten().nonzero().squeeze(1)
        score = functools.partial(
            linear_logps,
            hidden_SLH,
            weight_VH,
            self.labels_SL.to(device),
            rows=rows_R,
            cu_rows=torch.arange(len(rows_R) + 1),
            bias=bias_V,
            backward=head.backward,
        )
        names = [name for name in STATS if name in head.outputs]
        scored = score(logit_scale=head.logit_scale, softcap=head.softcap, stats=[STATS[name] for name in names])
        rows = {"log_probs": scored.logps} | {name: getattr(scored, STATS[name]) for name in names}
        if "is_top1" in rows:
            rows["is_top1"] = rows["is_top1"] > 0
        if "log_sum_sq_probs" in head.outputs:
            # With doubled logits a log-prob is 2 z_y - log(sum_v exp(2 z_v)): subtracted from twice the plain one, the
            # label's logit is gone.
            cap = None if head.softcap is None else 2 * head.softcap
            with torch.no_grad():
                doubled_R = score(logit_scale=2 * head.logit_scale, softcap=cap).logps
                rows["log_sum_sq_probs"] = 2 * scored.logps - doubled_R
        scores = {name: self._spread(values_R, rows_R.to(device)) for name, values_R in rows.items()}
        if "mean_logits_everywhere" in head.outputs:
            with torch.no_grad():
                scores["mean_logits_everywhere"] = mean_logits(
                    hidden_SLH, weight_VH, bias_V, head.logit_scale, head.softcap
                )
        return scores

    def _spread(self, values_R: Tensor, rows_R: Tensor) -> Tensor:
        """Values of labelled tokens in their places, [S, L-1]; connected to the graph without any label too."""
        spread_T = values_R.new_zeros(self.labels_SL.numel()).index_copy(0, rows_R, values_R)
        return spread_T.view(self.labels_SL.shape)[:, :-1]


def mean_logits(
    hidden_SLH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, logit_scale: float, softcap: float | None
) -> Tensor:
    """Mean over the vocabulary of every position's logits, fp32 [S, L].

    Without a softcap it is linear in the hidden state: the product with the mean row of the weight.
    """
    shape = hidden_SLH.shape[:2]
    if softcap is not None:
        num_positions = shape.numel()
        any_ids_SL = torch.zeros(shape, dtype=torch.int64, device=hidden_SLH.device)
        scored = linear_logps(
            hidden_SLH,
            weight_VH,
            any_ids_SL,
            rows=torch.arange(num_positions),
            cu_rows=torch.arange(num_positions + 1),
            bias=bias_V,
            logit_scale=logit_scale,
            softcap=softcap,
            stats=("mean_logit",),
        )
        assert scored.mean_logit is not None
        return scored.mean_logit.view(shape)
    with torch.autocast(hidden_SLH.device.type, enabled=False):
        means_SL = hidden_SLH.float() @ weight_VH.mean(dim=0, dtype=torch.float32)
    return logit_scale * (means_SL if bias_V is None else means_SL + bias_V.float().mean())


def logit_transform(config: Any) -> tuple[float, float | None]:
    """Scale and softcap between the output layer's product and the logits, from a model's config."""
    scale = 1.0
    for name, power in SCALE_FIELDS.items():
        factor = getattr(config, name, None)
        scale *= 1.0 if factor is None else factor**power
    return scale, getattr(config, "final_logit_softcapping", None)


def _refuse_unsupported(model: PreTrainedModel) -> None:
    """Refuse what is no text-only decoder with a plain output layer.

    Raises:
        ConfigError: names what was found.
    """
    name, config = type(model).__name__, model.config
    if config.is_encoder_decoder:
        raise ConfigError(f"the model must be a decoder, got the encoder-decoder {name}; use TRL's own trainer")
    parts = [part for part in ("vision", "audio") if hasattr(config, f"{part}_config")]
    if parts or config.get_text_config() is not config:
        raise ConfigError(
            f"the model must read text alone, got {name} with {' and '.join(parts) or 'several parts'}; load its text "
            "model (AutoModelForCausalLM), or use TRL's own trainer"
        )
    head = model.get_output_embeddings()
    if head is None:
        raise ConfigError(f"the model must have an output layer, got {name}; load it as AutoModelForCausalLM")
    if hasattr(head, "base_layer"):
        raise ConfigError(
            f"the output layer of {name} must have no adapter, got {type(head).__name__}: an adapter adds to logits, "
            "which are never made; take it out of target_modules, or train the layer itself by modules_to_save"
        )
