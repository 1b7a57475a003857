"""Texts -> token ids with a tokenizer that is left as it is: whole texts, and texts that go on in mid-sequence."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from fastpref.errors import ConfigError

# Texts of which a tokenizer knows at least one, to see what it puts around a text.
_PROBES = ("a", "A", "0", ".", "the")


class Encoder:
    """Token ids of texts, without what a tokenizer adds to a text because it is one.

    Truncation and padding that are stored with the tokenizer are off.

    Args:
        tokenizer: a transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @property
    def name(self) -> str:
        """The tokenizer's class, for messages."""
        return type(self._tokenizer).__name__

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, without added special tokens."""
        if not texts:
            return []
        # `verbose` is the warning about texts beyond the model's length, which `max_length` settles.
        options = {"add_special_tokens": False, "padding": False, "truncation": False, "verbose": False}
        encoded: list[list[int]] = self._tokenizer(list(texts), **options)["input_ids"]
        return encoded

    def opened(self, ids: list[int]) -> list[int]:
        """Put the special tokens that begin a text in front, unless the text spells them out itself."""
        start = self.added[0]
        return ids if ids[: len(start)] == start else start + ids

    @cached_property
    def added(self) -> tuple[list[int], list[int]]:
        """Special tokens that the tokenizer puts before and behind a text."""
        for probe in _PROBES:
            plain, whole = (
                self._tokenizer(probe, add_special_tokens=special, padding=False, truncation=False)["input_ids"]
                for special in (False, True)
            )
            for start in range(len(whole) - len(plain) + 1 if plain else 0):
                if whole[start : start + len(plain)] == plain:
                    return whole[:start], whole[start + len(plain) :]
        return [], []

    @cached_property
    def eos(self) -> tuple[str, int]:
        """Text and id of the end-of-sequence token.

        Raises:
            ConfigError: there is none, or it is no token of the vocabulary.
        """
        text, token_id = self._tokenizer.eos_token, self._tokenizer.eos_token_id
        remedy = "set its `eos_token`, or set `append_eos: false`"
        if text is None:
            raise ConfigError(f"the tokenizer has no end-of-sequence token to append to string completions; {remedy}")
        # An unknown text has no id, or that of the token for unknown text.
        if token_id is None or self._tokenizer.convert_ids_to_tokens(token_id) != text:
            raise ConfigError(
                f"the tokenizer's end-of-sequence token {text!r} is not in its vocabulary, so that nothing can be "
                f"appended to string completions; {remedy}"
            )
        return text, token_id

    def check_added(self) -> None:
        """Refuse a tokenizer of which it is unclear what it puts around a text.

        Raises:
            ConfigError: texts end in something else than the end-of-sequence token, or its settings contradict its
                post-processor.
        """
        start, end = self.added
        if end and end != [self._tokenizer.eos_token_id]:
            raise ConfigError(
                f"the tokenizer {self.name} ends every text in {self._tokenizer.decode(end)!r}, which stands at the "
                "end of no prompt and is not its end-of-sequence token; take that out of its post-processor"
            )
        asked = self._tokenizer.init_kwargs.get("add_bos_token")
        if isinstance(asked, bool) and asked != (self._tokenizer.bos_token_id in start):
            does = "puts none in front of a text" if asked else "puts one in front of every text"
            raise ConfigError(
                f"the tokenizer {self.name} has `add_bos_token: {str(asked).lower()}` in tokenizer_config.json and, as "
                f"transformers loads it, {does}; remove `add_bos_token` there if that is meant, else mend `bos_token` "
                "or the post-processor of tokenizer.json"
            )

    def check_special(self, text: str, ids: list[int]) -> None:
        """Refuse a tokenizer that does not parse the special tokens that a chat template spells out.

        Raises:
            ConfigError: with the token.
        """
        for token, token_id in self._unparsed.items():
            if text.count(token) > ids.count(token_id):
                raise ConfigError(
                    f"the tokenizer {self.name} cuts the special token {token!r} into pieces where the chat template "
                    "spells it out; set `split_special_tokens` of the tokenizer and `single_word` of the token to "
                    "false, or make it a token of the vocabulary"
                )

    def continuation(self, text: str) -> list[int]:
        """Return the ids of a text that goes on in mid-sequence: nothing is put in front of it.

        Behind a special token the tokenizer's own rules hold again, as in a whole text.
        """
        if self._bare is None:
            return self.ids([text])[0]
        encoding = self._bare.encode(text, add_special_tokens=False)
        first = next((i for i, token_id in enumerate(encoding.ids) if token_id in self._added_ids), None)
        if first is None:
            return list(encoding.ids)
        return encoding.ids[:first] + self.ids([text[encoding.offsets[first][0] :]])[0]

    def reads_on(self, prompt: list[int], rest: list[int], whole: list[int]) -> bool:
        """Whether the tokens of a prompt and of what goes on behind it stand for the same text as those of the whole.

        Where a word across the boundary is unknown as a whole, and its parts are not, the parts say more.
        """
        unknown = self._tokenizer.unk_token_id
        if unknown is not None and whole.count(unknown) > (prompt + rest).count(unknown):
            return True
        parts, together = (
            self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            for ids in (prompt + rest, whole)
        )
        return bool(parts == together)

    @cached_property
    def _added_ids(self) -> set[int]:
        return set(self._tokenizer.added_tokens_decoder)

    @cached_property
    def _bare(self) -> Any:
        """A copy of the backend that puts nothing in front of a text; None where that is the tokenizer itself."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        description = json.loads(backend.to_str())
        parts = {name: description[name] for name in ("normalizer", "pre_tokenizer")}
        bare = {name: _without_prefix(part) for name, part in parts.items()}
        if bare == parts:
            return None
        copied = type(backend).from_str(json.dumps(description | bare))
        copied.no_truncation()
        copied.no_padding()
        copied.encode_special_tokens = backend.encode_special_tokens
        return copied

    @cached_property
    def _unparsed(self) -> dict[str, int]:
        """Special tokens that are not parsed where a text spells them out."""
        special = {token.content: i for i, token in self._tokenizer.added_tokens_decoder.items() if token.special}
        # One that is not in the vocabulary has no id, or that of the token for unknown text.
        for text in self._tokenizer.all_special_tokens:
            token_id = self._tokenizer.convert_tokens_to_ids(text)
            is_known = token_id is not None and self._tokenizer.convert_ids_to_tokens(token_id) == text
            special[text] = token_id if is_known else -1
        texts = [f"a{text}a" for text in special]
        if not texts:
            return {}
        encoded = self._tokenizer(texts, add_special_tokens=False, padding=False, truncation=False)["input_ids"]
        return {
            text: token_id
            for (text, token_id), ids in zip(special.items(), encoded, strict=True)
            if token_id not in ids
        }


def _without_prefix(part: Any) -> Any:
    """A normalizer or pre-tokenizer, as serialised, that neither adds nor takes away something at the start."""
    if not isinstance(part, dict):
        return part
    for name in ("normalizers", "pretokenizers"):
        if name in part:
            inner = [_without_prefix(child) for child in part[name]]
            return {**part, name: [child for child in inner if child is not None]}
    changes: dict[str, Any] = {
        "Metaspace": {"prepend_scheme": "never"},
        "ByteLevel": {"add_prefix_space": False},
        "Strip": {"strip_left": False},
    }
    if part["type"] == "Prepend":
        return None
    # The normalizer called ByteLevel has no options.
    return part | {key: value for key, value in changes.get(part["type"], {}).items() if key in part}
