"""Mixture-of-experts layers: how Megatron is asked for them, and the load-balancing loss that keeps experts busy.

Design decisions:
- Expert-parallel ranks hold whole experts; they are taken from all ranks of a pipeline stage, tensor-parallel ones
  first, and a token travels to its expert and back. Without them tensor parallelism splits every expert, as it splits
  every other matrix.
- The load-balancing loss is Megatron's: per layer and microbatch, `E * sum_e f_e * P_e` over tokens that are neither
  padding nor of filler pairs; f_e is the share of choices that fell on expert e, P_e the mean router probability.
  Coefficient times its sum over layers, averaged over microbatches and data-parallel ranks, is added to the gradients,
  never to the reported preference loss. A microbatch of fillers alone has the loss 0.
- The z-loss is a mean over the same tokens of all ranks that share a microbatch.
- The update of an expert bias counts the same tokens; it is undone where the step is not taken.
- Routers stay the modules that Megatron built, only their class changes: models that a caller built are metered too.

Dims: N tokens of this rank, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import Router, TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from fastpref.errors import ConfigError
from fastpref.run.architecture.architecture import Architecture
from fastpref.trainer.model.chunks import unwrap
from fastpref.trainer.ranks.platform import current_device


def expert_settings(arch: Architecture, aux_loss_coeff: float | None, *, grouped_gemm: bool) -> dict[str, Any]:
    """Return the fields of `TransformerConfig` that describe the experts of a model; none for a dense one.

    Args:
        arch: the model.
        aux_loss_coeff: weight of the load-balancing loss; None takes the one of the model's `config.json`.
        grouped_gemm: multiply all experts of a rank at once, which needs Transformer Engine.
    """
    experts = arch.experts
    if experts is None:
        return {}
    complete_router()
    return {
        "num_moe_experts": experts.num_experts,
        "moe_layer_freq": 1 if all(experts.layers) else [int(has_experts) for has_experts in experts.layers],
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_router_topk": experts.experts_per_token,
        # A softmax over the chosen logits is the softmax over all of them, divided by the sum of the chosen.
        "moe_router_pre_softmax": not experts.norm_topk_prob,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": experts.router_aux_loss_coef if aux_loss_coeff is None else aux_loss_coeff,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": grouped_gemm,
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor_parallel_size": parallel_state.get_expert_tensor_parallel_world_size(),
    }


def complete_router() -> None:
    """Define what Megatron's router projection compares with None, and imports with Transformer Engine alone."""
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def separate_experts(model: torch.nn.Module) -> None:
    """Have the gradients of experts reduced, and their weights updated, apart from the rest in every layout.

    Megatron does so only where expert-parallel ranks share them; a checkpoint would then fit one kind of layout.
    """
    for module in model.modules():
        if isinstance(module, MoELayer):
            for parameter in module.experts.parameters():
                parameter.allreduce = False


def forget_routing(models: Sequence[torch.nn.Module]) -> None:
    """Let go of what token dispatchers remember of the last microbatch; to be called when its backward pass is over.

    It belongs to a graph, which holds the nodes that add up gradients, whose hooks hold the model: a circle that the
    garbage collector cannot see, so that neither model nor process groups would ever be gone.
    """
    if unwrap(models[0]).config.num_moe_experts is None:
        return
    for layer in (module for model in models for module in model.modules() if isinstance(module, MoELayer)):
        dispatcher = layer.token_dispatcher
        for owner in filter(None, (dispatcher, getattr(dispatcher, "_comm_manager", None))):
            remembered = [name for name, value in vars(owner).items() if _is_of_a_graph(value)]
            for name in remembered:
                setattr(owner, name, None)


def _is_of_a_graph(value: Any) -> bool:
    return isinstance(value, Tensor) and value.grad_fn is not None


def balance_coefficient(config: TransformerConfig) -> float:
    """Return the weight of the load-balancing loss; that of the only one implemented where Megatron has a list."""
    given = config.moe_aux_loss_coeff
    return next(filter(None, given), 0.0) if isinstance(given, list) else given


class BalanceMeter:
    """Adds up what routers measure in training, on the device, until somebody reads it."""

    def __init__(self) -> None:
        self._sum_3 = torch.zeros(3, dtype=torch.float64, device=current_device())

    def add(self, loss: Tensor, imbalance: Tensor, share: Tensor) -> None:
        """Add one layer and microbatch.

        Args:
            loss: this rank's part of the unweighted load-balancing loss (scalar).
            imbalance: choices of the busiest expert over their mean (scalar).
            share: this rank's part of the microbatch: 1 / ranks that share it, 0 where no token counts (scalar).
        """
        self._sum_3 += torch.stack([loss.detach(), imbalance * share, share]).double()

    def read(self) -> dict[str, float]:
        """Reduce over the world, on every rank of it, and start again.

        Returns:
            Means over layers, microbatches and data-parallel ranks, the same on every rank: the unweighted
            `moe/load_balancing_loss` (1 when experts are chosen evenly, E / experts per token at worst), and
            `moe/expert_imbalance`. Empty where nothing was added.
        """
        torch.distributed.all_reduce(self._sum_3)
        loss, imbalance, count = self._sum_3.tolist()
        self._sum_3.zero_()
        return {"moe/load_balancing_loss": loss / count, "moe/expert_imbalance": imbalance / count} if count else {}


class BalancedRouter(TopKRouter):
    """Megatron's router, which meters its load-balancing loss and leaves tokens that do not count out of its bias.

    It stands microbatches without a token that counts.
    """

    meter: BalanceMeter

    def _apply_aux_loss(
        self, probs: Tensor, scores_for_aux_loss: Tensor, routing_map: Tensor, with_padding_mask: bool = False
    ) -> Tensor:
        """Hang the weighted loss on `probs`; scores and choices [N, E] are 0 for tokens that do not count."""
        chosen_E = routing_map.sum(0, dtype=torch.float32)
        torch.distributed.all_reduce(chosen_E, group=self.tp_cp_group)
        num_choices = chosen_E.sum()
        num_tokens = (num_choices / self.topk).clamp(min=1.0)
        share_E = chosen_E / num_choices.clamp(min=1.0)
        loss = self.num_experts * (scores_for_aux_loss.sum(0) / num_tokens * share_E).sum()
        counts = (num_choices > 0).float() / self.tp_cp_group.size()
        self.meter.add(loss, share_E.max() * self.num_experts, counts)
        return cast(Tensor, MoEAuxLossAutoScaler.apply(probs, loss * self.get_aux_loss_coeff("aux_loss")))

    def apply_z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Hang the weighted mean of `logsumexp^2` on `logits` [N, E], over tokens that `padding_mask` [N] leaves.

        Megatron averages means of ranks, which have unlike numbers of such tokens.
        """
        coefficient = self.config.moe_z_loss_coeff
        if coefficient is None or not (self.training and torch.is_grad_enabled()):
            return logits
        squares_N = torch.logsumexp(logits, dim=-1).square()
        counts_N = torch.ones_like(squares_N) if padding_mask is None else (~padding_mask).to(squares_N.dtype)
        num_tokens = counts_N.sum()
        torch.distributed.all_reduce(num_tokens, group=self.tp_cp_group)
        loss = (squares_N * counts_N).sum() / num_tokens.clamp(min=1.0)
        return cast(Tensor, MoEAuxLossAutoScaler.apply(logits, loss * coefficient))

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """Count the choices [N, E] of tokens that `padding_mask` [N] does not leave out, for the update of the bias.

        Megatron's own count takes the mask for one of experts.
        """
        if self.enable_expert_bias and self.training and torch.is_grad_enabled():
            counted_NE = routing_map if padding_mask is None else routing_map & ~padding_mask[:, None]
            self.local_tokens_per_expert += counted_NE.sum(dim=0)


def install_routers(models: Sequence[torch.nn.Module], *, is_reference: bool = False) -> BalanceMeter | None:
    """Make the routers of `models` leave out tokens that do not count, in place.

    Args:
        models: chunks that will be trained, and maybe answer as the reference, too.
        is_reference: they do.

    Returns:
        What meters the load-balancing loss; None where none is asked for.

    Raises:
        ConfigError: experts are balanced in a way that counts every token, or that would move the reference.
    """
    config = unwrap(models[0]).config
    complete_router()
    if config.num_moe_experts is None:
        return None
    _check_balancing(config, is_reference)
    routers = [module for model in models for module in model.modules() if isinstance(module, Router)]
    has_aux_loss, has_bias = bool(balance_coefficient(config)), bool(config.moe_router_enable_expert_bias)
    meter = BalanceMeter() if has_aux_loss else None
    for router in routers if has_aux_loss or has_bias or config.moe_z_loss_coeff else []:
        if type(router) not in (TopKRouter, BalancedRouter):
            raise ConfigError(
                f"the router {type(router).__name__} is not known, so that it cannot be said which tokens its "
                "balancing counts; build the model with Megatron's TopKRouter, or with moe_aux_loss_coeff 0, "
                "moe_z_loss_coeff None and moe_router_enable_expert_bias False"
            )
        router.__class__ = BalancedRouter
        if meter is not None:
            cast(BalancedRouter, router).meter = meter
    return meter


def _check_balancing(config: TransformerConfig, is_reference: bool) -> None:
    kinds = config.moe_router_load_balancing_type
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    for kind in ("sinkhorn", "quantile_balancing"):
        if kind in kinds:
            raise ConfigError(
                f"moe_router_load_balancing_type {kind!r} routes by all tokens of a batch, padding included, and is "
                "not implemented; build the model with 'aux_loss' or 'none'"
            )
    if balance_coefficient(config) and kinds != ["aux_loss"]:
        raise ConfigError(
            "moe_router_load_balancing_type must be 'aux_loss' where moe_aux_loss_coeff is not 0, got "
            f"{config.moe_router_load_balancing_type!r}; other losses are not implemented"
        )
    if is_reference and config.moe_router_enable_expert_bias and config.moe_router_bias_update_rate:
        raise ConfigError(
            "with adapters the policy is its own reference, which an update of moe_router_enable_expert_bias would "
            "move; build the model with moe_router_bias_update_rate 0"
        )


def _biased(models: Sequence[torch.nn.Module]) -> list[TopKRouter]:
    modules = (module for model in models for module in model.modules())
    return [module for module in modules if isinstance(module, TopKRouter) and module.expert_bias is not None]


@contextmanager
def provisional_bias(models: Sequence[torch.nn.Module]) -> Iterator[Callable[[], None]]:
    """Inside, updates of expert biases are provisional: undone at the end, unless the function that it gives is called.

    Megatron updates them with the gradients, before anybody knows whether the step will be taken.
    """
    before = [(router, router.expert_bias.clone()) for router in _biased(models)]
    try:
        yield before.clear
    finally:
        for router, bias_E in before:
            router.expert_bias.copy_(bias_E)
            router.local_tokens_per_expert.zero_()


@contextmanager
def bias_kept_in_fp32(model: torch.nn.Module) -> Iterator[None]:
    """Inside, a model may be rounded to 16 bits: its routers leave with the biases and counts that they came with."""
    kept = [(router, router.expert_bias, router.local_tokens_per_expert) for router in _biased([model])]
    yield
    for router, bias_E, counts_E in kept:
        router.expert_bias, router.local_tokens_per_expert = bias_E, counts_E
