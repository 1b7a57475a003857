"""The checks that every settings object makes of its fields: types, numbers in their range, names among the choices.

A settings class says what its fields are once, by their annotations, and calls `validate` with a `Rule` for each field
that this does not settle. What several fields must keep together is asked of an object whose fields are all good.
"""

from __future__ import annotations

import copy
import difflib
import math
import os
import types
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import MISSING, Field, dataclass, fields
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from fastpref.errors import Problem, raise_if_any

Settings = TypeVar("Settings")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What the annotation of a field leaves open."""

    at_least: float | None = None
    """Lower bound of a number, itself allowed."""
    above: float | None = None
    """Lower bound of a number, itself not allowed."""
    at_most: float | None = None
    """Upper bound of a number, itself allowed."""
    below: float | None = None
    """Upper bound of a number, itself not allowed."""
    choices: Sequence[object] = ()
    """What the field, or each of its names, may be; none for anything."""
    elsewhere: Mapping[str, str] | None = None
    """Values of other programs that are none of the choices: what each is here, or the remedy."""
    noun: str = ""
    """What a string stands for, which must then not be empty; what an object of another type is."""
    hint: str = ""
    """Remedy that ends the message."""


# A number that has no rule.
_COUNT, _AMOUNT = Rule(at_least=1), Rule(at_least=0)


def validate(
    settings: Settings,
    rules: Mapping[str, Rule] | None = None,
    combinations: Callable[[Settings], Iterable[Problem]] | None = None,
) -> None:
    """Check a settings object, from its `__post_init__`.

    What is meant is taken: lists and sets become tuples, path objects strings, scalars of NumPy those of Python, floats
    without a fraction whole numbers, and 0 and 1 false and true.

    Args:
        settings: a dataclass object.
        rules: what the fields must be beyond their types; without a rule a whole number is >= 1, another one >= 0.
        combinations: yields what is wrong with several fields together. It sees the defaults in place of fields that
            are wrong by themselves, and what it finds of these is dropped as a mere consequence.

    Raises:
        ConfigError: with every problem.
    """
    validator = Validator(settings)
    cls: type = type(settings)
    hints = _hints(cls)
    refused = [field for field, hint in hints if not validator.field(field.name, hint, (rules or {}).get(field.name))]
    usable, names = copy.copy(settings), {field.name for field in refused}
    for field in refused:
        if field.default is not MISSING:
            object.__setattr__(usable, field.name, field.default)
        elif field.default_factory is not MISSING:
            object.__setattr__(usable, field.name, field.default_factory())
    for problem in combinations(usable) if combinations is not None else ():
        if names.isdisjoint(name.split(".")[0] for name in (problem.key, *problem.others)):
            validator.problems.append(problem)
    raise_if_any(validator.problems, cls.__name__)


@cache
def _hints(cls: type) -> tuple[tuple[Field[Any], Any], ...]:
    hints = get_type_hints(cls)
    return tuple((field, hints[field.name]) for field in fields(cls))


class Validator:
    """Gathers what is wrong with the fields of an object, so that all of it is reported at once.

    Args:
        settings: the object; fields are read from it by name.
    """

    def __init__(self, settings: object) -> None:
        self._settings = settings
        self.problems: list[Problem] = []

    def note(self, key: str, text: str, *others: str) -> None:
        """Add a problem of one field that depends on `others` too, or with an empty key one of the object."""
        self.problems.append(Problem(key, text, others))

    def field(self, key: str, hint: Any, rule: Rule | None = None) -> bool:
        """Require of a field what its annotation says and a rule adds; return whether it is good."""
        kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        if getattr(self._settings, key) is None and types.NoneType in kinds:
            return True
        self._normalize(key)
        kind, *others = (kind for kind in kinds if kind is not types.NoneType)
        if kind in (int, float):
            return self._number(key, rule or (_COUNT if kind is int else _AMOUNT), whole=kind is int)
        rule = rule or Rule()
        if get_origin(kind) is Literal or (rule.choices and not others and get_origin(kind) is not tuple):
            return self.choice(key, get_args(kind) or rule.choices, hint=rule.hint, elsewhere=rule.elsewhere)
        if get_origin(kind) is tuple or others:
            return self._names(key, rule, alone=kind is str)
        return self._instance(key, get_origin(kind) or kind, rule)

    def _number(self, key: str, rule: Rule, *, whole: bool) -> bool:
        value = getattr(self._settings, key)
        if whole and isinstance(value, float) and value.is_integer():
            value = self._replace(key, int(value))
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        good = (
            is_number
            and (isinstance(value, int) if whole else _is_finite(value))
            and (rule.at_least is None or value >= rule.at_least)
            and (rule.above is None or value > rule.above)
            and (rule.at_most is None or value <= rule.at_most)
            and (rule.below is None or value < rule.below)
        )
        if not good:
            self._refuse(key, _number_text(rule, whole, is_number), ",", rule.hint)
        return good

    def choice(
        self,
        key: str,
        choices: Sequence[object],
        *,
        optional: bool = False,
        hint: str = "",
        elsewhere: Mapping[str, str] | None = None,
    ) -> bool:
        """Require one of some values; a near miss is named.

        Args:
            key: name of the field.
            choices: what it may be; all of one type.
            optional: None is fine.
            hint: remedy that ends the message where no choice is near.
            elsewhere: see `Rule`.

        Returns:
            Whether the field is good.
        """
        value = getattr(self._settings, key)
        # the type first: an array compares with anything, and answers with an array
        if (value is None and optional) or (isinstance(value, type(choices[0])) and value in choices):
            return True
        self._refuse(key, f"one of {', '.join(map(str, choices))}", ";", _nearest(value, choices, elsewhere) or hint)
        return False

    def _names(self, key: str, rule: Rule, *, alone: bool) -> bool:
        """Require a tuple or a list of strings; `alone` lets one string stand for itself."""
        value, noun = getattr(self._settings, key), rule.noun or "name"
        if isinstance(value, Set):
            value = sorted(value, key=str)
        if isinstance(value, (list, tuple)):
            value = self._replace(key, tuple(map(_plain, value)))
        names = (value,) if alone and isinstance(value, str) else value
        if not isinstance(names, tuple) or not all(isinstance(name, str) and name for name in names):
            is_name = isinstance(value, str) and value
            remedy = _meant(value, rule.elsewhere) or (f"write [{_shown(value)}]" if is_name else rule.hint)
            self._refuse(key, f"{f'a {noun} or ' if alone else ''}a list of {noun}s", ",", remedy)
            return False
        unknown = [name for name in names if rule.choices and name not in rule.choices]
        if unknown:
            near = _nearest(unknown[0], rule.choices, rule.elsewhere) or rule.hint
            found = ", ".join(map(repr, unknown))
            self.note(key, f"must name only {', '.join(map(str, rule.choices))}; got {found}{near and f'; {near}'}")
        return not unknown

    def _instance(self, key: str, kind: type, rule: Rule) -> bool:
        value = getattr(self._settings, key)
        if kind is bool and isinstance(value, int) and value in (0, 1):
            value = self._replace(key, bool(value))
        good = isinstance(value, kind) and (value != "" or not rule.noun)
        good = good and (kind is not Mapping or all(isinstance(name, str) for name in value))
        if not good:
            plain = {bool: "true or false", str: "a string"}
            self._refuse(key, f"a {rule.noun}" if rule.noun else plain.get(kind, f"a {kind.__name__}"), ",", rule.hint)
        return good

    def _normalize(self, key: str) -> None:
        value = getattr(self._settings, key)
        if (plain := _plain(value)) is not value:
            self._replace(key, plain)

    def _replace(self, key: str, value: Any) -> Any:
        object.__setattr__(self._settings, key, value)
        return value

    def _refuse(self, key: str, expected: str, comma: str, remedy: str) -> None:
        found = _shown(getattr(self._settings, key))
        self.note(key, f"must be {expected}{comma} got {found}{remedy and f'; {remedy}'}")


def _plain(value: Any) -> Any:
    """A path object as a string, a scalar of NumPy or PyTorch as Python's; anything else as it is."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    is_scalar = getattr(value, "ndim", None) == 0 and callable(getattr(value, "item", None))
    return value.item() if is_scalar else value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def _nearest(value: Any, choices: Sequence[object], elsewhere: Mapping[str, str] | None = None) -> str:
    if not isinstance(value, str):
        return ""
    if meant := _meant(value, elsewhere):
        return meant
    # three letters that share two are two names: `dpo` is no slip of `ipo`
    near = difflib.get_close_matches(value, list(map(str, choices)), n=1, cutoff=0.7)
    return f"did you mean {near[0]}?" if near else ""


def _meant(value: Any, elsewhere: Mapping[str, str] | None) -> str:
    return (elsewhere or {}).get(value.lower().replace("-", "_"), "") if isinstance(value, str) else ""


def _number_text(rule: Rule, whole: bool, is_number: bool) -> str:
    """Bounds on both sides as an interval, one alone as a comparison."""
    kind = "a whole number" if whole else "a finite number"
    low = rule.at_least if rule.above is None else rule.above
    high = rule.at_most if rule.below is None else rule.below
    if low is not None and high is not None:
        interval = f"in {'[' if rule.above is None else '('}{low:g}, {high:g}{']' if rule.below is None else ')'}"
        return f"{kind} {interval}" if whole else interval if is_number else f"a number {interval}"
    if low is not None:
        return f"{kind} {'>=' if rule.above is None else '>'} {low:g}"
    if high is not None:
        return f"{kind} {'<=' if rule.below is None else '<'} {high:g}"
    return kind
