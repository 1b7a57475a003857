"""The settings of the data layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastpref.errors import Problem
from fastpref.validation import Rule, validate

FORMATS = ("auto", "jsonl", "json", "parquet", "arrow")
TRUNCATIONS = ("keep_start", "keep_end", "drop")
REPEATED_PROMPTS = ("auto", "remove", "keep")
BOUNDARIES = ("strict", "common_prefix", "separate")
_FIELD_NAMES = ("prompt_field", "chosen_field", "rejected_field", "conversations_field", "weight_field")
# Words for the side that is cut off, and for cutting nothing.
_TRUNCATIONS_ELSEWHERE = {"left": "write keep_end", "right": "write keep_start", "delete": "write drop"}
_PATHS = Rule(noun="path", hint="write the paths alone, such as [a.jsonl, b.parquet]")
_RULES = {
    "train": _PATHS,
    "eval": _PATHS,
    "format": Rule(choices=FORMATS),
    **dict.fromkeys(_FIELD_NAMES, Rule(noun="field name")),
    "ignored_fields": Rule(noun="field name"),
    "repeated_prompt": Rule(choices=REPEATED_PROMPTS),
    "chat_template": Rule(noun="Jinja template", hint="leave it out for the tokenizer's own"),
    "chat_template_kwargs": Rule(noun="mapping of names"),
    "boundary": Rule(choices=BOUNDARIES),
    "max_length": Rule(at_least=2, hint="null is no limit"),
    "truncation": Rule(choices=TRUNCATIONS, elsewhere=_TRUNCATIONS_ELSEWHERE),
    "on_bad_pair": Rule(choices=("error", "drop")),
    "max_record_bytes": Rule(at_least=1024),
}


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the pairs are and how they become tokens.

    Raises:
        ConfigError: at construction, listing every value that cannot work.
    """

    train: str | tuple[str, ...] = ()
    """Training files: one path or a list of paths, read in this order."""
    eval: str | tuple[str, ...] = ()
    """Evaluation files: one path or a list of paths; none for no evaluation."""
    format: str = "auto"
    """auto (by the name of the file, `.json` by its text), jsonl, json (one array), parquet, arrow (a data set saved by
    `datasets`)."""
    prompt_field: str = "prompt"
    """Field of the prompt; a record without it has its prompt inside `chosen` and `rejected` (common start). With
    another name than the default every such record must have the field; so it is with the next ones."""
    chosen_field: str = "chosen"
    """Field of the preferred answer."""
    rejected_field: str = "rejected"
    """Field of the answer to avoid."""
    conversations_field: str = "conversations"
    """Field of a ShareGPT prompt: turns with `from` and `value`."""
    weight_field: str = "weight"
    """Field of the pair weight, > 0; optional under its default name."""
    ignored_fields: tuple[str, ...] = ()
    """Fields that are taken as absent. A field that is part of the prompt by its name (`input`, `question`, `history`),
    and whose text the pair does not contain, is an error unless it is named here."""
    repeated_prompt: str = "auto"
    """What to do where prompt, chosen and rejected are strings and both answers begin with the prompt: remove it from
    them (all records must then repeat it), keep it, or auto: remove if all of the first 256 records of a file do so."""
    chat_template: str | None = None
    """Jinja chat template used instead of the tokenizer's own: its text, the path of a file that holds it, or the name
    of one of the tokenizer's templates. What has no `{{` or `{%` is no text."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Variables for the chat template, for example a fixed date where the template would print today's."""
    append_eos: bool = True
    """Append the tokenizer's end-of-sequence token to completions given as strings, unless they end in it."""
    boundary: str = "strict"
    """Where the completion begins in the tokens: strict, common_prefix or separate (see `tokenize_pairs`)."""
    max_length: int | None = 1024
    """Tokens of prompt and completion together, >= 2; null for no limit."""
    max_prompt_length: int | None = None
    """Tokens of the prompt, >= 1; null for no limit of its own."""
    max_completion_length: int | None = None
    """Tokens of each completion, >= 1; null for no limit of its own."""
    truncation: str = "keep_start"
    """What to do with a pair over a limit: keep_start, keep_end (cuts off the start of the prompt, with its
    beginning-of-sequence token and system turn) or drop."""
    on_bad_pair: str = "error"
    """error, or drop and count: equal sides, an empty field, a prompt that fills the limit, a boundary mismatch."""
    pad_to_multiple_of: int = 8
    """Rows are padded to a multiple of this many tokens, >= 1."""
    max_record_bytes: int = 16 * 2**20
    """Longest line of a JSONL file, in bytes, >= 1024; bounds the memory that one bad line can take."""
    max_reported: int = 10
    """Bad records gathered before reading stops with one error that lists them, >= 1."""

    def __post_init__(self) -> None:
        validate(self, _RULES, DataConfig._combination_problems)

    def _combination_problems(self) -> Iterator[Problem]:
        names = [getattr(self, name) for name in _FIELD_NAMES]
        if len(set(names)) != len(names):
            yield Problem("", f"the field names must differ; got {', '.join(names)}", _FIELD_NAMES)
        chosen = {name for name in _FIELD_NAMES if self.is_renamed(name)} | {"chosen_field", "rejected_field"}
        contradictory = sorted({getattr(self, name) for name in chosen} & set(self.ignored_fields))
        if contradictory:
            yield Problem(
                "ignored_fields",
                f"must not name fields that are to be read; got {', '.join(contradictory)}",
                _FIELD_NAMES,
            )
        if self.max_length is not None and (self.max_prompt_length or 0) >= self.max_length:
            yield Problem(
                "max_prompt_length",
                f"({self.max_prompt_length}) leaves no room for a completion in max_length ({self.max_length}); lower "
                "the first or raise the second",
                ("max_length",),
            )

    def is_renamed(self, setting: str) -> bool:
        """Whether a setting of a field's name, such as "prompt_field", differs from its default."""
        return bool(getattr(self, setting) != getattr(DataConfig, setting))

    @property
    def train_paths(self) -> tuple[str, ...]:
        """`train` as a tuple."""
        return (self.train,) if isinstance(self.train, str) else self.train

    @property
    def eval_paths(self) -> tuple[str, ...]:
        """`eval` as a tuple."""
        return (self.eval,) if isinstance(self.eval, str) else self.eval
