"""Takes a `config.json` apart key by key, so that what nobody took can be refused by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastpref.errors import Problem

# Keys without effect on the weights or the forward pass of training.
INERT_KEYS = frozenset(
    {
        "_attn_implementation_autoset",
        "_name_or_path",
        # transformers takes the pattern from layer_types or sliding_window_pattern
        "_sliding_window_pattern",
        "architectures",
        "bos_token_id",
        "cache_implementation",
        "chunk_size_feed_forward",
        "cls_token_id",
        "decoder_start_token_id",
        "dtype",
        "eos_token_id",
        "finetuning_task",
        "id2label",
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "prefix",
        "pretraining_tp",
        "problem_type",
        "return_dict",
        "sep_token_id",
        "task_specific_params",
        "tokenizer_class",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "unk_token_id",
        "unsloth_fixed",
        "unsloth_version",
        "use_cache",
    }
)


class ConfigReader:
    """Takes keys out of a config one by one and remembers what was wrong.

    Args:
        config: the contents of a `config.json`, or of an object in it.

    Attributes:
        left: keys that have an effect and that nobody has taken yet; JSON null counts as absent.
        nulls: keys that are JSON null.
        problems: what was wrong so far.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.left = {key: value for key, value in config.items() if value is not None and key not in INERT_KEYS}
        self.nulls = {key for key, value in config.items() if value is None}
        self.problems: list[Problem] = []

    def note(self, key: str, text: str) -> None:
        """Remember that a key is wrong."""
        self.problems.append(Problem(key, text))

    def take(self, key: str, kind: type, default: Any = ...) -> Any:
        """Take a value of a type, numbers finite and > 0; `default` where the key is absent.

        Returns:
            The value; None, with a problem noted, where it is missing or wrong.
        """
        value = self.left.pop(key, default)
        if value is ...:
            self.note(key, "is missing")
            return None
        good = isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) == (kind is bool)
        if value is not default and not good:
            self.note(key, f"must be of type {kind.__name__}, got {value!r}")
            return None
        if value is not None and kind in (int, float) and not 0 < value < math.inf:
            self.note(key, f"must be a finite number > 0, got {value!r}")
            return None
        return value

    def require(self, key: str, supported: Any, absent: Any = ...) -> None:
        """Take a key that may only have the one value that is implemented, or be absent where that means the same.

        Args:
            key: the key.
            supported: the value.
            absent: what its absence means; that value by default.
        """
        if key not in self.left and absent not in (..., supported):
            self.note(key, f"must be {supported!r}, and its absence means {absent!r}: set it")
        value = self.left.pop(key, supported)
        if value != supported:
            self.note(key, f"must be {supported!r}, got {value!r}: other values are not implemented")
