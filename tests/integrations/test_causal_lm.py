"""`add_logps_head` beside the logits of the same model, for output layers of several families."""

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the models are Hugging Face's (extra hf)")

from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)
from trl_runs import tiny_llama, tiny_model

from fastpref.errors import ConfigError
from fastpref.integrations.causal_lm import TokenLogps, add_logps_head, mean_logits

FIELDS = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs", "mean_logits_everywhere")
S, L, V = 4, 12, 32


def batch() -> dict[str, Tensor]:
    """Right-padded rows of several lengths; the first quarter of a row is a prompt."""
    generator = torch.Generator().manual_seed(7)
    ids_SL = torch.randint(V, (S, L), generator=generator)
    position_L, length_S1 = torch.arange(L), torch.tensor([[12], [9], [7], [4]])
    mask_SL = (position_L < length_S1).long()
    labels_SL = torch.where((position_L >= 3) & (position_L < length_S1), ids_SL, -100)
    return {"input_ids": ids_SL, "attention_mask": mask_SL, "labels": labels_SL}


def expected_fields(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every field of `TokenLogps` from logits in fp64."""
    logits_SLV = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.double()
    logps_SLV = logits_SLV[:, :-1].log_softmax(-1)
    labels_SL = inputs["labels"][:, 1:]
    is_scored_SL, ids_SL1 = labels_SL != -100, labels_SL.clamp(min=0)[..., None]
    fields = {
        "log_probs": logps_SLV.gather(2, ids_SL1)[..., 0],
        "entropy": -(logps_SLV.exp() * logps_SLV).sum(-1),
        "mean_logits": logits_SLV[:, :-1].mean(-1),
        "is_top1": logps_SLV.argmax(-1) == labels_SL,
        "log_sum_sq_probs": (2 * logps_SLV).logsumexp(-1),
    }
    fields = {name: torch.where(is_scored_SL, values, 0).to(values.dtype) for name, values in fields.items()}
    return fields | {"mean_logits_everywhere": logits_SLV.mean(-1)}


@pytest.mark.parametrize("family", ["llama", "tied", "phi", "gemma2", "cohere", "granite", "falcon_h1"])
def test_fields_and_gradients_equal_those_of_logits(family: str) -> None:
    model, inputs = tiny_model(family, 0), batch()
    # a label that is the most likely token, in the three rows that are long enough
    likely_S = model(input_ids=inputs["input_ids"]).logits[:3, 4].argmax(-1)
    inputs["input_ids"][:3, 5] = inputs["labels"][:3, 5] = likely_S
    expected = expected_fields(model, inputs)
    upstream = torch.linspace(-1, 1, expected["log_probs"].numel()).view(expected["log_probs"].shape)
    (expected["log_probs"] * upstream).sum().backward()
    expected_gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    add_logps_head(model, FIELDS)
    found = model(**inputs, fused_lm_head=True)
    (found.log_probs * upstream).sum().backward()
    torch.testing.assert_close(
        dict(found), {name: values.detach() for name, values in expected.items()}, check_dtype=False
    )
    assert found.is_top1[:3, 4].all()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    torch.testing.assert_close(gradients, expected_gradients)


def test_autocast_errs_no_more_than_logits_do() -> None:
    model, inputs = tiny_llama(0), batch()
    exact = expected_fields(model, inputs)["log_probs"].detach()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        usual = expected_fields(model, inputs)["log_probs"]
        add_logps_head(model)
        found = model(**inputs, fused_lm_head=True).log_probs
    assert 0 < (found - exact).abs().max() <= 2 * (usual - exact).abs().max()
    assert found.dtype == torch.float32


def test_rows_without_labels_have_zero_gradients() -> None:
    model, inputs = tiny_llama(0), batch()
    add_logps_head(model, FIELDS)
    inputs["labels"][:] = -100
    found = model(**inputs, fused_lm_head=True)
    found.log_probs.sum().backward()
    assert found.log_probs.shape == (S, L - 1)
    assert not found.log_probs.any() and not found.entropy.any()
    assert all(weight.grad is not None and not weight.grad.any() for weight in model.parameters())


def test_without_the_keyword_the_model_is_what_it_was() -> None:
    model, inputs = tiny_llama(0), batch()
    expected = model(**inputs)
    add_logps_head(model)
    found = model(**inputs)
    assert not isinstance(found, TokenLogps)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=0)
    torch.testing.assert_close(found.loss, expected.loss, rtol=0, atol=0)
    ids = inputs["input_ids"][:1, :4]
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 6)


def test_mean_logits_of_a_softcap_equal_those_without_far_below_it() -> None:
    hidden_SLH, weight_VH = torch.randn(2, 3, 8), torch.randn(V, 8)
    plain = mean_logits(hidden_SLH, weight_VH, None, 0.5, None)
    torch.testing.assert_close(mean_logits(hidden_SLH, weight_VH, None, 0.5, 1e4), plain, rtol=1e-4, atol=1e-5)


class TwiceTheLogits(LlamaForCausalLM):
    """Does to logits what no field of its config says."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits * 2
        return outputs


def test_other_logits_are_refused_at_the_first_call() -> None:
    model = TwiceTheLogits(tiny_llama(0).config)
    add_logps_head(model)
    with pytest.raises(ConfigError, match="log-probs of TwiceTheLogits must be those of its logits within"):
        model(**batch(), fused_lm_head=True)


def test_the_check_draws_no_random_numbers() -> None:
    model = tiny_llama(0, attention_dropout=0.5).train()
    add_logps_head(model)
    torch.manual_seed(3)
    model(**batch(), fused_lm_head=True)
    after_two = torch.get_rng_state()
    torch.manual_seed(3)
    model(**batch(), fused_lm_head=True)  # checks nothing any more
    assert torch.equal(torch.get_rng_state(), after_two)


def test_models_that_are_no_text_decoders_are_refused() -> None:
    small = {"vocab_size": V, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1}
    small |= {"encoder_attention_heads": 1, "decoder_attention_heads": 1}
    with pytest.raises(ConfigError, match="must be a decoder, got the encoder-decoder BartForConditionalGeneration"):
        add_logps_head(BartForConditionalGeneration(BartConfig(**small)))
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = LlavaConfig(
        vision_config=vision | {"model_type": "clip_vision_model", "image_size": 8, "patch_size": 8},
        text_config=tiny_llama(0).config.to_dict(),
    )
    with pytest.raises(ConfigError, match=r"must read text alone, got LlavaForConditionalGeneration with vision"):
        add_logps_head(LlavaForConditionalGeneration(config))
    with pytest.raises(ConfigError, match="must have an output layer, got LlamaModel"):
        add_logps_head(tiny_llama(0).model)


def test_unknown_outputs_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"outputs must be among log_probs, entropy.*, got perplexity"):
        add_logps_head(tiny_llama(0), ("log_probs", "perplexity"))


def test_labels_are_needed() -> None:
    model, inputs = tiny_llama(0), batch()
    add_logps_head(model)
    with pytest.raises(ValueError, match="needs labels"):
        model(input_ids=inputs["input_ids"], fused_lm_head=True)
