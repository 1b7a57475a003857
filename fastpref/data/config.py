"""The settings of the data layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastpref.errors import ConfigError

FORMATS = ("auto", "jsonl", "json", "parquet", "arrow")
TRUNCATIONS = ("keep_start", "keep_end", "drop")
BOUNDARIES = ("strict", "common_prefix", "separate")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the pairs are and how they become tokens.

    Raises:
        ConfigError: at construction, with every problem on a line of its own.
    """

    train: str | tuple[str, ...] = ()
    """Training files: one path or a list of paths, read in this order."""
    eval: str | tuple[str, ...] = ()
    """Evaluation files: one path or a list of paths; none for no evaluation."""
    format: str = "auto"
    """auto (by the name of the file), jsonl, json (one array), parquet, arrow (a data set saved by `datasets`)."""
    prompt_field: str = "prompt"
    """Field of the prompt; a record without it has its prompt inside `chosen` and `rejected` (common start)."""
    chosen_field: str = "chosen"
    """Field of the preferred answer."""
    rejected_field: str = "rejected"
    """Field of the answer to avoid."""
    conversations_field: str = "conversations"
    """Field of a ShareGPT prompt: turns with `from` and `value`; the optional field `system` comes before them."""
    weight_field: str = "weight"
    """Field of the optional pair weight, > 0."""
    chat_template: str | None = None
    """Jinja chat template (the text, not a path) used instead of the tokenizer's own."""
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
    """What to do with a pair over a limit: keep_start, keep_end or drop (see `tokenize_pairs`)."""
    on_bad_pair: str = "error"
    """error, or drop and count: equal sides, an empty field, a prompt that fills the limit, a boundary mismatch."""
    pad_to_multiple_of: int = 8
    """Rows are padded to a multiple of this many tokens, >= 1."""
    max_record_bytes: int = 16 * 2**20
    """Longest line of a JSONL file, in bytes, >= 1024; bounds the memory that one bad line can take."""
    max_reported: int = 10
    """Bad records gathered before reading stops with one error that lists them, >= 1."""

    def __post_init__(self) -> None:
        problems = [*self._check_paths(), *self._check_choices(), *self._check_texts(), *self._check_numbers()]
        if problems:
            raise ConfigError("\n".join(problems))

    @property
    def train_paths(self) -> tuple[str, ...]:
        """`train` as a tuple."""
        return (self.train,) if isinstance(self.train, str) else tuple(self.train)

    @property
    def eval_paths(self) -> tuple[str, ...]:
        """`eval` as a tuple."""
        return (self.eval,) if isinstance(self.eval, str) else tuple(self.eval)

    def _check_paths(self) -> list[str]:
        problems = []
        for name in ("train", "eval"):
            value = getattr(self, name)
            paths = [value] if isinstance(value, str) else value
            if not isinstance(paths, (list, tuple)) or not all(isinstance(path, str) and path for path in paths):
                problems.append(f"{name} must be a path or a list of paths, got {value!r}")
        return problems

    def _check_choices(self) -> list[str]:
        choices = {
            "format": FORMATS,
            "boundary": BOUNDARIES,
            "truncation": TRUNCATIONS,
            "on_bad_pair": ("error", "drop"),
        }
        return [
            f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}"
            for name, allowed in choices.items()
            if getattr(self, name) not in allowed
        ]

    def _check_texts(self) -> list[str]:
        problems = []
        names = [f"{name}_field" for name in ("prompt", "chosen", "rejected", "conversations", "weight")]
        for name in names:
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                problems.append(f"{name} must be a field name, got {getattr(self, name)!r}")
        values = [getattr(self, name) for name in names]
        if len(set(values)) != len(values):
            problems.append(f"the field names must differ; got {', '.join(map(str, values))}")
        if self.chat_template is not None and (not isinstance(self.chat_template, str) or not self.chat_template):
            problems.append(f"chat_template must be null or the text of a template, got {self.chat_template!r}")
        if not isinstance(self.chat_template_kwargs, Mapping):
            problems.append(f"chat_template_kwargs must be a mapping, got {self.chat_template_kwargs!r}")
        if not isinstance(self.append_eos, bool):
            problems.append(f"append_eos must be true or false, got {self.append_eos!r}")
        return problems

    def _check_numbers(self) -> list[str]:
        problems = []
        minima = {"pad_to_multiple_of": 1, "max_record_bytes": 1024, "max_reported": 1}
        limits = {"max_length": 2, "max_prompt_length": 1, "max_completion_length": 1}
        for name, minimum in (minima | limits).items():
            value = getattr(self, name)
            if value is None and name in limits:
                continue
            # bool is an int to Python, never a length to us
            if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
                problems.append(f"{name} must be an integer >= {minimum}, got {value!r}")
        if not problems and self.max_length is not None and (self.max_prompt_length or 0) >= self.max_length:
            problems.append(
                f"max_prompt_length={self.max_prompt_length} leaves no room for a completion in "
                f"max_length={self.max_length}; lower the first or raise the second"
            )
        return problems
