"""What a call with `fused_lm_head=True` takes: what the model's own call takes, hooks on its output layer included."""

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the models are Hugging Face's (extra hf)")

from test_causal_lm import V, batch, expected_fields
from transformers import DynamicCache
from trl_runs import tiny_llama, tiny_model

from fastpref.errors import ConfigError
from fastpref.integrations.causal_lm import add_logps_head


@pytest.mark.parametrize("change", [lambda labels: labels[:, :-2], lambda labels: labels.T, lambda labels: labels[:2]])
def test_labels_of_another_shape_are_refused(change: Any) -> None:
    """Transposed ones have as many values as the batch has positions: they were scored, wrongly."""
    model, inputs = tiny_llama(0), batch()
    add_logps_head(model)
    wrong = inputs | {"labels": change(inputs["labels"])}
    for _ in range(2):
        with pytest.raises(ValueError, match=r"labels must be \[S, L\] = \(4, 12\), one for each position"):
            model(**wrong, fused_lm_head=True)
        model(**inputs, fused_lm_head=True)


@pytest.mark.parametrize("family", ["mamba", "bloom"])
def test_fields_have_names_whatever_the_config_says(family: str) -> None:
    model, inputs = tiny_model(family, 0), batch()
    expected = expected_fields(model, inputs)["log_probs"]
    model.config.return_dict = False
    add_logps_head(model)
    torch.testing.assert_close(model(**inputs, fused_lm_head=True).log_probs, expected, check_dtype=False)
    with pytest.raises(ValueError, match="returns its fields by name; leave return_dict=False out"):
        model(**inputs, fused_lm_head=True, return_dict=False)


def test_hooks_that_look_on_are_called() -> None:
    model, inputs = tiny_llama(0), batch()
    expected = expected_fields(model, inputs)["log_probs"]
    shapes, gradients = [], []
    model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(output.shape[:2]))
    model.lm_head.register_forward_hook(lambda module, args, output: output.float() * 1.0)
    model.lm_head.register_full_backward_hook(lambda module, d_input, d_output: gradients.append(d_input[0].shape))
    add_logps_head(model)
    found = model(**inputs, fused_lm_head=True).log_probs
    torch.testing.assert_close(found, expected, check_dtype=False)
    found.sum().backward()
    assert shapes[-1] == inputs["input_ids"].shape and gradients == [(*inputs["input_ids"].shape, 16)]


@pytest.mark.parametrize(
    "hook",
    [
        lambda module, args, output: output[:, :, 5:],
        lambda module, args, output: (output, output),
        lambda module, args, output: output + torch.ones(V),
        lambda module, args, output: output.argmax(-1, keepdim=True).expand(-1, -1, 3),
    ],
)
def test_hooks_that_change_the_product_are_refused(hook: Any) -> None:
    model = tiny_llama(0)
    add_logps_head(model)
    model(**batch(), fused_lm_head=True)
    model.lm_head.register_forward_hook(hook)
    for _ in range(2):
        with pytest.raises(ConfigError, match="must"):
            model(**batch(), fused_lm_head=True)


def test_one_token_rows_have_no_next_token() -> None:
    model = tiny_llama(0)
    add_logps_head(model, ("entropy", "mean_logits_everywhere"))
    ids = torch.randint(V, (3, 1), generator=torch.Generator().manual_seed(0))
    found = model(input_ids=ids, labels=ids, fused_lm_head=True)
    assert found.log_probs.shape == found.entropy.shape == (3, 0)
    torch.testing.assert_close(found.mean_logits_everywhere, model(input_ids=ids).logits.mean(-1))
    found.log_probs.sum().backward()
    with pytest.raises(ValueError, match=r"labels must be \[S, L\] with values, a token at least, got \(0, 1\)"):
        model(input_ids=ids[:0], labels=ids[:0], fused_lm_head=True)


@pytest.mark.parametrize("kind", ["additive", "boolean", "one for all rows"])
def test_masks_of_four_dims_are_taken(kind: str) -> None:
    model, inputs = tiny_llama(0, attn_implementation="eager" if kind != "boolean" else "sdpa"), batch()
    length = inputs["input_ids"].shape[1]
    is_seen = torch.ones(length, length, dtype=torch.bool).tril()
    mask = is_seen if kind == "boolean" else torch.zeros(length, length).masked_fill(~is_seen, -1e9)
    inputs["attention_mask"] = mask[None, None].expand(1 if kind == "one for all rows" else 4, 1, length, length)
    expected = expected_fields(model, inputs)["log_probs"]
    add_logps_head(model)
    torch.testing.assert_close(model(**inputs, fused_lm_head=True).log_probs, expected, check_dtype=False)


def test_position_ids_embeddings_and_positional_arguments_are_taken() -> None:
    model, inputs = tiny_llama(0), batch()
    expected = expected_fields(model, inputs)["log_probs"]
    add_logps_head(model)
    embedded = model.get_input_embeddings()(inputs["input_ids"])
    positions = torch.arange(12)[None].expand(4, -1)
    rest = {"labels": inputs["labels"], "fused_lm_head": True}
    for found in (
        model(inputs_embeds=embedded, attention_mask=inputs["attention_mask"], position_ids=positions, **rest),
        model(inputs["input_ids"], inputs["attention_mask"], **rest),
    ):
        torch.testing.assert_close(found.log_probs, expected, check_dtype=False)


def test_a_cache_is_read_and_not_lengthened_by_the_comparison() -> None:
    """A prefix for the whole batch used to leave the comparison out, for good."""
    model, inputs = tiny_llama(0), batch()
    prefix_ids = inputs["input_ids"][:, :3].flip(0)
    whole = {
        "input_ids": torch.cat([prefix_ids, inputs["input_ids"]], 1),
        "attention_mask": torch.cat([torch.ones(4, 3, dtype=torch.int64), inputs["attention_mask"]], 1),
        "labels": torch.cat([torch.full((4, 3), -100), inputs["labels"]], 1),
    }
    expected = expected_fields(model, whole)["log_probs"][:, 3:]
    add_logps_head(model)
    cache = model(input_ids=prefix_ids, past_key_values=DynamicCache()).past_key_values
    mask = whole["attention_mask"]
    found = model(
        input_ids=inputs["input_ids"],
        labels=inputs["labels"],
        attention_mask=mask,
        past_key_values=cache,
        fused_lm_head=True,
    )
    torch.testing.assert_close(found.log_probs, expected, check_dtype=False)


def test_what_has_no_values_or_is_not_made_is_refused() -> None:
    model = tiny_llama(0)
    add_logps_head(model)
    with pytest.raises(ValueError, match=r"labels must be \[S, L\] with values.* on meta"):
        model.to("meta")(**{name: value.to("meta") for name, value in batch().items()}, fused_lm_head=True)
    model = tiny_llama(0)
    add_logps_head(model)
    with pytest.raises(ValueError, match="logits_to_keep chooses among logits"):
        model(**batch(), fused_lm_head=True, logits_to_keep=3)


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_what_would_not_be_returned_is_refused(name: str) -> None:
    model = tiny_llama(0)
    add_logps_head(model)
    with pytest.raises(ValueError, match=f"returns log-probs alone, got {name}"):
        model(**batch(), fused_lm_head=True, **{name: True})
    model(**batch(), fused_lm_head=True, **{name: False})
