"""Run files: `load_run_config` reads one with all its problems reported at once, `dump_run_config` writes one.

Relative paths in a run file are relative to the current directory, like those on a command line, and not to the file.
"""

from __future__ import annotations

import copy
import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from fastpref.errors import ConfigError
from fastpref.run.config.run_config import RunConfig
from fastpref.run.config.yaml_tree import KeyPath, Problem, YamlTree, dotted

# What a value of the wrong type should have been, by pydantic's name of the error.
_EXPECTED = {
    "bool_type": "true or false",
    "dataclass_type": "a section of keys",
    "dict_type": "a mapping",
    "float_type": "a number",
    "int_type": "a whole number",
    "string_type": "a string",
    "tuple_type": "a list",
}
_PLAIN_KEY = re.compile(r"(?!(?:null|true|false)$)[a-z][a-z0-9_]*")
_NOT_PRINTABLE = re.compile("[\x7f-\xa0\u2028\u2029\ufeff\ufffe\uffff]")
_NUMBER = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9]*)?([eE][-+]?[0-9]+)?")


def load_run_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file (YAML 1.2), apply overrides, and check everything that needs no other file.

    A value must have its field's type as YAML sees it: `1e-5` is a number, `"1e-5"` is not; `true` is no number, `yes`
    is no boolean; whole numbers pass for floats and lists for tuples; NaN and infinities are refused.

    Args:
        path: the file, UTF-8.
        overrides: `section.key=value` with a YAML value, applied in order before anything is checked.

    Raises:
        ConfigError: lists every problem as `file:line: key rule, what was found, remedy`.
    """
    tree = YamlTree.read(Path(path))
    for override in overrides:
        tree.apply(override)
    config, problems = _validate(tree)
    if config is None or problems:
        problems.sort(key=lambda problem: (not problem.where.line, problem.where))
        heading = f"{path} cannot be used:" if len(problems) == 1 else f"{path} has {len(problems)} problems:"
        raise ConfigError("\n  ".join([heading, *map(str, problems)]))
    return config


def dump_run_config(config: RunConfig) -> str:
    """Return a run file with every setting of `config`, defaults included; `load_run_config` gives `config` back."""
    return "".join(_yaml_lines(asdict(config), ""))


def _yaml_lines(values: Mapping[str, Any], indent: str) -> Iterator[str]:
    for name, value in values.items():
        key = name if _PLAIN_KEY.fullmatch(name) else _json(name)
        if isinstance(value, Mapping) and value:
            yield f"{indent}{key}:\n"
            yield from _yaml_lines(value, indent + "  ")
        else:
            yield f"{indent}{key}: {_json(value)}\n"


def _json(value: Any) -> str:
    """Return `value` as JSON that is YAML too: characters that YAML cannot print are escaped."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return _NOT_PRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _validate(tree: YamlTree) -> tuple[RunConfig | None, list[Problem]]:
    """Check names, then types, then the rules of the sections; a value that fails is left out of what follows."""
    values = copy.deepcopy(tree.values)
    problems = [*tree.problems, *_unknown_keys(tree, values, _known_keys(RunConfig), ())]
    refused = _drop(values, problems)
    config, errors = _check(values)
    if type_problems := _type_problems(tree, errors):
        problems += type_problems
        refused |= _drop(values, type_problems)
        config, errors = _check(values)
    return config, [*problems, *_rule_problems(tree, errors, refused)]


def _check(values: dict[str, Any]) -> tuple[RunConfig | None, list[ErrorDetails]]:
    try:
        # As JSON, where strict types still let a whole number be a float and a list be a tuple.
        return _adapter().validate_json(json.dumps(values), strict=True), []
    except ValidationError as error:
        return None, error.errors(include_url=False)


@cache
def _adapter() -> TypeAdapter[RunConfig]:
    return TypeAdapter(RunConfig)


def _drop(values: dict[str, Any], problems: Iterable[Problem]) -> set[str]:
    """Remove the section or key that each problem refuses, and return their names."""
    names = set()
    for section, *rest in (map(str, problem.refused) for problem in problems if problem.refused):
        if rest and isinstance(values.get(section), dict):
            values[section].pop(rest[0], None)
        else:
            values.pop(section, None)
        names.add(rest[0] if rest else section)
    return names


def _known_keys(cls: type) -> dict[str, dict | None]:
    """Field names of a dataclass; a field that is itself a section maps to its own names."""
    known: dict[str, dict | None] = {}
    for name, hint in get_type_hints(cls).items():
        sections = [kind for kind in (hint, *get_args(hint)) if is_dataclass(kind)]
        known[name] = _known_keys(sections[0]) if sections else None  # type: ignore[arg-type]
    return known


def _unknown_keys(
    tree: YamlTree, values: Mapping[str, Any], known: Mapping[str, dict | None], path: KeyPath
) -> Iterator[Problem]:
    for key, value in values.items():
        inner = (*path, key)
        section = known.get(key)
        if key not in known:
            hint = _nearest(key, known)
            yield Problem(tree.location(inner), f"{dotted(inner)} is not a known key; {hint}", inner)
        elif section is not None and isinstance(value, dict):
            yield from _unknown_keys(tree, value, section, inner)


def _nearest(key: str, known: Mapping[str, dict | None]) -> str:
    """Advice for an unknown key: a similar name in its section, the same name in another, or what the section has."""
    if near := difflib.get_close_matches(key, known, n=1):
        return f"did you mean {near[0]}?"
    sections = _known_keys(RunConfig)
    for section, names in sections.items():
        if near := difflib.get_close_matches(key, names or (), n=1, cutoff=0.8):
            return f"did you mean {section}.{near[0]}?"
    return f"known are {', '.join(known)}"


def _type_problems(tree: YamlTree, errors: Iterable[ErrorDetails]) -> list[Problem]:
    """One problem for each value of a wrong type; alternatives of a field are joined."""
    expected: dict[KeyPath, list[str]] = {}
    for error in errors:
        if error["type"] not in ("missing", "value_error"):
            rule = error.get("ctx", {}).get("expected") or _EXPECTED.get(error["type"]) or error["msg"]
            expected.setdefault(_path_in(tree, error["loc"]), []).append(rule)
    problems = []
    for path, rules in expected.items():
        if any(other[: len(path)] == path and other != path for other in expected):
            continue  # the item inside says more
        value = tree.at(path)
        text = f"{dotted(path)} must be {' or '.join(rules)}, got {_shown(value)}{_remedy(value, rules)}"
        problems.append(Problem(tree.location(path), text, path))
    return problems


def _path_in(tree: YamlTree, loc: tuple[str | int, ...]) -> KeyPath:
    """Drop from pydantic's location the steps that are no keys, as the alternatives of a union."""
    path: KeyPath = ()
    for step in loc:
        if (*path, step) in tree.where:
            path = (*path, step)
    return path


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _remedy(value: Any, rules: Sequence[str]) -> str:
    if value is None:
        return "; remove the key to keep the default"
    if isinstance(value, str) and any("number" in rule for rule in rules) and _NUMBER.fullmatch(value):
        return "; remove the quotes"
    return ""


def _rule_problems(tree: YamlTree, errors: Iterable[ErrorDetails], refused: set[str]) -> Iterator[Problem]:
    """Problems that the sections' own checks found, but for those that speak of a value refused before."""
    for error in errors:
        path = error["loc"]
        if error["type"] == "missing":
            messages = [f"{dotted(path)} is required"]
        else:
            messages = _split(str(error["ctx"]["error"]), path)
        for text in messages:
            words = re.findall(r"\w+", text)
            if refused.isdisjoint(words):
                inner = next(((*path, word) for word in words if (*path, word) in tree.where), path)
                yield Problem(tree.location(inner), text)


def _split(message: str, path: KeyPath) -> list[str]:
    """Cut the message of a section into its problems, each beginning with the full name of a key or the section."""
    names = _known_keys(RunConfig)
    for step in path:
        names = names[str(step)] or {}
    starts = "|".join(map(re.escape, names))
    # sections list their problems on lines, or between semicolons before the name of the next key
    parts = re.split(rf"\n(?:- )?|; (?=(?:{starts})\b)", message)
    prefix = dotted(path)
    texts = []
    for part in parts:
        if part.endswith(":"):  # a heading
            continue
        if prefix and not part.startswith(prefix):
            part = f"{prefix}.{part}" if re.match(rf"(?:{starts})\b", part) else f"{prefix}: {part}"
        texts.append(part)
    return texts
