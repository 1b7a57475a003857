"""Which causal language models an output layer that answers in log-probabilities can stand for."""

from __future__ import annotations

from transformers import PreTrainedModel

from fastpref.errors import ConfigError
from fastpref.integrations.logit_form import decoder_of


def refuse_unsupported(model: PreTrainedModel) -> None:
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
    if head is None or decoder_of(model) is model:
        missing = "an output layer" if head is None else "a decoder apart from its output layer"
        raise ConfigError(f"the model must have {missing}, got {name}; load it as AutoModelForCausalLM")
    learned = [name for name, weight in model.named_parameters(recurse=False) if weight.requires_grad]
    if learned:
        raise ConfigError(
            f"{name} must have no trainable weights outside of its decoder and output layer, got {', '.join(learned)}: "
            "a number that its logits depend on would get no gradient; freeze them, or use TRL's own trainer"
        )
    quantized = sorted({str(weight.dtype) for weight in head.parameters() if not weight.is_floating_point()})
    if quantized:
        raise ConfigError(
            f"the output layer of {name} must have floating-point weights, got {', '.join(quantized)}; leave it out of "
            "quantization (llm_int8_skip_modules, modules_to_not_convert)"
        )
    # Trainable tokens of PEFT replace rows of the weight; every other adapter adds to the product.
    if hasattr(head, "base_layer") and not hasattr(head, "trainable_tokens_delta"):
        raise ConfigError(
            f"the output layer of {name} must have no adapter, got {type(head).__name__}: an adapter adds to logits, "
            "which are never made; take it out of target_modules, or train the layer itself by modules_to_save"
        )
