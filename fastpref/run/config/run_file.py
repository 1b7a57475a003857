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

from fastpref.errors import ConfigError, Problem
from fastpref.run.config import other_names
from fastpref.run.config.run_config import RunConfig
from fastpref.run.config.yaml_tree import Finding, KeyPath, YamlTree, dotted

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
# Sections without which no file is whole, as the checks see them where they cannot be used.
_STAND_INS = {"model": {"path": "."}, "data": {}}
# Keys that elsewhere are switches, and what stands for true.
_SWITCHED = {"training.resume_from_checkpoint": "latest", "training.recompute_granularity": "full"}
_WORDS_FOR_SWITCHES = {"yes": "true", "on": "true", "true": "true", "no": "false", "off": "false", "false": "false"}
_PLAIN_KEY = re.compile(r"(?!(?:null|true|false)$)[a-z][a-z0-9_]*")
_NOT_PRINTABLE = re.compile("[\x7f-\xa0\u2028\u2029\ufeff\ufffe\uffff]")
# What two names share at least before one is taken for a slip of the other: `lr` is no `lora`.
_SIMILAR = 0.75
_NUMBER = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9]*)?([eE][-+]?[0-9]+)?")


def load_run_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file (YAML 1.2), apply overrides, and check everything that needs no other file.

    A value must have its field's type as YAML sees it: `1e-5` is a number, `"1e-5"` is not; `true` is no number, `yes`
    is no boolean; whole numbers pass for floats, `3.0` for a whole number and lists for tuples; NaN and infinities are
    refused.

    Args:
        path: the file, UTF-8.
        overrides: `section.key=value` with a YAML value, applied in order before anything is checked.

    Raises:
        ConfigError: lists every problem as `file:line: key rule, what was found, remedy`.
    """
    tree = YamlTree.read(Path(path))
    for override in overrides:
        tree.apply(override)
    config, findings = _validate(tree)
    if config is None or findings:
        findings.sort(key=lambda finding: (not finding.where.line, finding.where))
        heading = f"{path} has {len(findings)} problems" if len(findings) > 1 else ""
        raise ConfigError([finding.problem._replace(where=str(finding.where)) for finding in findings], heading)
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


def _validate(tree: YamlTree) -> tuple[RunConfig | None, list[Finding]]:
    """Check names, then types, then the rules of the sections, then how sections fit each other.

    A value that fails is left out of what follows. What is then found is only a consequence, and not reported, where it
    depends on such a value.
    """
    values = copy.deepcopy(tree.values)
    missing = [Finding(tree.root, Problem(name, "is required"), (name,)) for name in _STAND_INS if name not in values]
    found = [*tree.findings, *missing, *_unknown_keys(tree, values, _known_keys(RunConfig), ())]
    findings: list[Finding] = []
    refused: set[KeyPath] = set()
    while True:
        findings += [finding for finding in found if not _follows(finding, refused)]
        for path in [finding.refused for finding in found if finding.refused]:
            # what goes on without a key is at fault as a section
            dropped = path[:1] if path[:2] in refused else path[:2]
            _drop(values, dropped)
            refused.add(dropped)
        config, errors = _check(_STAND_INS | values)
        found = [*_type_findings(tree, errors), *_rule_findings(tree, errors)]
        if not found:
            return config, findings


def _check(values: dict[str, Any]) -> tuple[RunConfig | None, list[ErrorDetails]]:
    try:
        # As JSON, where strict types still let a whole number be a float and a list be a tuple.
        return _adapter().validate_json(json.dumps(_with_whole_numbers(values)), strict=True), []
    except ValidationError as error:
        return None, error.errors(include_url=False)


def _with_whole_numbers(values: dict[str, Any]) -> dict[str, Any]:
    """Write `3.0` as `3` where it is the value of a section's key: a whole number, or a float that 3 passes for."""
    return {
        name: {key: int(value) if _is_whole(value) else value for key, value in section.items()}
        if isinstance(section, dict)
        else section
        for name, section in values.items()
    }


def _is_whole(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer() and abs(value) < 2**53


@cache
def _adapter() -> TypeAdapter[RunConfig]:
    return TypeAdapter(RunConfig)


def _drop(values: dict[str, Any], path: KeyPath) -> None:
    """Remove a section, or a key of one."""
    *section, key = map(str, path)
    holder = values.get(section[0]) if section else values
    if isinstance(holder, dict):
        holder.pop(key, None)


def _follows(finding: Finding, refused: set[KeyPath]) -> bool:
    """Whether a finding depends on a value that was refused before."""
    names = (finding.problem.key, *finding.problem.others)
    paths = [finding.refused, *(tuple(name.split(".")) for name in names)]
    return any(path[:length] in refused for path in paths for length in range(1, len(path) + 1))


def _known_keys(cls: type) -> dict[str, dict | None]:
    """Field names of a dataclass; a field that is itself a section maps to its own names."""
    known: dict[str, dict | None] = {}
    for name, hint in get_type_hints(cls).items():
        sections = [kind for kind in (hint, *get_args(hint)) if is_dataclass(kind)]
        known[name] = _known_keys(sections[0]) if sections else None  # type: ignore[arg-type]
    return known


def _unknown_keys(
    tree: YamlTree, values: Mapping[str, Any], known: Mapping[str, dict | None], path: KeyPath
) -> Iterator[Finding]:
    for key, value in values.items():
        inner = (*path, key)
        section = known.get(key)
        if key not in known:
            problem = Problem(dotted(inner), f"is not a known key; {_nearest(key, known)}")
            yield Finding(tree.location(inner), problem, inner)
        elif section is not None and isinstance(value, dict):
            yield from _unknown_keys(tree, value, section, inner)


def _nearest(key: str, known: Mapping[str, dict | None]) -> str:
    """Advice for an unknown key: where it belongs, what stands for another trainer's, a similar name, or all names."""
    sections = _known_keys(RunConfig)
    if homes := [section for section, names in sections.items() if key in (names or ())]:
        return f"did you mean {homes[0]}.{key}?"
    if instead := other_names.advice(key):
        return instead
    if near := difflib.get_close_matches(key, known, n=1, cutoff=_SIMILAR):
        return f"did you mean {near[0]}?"
    for section, names in sections.items():
        if near := difflib.get_close_matches(key, names or (), n=1, cutoff=_SIMILAR):
            return f"did you mean {section}.{near[0]}?"
    return f"nothing here is called so; leave it out, or take one of {', '.join(known)}"


def _type_findings(tree: YamlTree, errors: Iterable[ErrorDetails]) -> Iterator[Finding]:
    """One for each value of a wrong type; alternatives of a field are joined."""
    expected: dict[KeyPath, list[str]] = {}
    for error in errors:
        if error["type"] != "value_error":
            rule = error.get("ctx", {}).get("expected") or _EXPECTED.get(error["type"]) or error["msg"]
            expected.setdefault(_path_in(tree, error["loc"]), []).append(rule)
    for path, rules in expected.items():
        if any(other[: len(path)] == path and other != path for other in expected):
            continue  # the item inside says more
        value = tree.at(path)
        text = f"must be {' or '.join(rules)}, got {_shown(value)}{_remedy(dotted(path), value, rules)}"
        yield Finding(tree.location(path), Problem(dotted(path), text), path)


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


def _remedy(key: str, value: Any, rules: Sequence[str]) -> str:
    if value is None:
        return "; remove the key to keep the default"
    if isinstance(value, str) and any("number" in rule for rule in rules) and _NUMBER.fullmatch(value):
        return "; remove the quotes"
    if isinstance(value, str) and "a list" in rules:
        return _as_list(key, value)
    if isinstance(value, str) and "true or false" in rules and value.lower() in _WORDS_FOR_SWITCHES:
        return f"; write {_WORDS_FOR_SWITCHES[value.lower()]}"
    if isinstance(value, float) and key == "training.num_train_epochs":
        return "; set training.max_steps for a part of an epoch"
    if key in _SWITCHED:
        return "; leave it out" if value is False else f"; write {_SWITCHED[key]}"
    if isinstance(value, dict) and key.startswith(("data.train", "data.eval")):
        return "; name files by their paths alone, and settings of all of them as keys of data"
    if isinstance(value, str) and key == "model":
        return f"; write {{path: {value}}}"
    if isinstance(value, str) and key == "data":
        return f"; write {{train: {value}}}"
    if isinstance(value, bool) and key in ("lora", "reference"):
        return "; write {} for the defaults" if value else "; leave it out"
    return ""


def _as_list(key: str, value: str) -> str:
    """What is wrong with the names of a string as items of a list; if nothing is, this list."""
    section, _, name = key.partition(".")
    items = [item.strip() for item in value.split(",")]
    _, errors = _check(_STAND_INS | {section: {name: items}})
    problems = [
        problem for error in errors if "error" in error.get("ctx", {}) for problem in error["ctx"]["error"].problems
    ]
    about = [problem.text for problem in problems if problem.key == name]
    return f", and {about[0]}" if about else f"; write [{', '.join(items)}]"


def _rule_findings(tree: YamlTree, errors: Iterable[ErrorDetails]) -> Iterator[Finding]:
    """What the sections' own checks found, at the place of the first key that was given."""
    for error in errors:
        if error["type"] == "value_error":
            section = error["loc"]
            for problem in error["ctx"]["error"].problems:
                paths = [(*section, *name.split(".")) for name in (problem.key, *problem.others)]
                place = next((path for path in paths if path in tree.where), section)
                yield Finding(tree.location(place), problem.under(dotted(section)) if section else problem, place)
