"""Models of pictures or sound: known by their `config.json`, and refused with the way to the text model inside."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fastpref.run.architecture.families import FAMILIES

# Settings of encoders, by the words in the names that transformers and models with code of their own give them.
_VISION = re.compile(r"(?:.*_)?(?:vision|visual|vit|vq|image|img|video)(?:_.*)?|embd_layer")
_SOUND = re.compile(r"(?:.*_)?(?:audio|speech|sound|whisper)(?:_.*)?")
# The name of an encoder, where its settings are elsewhere.
_ENCODER_NAME = re.compile(r".*_(?:tower|encoder|model|model_id|backbone)")


def multimodal_problem(config: Mapping[str, Any]) -> str | None:
    """Say why a model that reads more than text cannot be trained, and which one can; None for a text model.

    Args:
        config: the contents of a `config.json`.
    """
    model_type = config.get("model_type")
    # A model that also speaks keeps what reads in a section of its own.
    thinker = config.get("thinker_config")
    settings = [*config.items(), *(thinker.items() if isinstance(thinker, Mapping) else ())]
    sees, hears = (any(_is_encoder(words, *item) for item in settings) for words in (_VISION, _SOUND))
    if not (sees or hears):
        if not isinstance(model_type, str) or model_type in FAMILIES:
            return None
        sees, hears = (model_type in types for types in _known_types())
        if not (sees or hears):
            return None
    kind = "vision-language" if sees else "audio-language"
    way_out = text_model_inside(config) or f"train a text model, of one of the types {', '.join(FAMILIES)}"
    return f"is {model_type!r}: {kind} models are not supported; {way_out}"


def text_model_inside(config: Mapping[str, Any]) -> str | None:
    """Say how to get the text model that a larger one holds; None where it holds none of a supported family."""
    inner = config.get("text_config")
    inner_type = inner.get("model_type") if isinstance(inner, Mapping) else None
    if inner_type not in tuple(FAMILIES):
        return None
    return (
        f"its text_config is of type {inner_type}: load the whole model with transformers, make a text model from "
        "text_config, set its model and lm_head to what get_decoder() and get_output_embeddings() of the whole return, "
        "and config.tie_word_embeddings to whether lm_head and input embeddings share their weight, and save it"
    )


def _is_encoder(words: re.Pattern[str], key: object, value: Any) -> bool:
    if not value or words.fullmatch(str(key)) is None:
        return False
    return isinstance(value, Mapping) or (isinstance(value, str) and _ENCODER_NAME.fullmatch(str(key)) is not None)


def _known_types() -> tuple[set[Any], set[Any]]:
    """The types of models that transformers shows pictures, and those that it lets hear, whatever their files say."""
    from transformers.models.auto import modeling_auto

    names = ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES")
    sees, either = (set(getattr(modeling_auto, name, {})) for name in names)
    return sees, either - sees
