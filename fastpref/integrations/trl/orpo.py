"""TRL's `ORPOTrainer`, its log-probs from `linear_logps`.

TRL's loss and metrics read five things from one method: log-probs of both sides, their logits (for a mean) and the
NLL. That method is replaced; the rest is TRL's.

Dims: `B` pairs, `S = 2B` sequences (chosen first), `L` positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpref.errors import ConfigError
from fastpref.integrations.causal_lm import IGNORE_INDEX, add_logps_head
from fastpref.integrations.trl.support import find, refuse_options, refuse_parallelism

_USED = ("concatenated_forward", "concatenated_inputs", "odds_ratio_loss")
_TRLTrainer: Any = find("trl.experimental.orpo", *(f"ORPOTrainer.{name}" for name in _USED)).ORPOTrainer


class ORPOTrainer(_TRLTrainer):
    """`trl.experimental.orpo.ORPOTrainer` that computes log-probs by `linear_logps`, with the same arguments.

    Attributes:
        forward: forward plan of `linear_logps`, for all trainers of the class; a subclass may set "screened".
        backward: its backward plan; a subclass may set "exact".

    Raises:
        ConfigError: an option or a model that the fused head cannot serve (docs/trl.md); names the remedy.
    """

    forward = "exact"
    backward = "auto"

    # Whatever TRL's constructor takes, in the version that is installed.
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        refuse_options(_TRLTrainer, args, kwargs)
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ConfigError(
                f"one process must see one GPU, got {self.args.n_gpu}: the fused head is not tested under "
                "nn.DataParallel; start one process per GPU with `accelerate launch` or torchrun"
            )
        refuse_parallelism(self.accelerator)
        model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        outputs = ("log_probs", "mean_logits_everywhere")
        add_logps_head(model, outputs, forward=self.forward, backward=self.backward)

    def concatenated_forward(self, model: torch.nn.Module, batch: dict[str, Any]) -> tuple[Tensor, ...]:
        """Score both sides in one pass.

        Returns:
            Mean log-probs per response token of chosen and rejected [B]; the mean logits of each position [B, L-1], of
            which TRL logs the mean; the NLL of a token of the chosen rows, prompt included; with `aux_loss_enabled`
            the load-balancing loss.
        """
        both = self.concatenated_inputs(batch, padding_value=self.padding_value, device=self.accelerator.device)
        ids_SL, mask_SL = both["concatenated_input_ids"], both["concatenated_attention_mask"]
        num_pairs, response_SL = len(batch["chosen_labels"]), both["concatenated_labels"] != IGNORE_INDEX
        # The NLL covers the prompt of the chosen rows too.
        is_scored_SL = torch.cat([mask_SL[:num_pairs] == 1, response_SL[num_pairs:]])
        outputs = model(
            input_ids=ids_SL,
            attention_mask=mask_SL,
            labels=ids_SL.masked_fill(~is_scored_SL, IGNORE_INDEX),
            fused_lm_head=True,
            **({"output_router_logits": True} if self.aux_loss_enabled else {}),
        )
        logps, is_response = outputs.log_probs, response_SL[:, 1:]
        means_S = torch.where(is_response, logps, 0.0).sum(dim=1) / is_response.sum(dim=1)
        nll = -logps[:num_pairs].sum() / is_scored_SL[:num_pairs, 1:].sum()
        mean_logits = outputs.mean_logits_everywhere[:, :-1]
        scored = (*means_S.split(num_pairs), *mean_logits.split(num_pairs), nll)
        return (*scored, outputs.aux_loss) if self.aux_loss_enabled else scored
