"""YAML 1.2 text -> plain values that remember where they were written; the syntax half of reading a run file.

The parser's node graph is converted here and no YAML constructor ever runs, so a tag such as `!!python/object` is only
a name to refuse. Size, depth and the number of values are capped, which also stops alias bombs.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, ReusedAnchorWarning, YAMLError
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from fastpref.errors import ConfigError, Problem

MAX_BYTES = 64 * 2**10
MAX_VALUES = 10_000
MAX_DEPTH = 20
_MAX_DIGITS = 80  # a 64-bit integer in base 2, with some room
_TOO_MUCH = (
    f"a run file holds at most {MAX_VALUES} values, {MAX_DEPTH} levels deep, "
    "aliases counted as often as they are used; write the settings out"
)
_TAG_PREFIX = "tag:yaml.org,2002:"

KeyPath: TypeAlias = tuple[str | int, ...]


@dataclass(frozen=True, order=True)
class Location:
    """Where a value was given: a line of a file, or (line 0) an override."""

    source: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a run file."""

    where: Location
    problem: Problem
    refused: KeyPath = ()
    """The value that cannot be used because of it; empty where there is none."""


@dataclass
class YamlTree:
    """Plain values (dict, list, str, int, float, bool, None), their locations, and the faults met on the way."""

    root: Location
    values: dict[str, Any] = field(default_factory=dict)
    where: dict[KeyPath, Location] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> YamlTree:
        """Read the mapping in `path`.

        Raises:
            ConfigError: unreadable, too large, no YAML, or not a mapping; smaller faults go to `findings`.
        """
        tree = cls(root=Location(str(path), 1))
        node = _compose(_read_text(path), tree.root)
        if node is None:
            raise ConfigError(f"{path} is empty; a run file needs at least the sections model and data")
        if not isinstance(node, MappingNode):
            raise ConfigError(f"{tree.root}: a run file must be a mapping of sections, as in `model:`, `data:`")
        values = _Converter(tree, str(path)).convert(node, ())
        tree.values = values if isinstance(values, dict) else {}
        return tree

    def apply(self, override: str) -> None:
        """Set one key from `section.key=value`, the value being YAML; what is wrong with it goes to `findings`."""
        shown = override if len(override) <= 60 else override[:57] + "..."
        location = Location(f"override {shown!r}")
        name, equals, text = override.partition("=")
        keys = tuple(name.strip().split("."))
        if not equals or not all(keys):
            text = "must look like section.key=value, as in training.learning_rate=1e-6"
            self.findings.append(Finding(location, Problem("", text)))
            return
        node = _compose(text, location)
        if node is None:
            text = f"has no value; write {name.strip()}=null to unset the key"
            self.findings.append(Finding(location, Problem("", text)))
            return
        parent = self.values
        for depth, key in enumerate(keys[:-1], start=1):
            if parent.get(key) is None:
                parent[key] = {}
                self.where[keys[:depth]] = location
            parent = parent[key]
            if not isinstance(parent, dict):
                self.findings.append(Finding(location, Problem(dotted(keys[:depth]), "is a value and has no keys")))
                return
        for path in [path for path in self.where if path[: len(keys)] == keys]:
            del self.where[path]
        self.where[keys] = location
        parent[keys[-1]] = _Converter(self, location.source, has_lines=False).convert(node, keys)

    def at(self, path: KeyPath) -> Any:
        """Return the value given for `path`."""
        value: Any = self.values
        for step in path:
            value = value[step]
        return value

    def location(self, path: KeyPath) -> Location:
        """Return where `path`, or the nearest thing around it, was given."""
        while path and path not in self.where:
            path = path[:-1]
        return self.where.get(path, self.root)


class _Converter:
    """Turns the nodes of one text into plain values of a tree."""

    def __init__(self, tree: YamlTree, source: str, *, has_lines: bool = True) -> None:
        self.tree, self.source, self.has_lines = tree, source, has_lines
        self.num_values = 0

    def convert(self, node: Node, path: KeyPath) -> Any:
        """Return the value of `node`; None where it is refused, with the problem noted."""
        self.num_values += 1
        if self.num_values > MAX_VALUES or len(path) > MAX_DEPTH:
            raise ConfigError(f"{self._location(node)}: {_TOO_MUCH}")
        tag = (node.tag or "").removeprefix(_TAG_PREFIX)
        if isinstance(node, MappingNode) and tag == "map":
            return self._mapping(node, path)
        if isinstance(node, SequenceNode) and tag == "seq":
            return [self._entry(item, item, (*path, index)) for index, item in enumerate(node.value)]
        try:
            return _scalar(node.value if isinstance(node, ScalarNode) else "", tag)
        except ValueError as error:
            self._note(node, path, str(error), path)
            return None

    def _mapping(self, node: MappingNode, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, ScalarNode) or key.tag != f"{_TAG_PREFIX}str":
                shown = repr(key.value) if isinstance(key, ScalarNode) else "a collection"
                self._note(key, path, f"has a key that is not a string: {shown}; quote it")
            elif _has_lone_surrogate(key.value):
                self._note(key, path, f"has a key that is not valid Unicode: {key.value!r}")
            elif key.value in values:
                first = self.tree.where[(*path, key.value)]
                self._note(key, (*path, key.value), f"was given before, at {first}; keep one of the two")
            else:
                values[key.value] = self._entry(key, value, (*path, key.value))
        return values

    def _entry(self, key: Node, value: Node, path: KeyPath) -> Any:
        self.tree.where[path] = self._location(key)
        return self.convert(value, path)

    def _note(self, node: Node, path: KeyPath, text: str, refused: KeyPath = ()) -> None:
        problem = Problem(dotted(path) or "the file", text)
        self.tree.findings.append(Finding(self._location(node), problem, refused))

    def _location(self, node: Node) -> Location:
        return Location(self.source, node.start_mark.line + 1 if self.has_lines else 0)


def _scalar(text: str, tag: str) -> str | int | float | bool | None:
    """Return the value of a scalar with a resolved tag; raise ValueError with the rule that it breaks."""
    if tag == "null":
        return None
    if tag == "bool" and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if tag == "str":
        if _has_lone_surrogate(text):
            raise ValueError("must be valid Unicode, got a lone surrogate")
        return text
    if tag in ("int", "float"):
        return _number(text, tag)
    if tag == "timestamp":
        raise ValueError(f"must not be a date; quote it if a string is meant: '{text}'")
    raise ValueError(f"must be a plain value, got the YAML tag {tag!r}; remove the tag")


def _has_lone_surrogate(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _number(text: str, tag: str) -> int | float:
    """Return a finite float or an integer of 64 bits."""
    digits = text.replace("_", "").lower()
    base = {"0b": 2, "0o": 8, "0x": 16}.get(digits.lstrip("+-")[:2], 10)
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"must be a number of at most {_MAX_DIGITS} characters, got {len(digits)}")
    try:
        value = float(digits.replace(".inf", "inf").replace(".nan", "nan")) if tag == "float" else int(digits, base)
    except ValueError:
        raise ValueError(f"must be a number, got {text!r}") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"must be finite, got {text}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"must fit a signed 64-bit integer, got {text}")
    return value


def dotted(path: KeyPath) -> str:
    """`("loss", "loss_weights", 1)` as `loss.loss_weights[1]`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def _read_text(path: Path) -> str:
    try:
        if not path.is_file():
            kind = "is not a regular file" if path.exists() else "does not exist"
            raise ConfigError(f"the run file {path} {kind} (current directory: {Path.cwd()})")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ConfigError(f"{path} is larger than {MAX_BYTES} bytes; that is no run file")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"{path}:{line}: not UTF-8 (byte {data[error.start]:#04x}); save the file as UTF-8"
        ) from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error


def _compose(text: str, root: Location) -> Node | None:
    """Return the node graph of `text`, None where it holds no value."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", ReusedAnchorWarning)
            _check_depth(text, root)
            return YAML(typ="safe", pure=True).compose(text)
    except ConfigError:  # a ValueError, which has its place already
        raise
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark is not None and root.line else root.line
        _fail(Location(root.source, line), f"not valid YAML: {error.problem or error.context}", error)
    # OverflowError, ValueError: an escape such as "\UFFFFFFFF", beyond the last character there is
    except (YAMLError, ReusedAnchorWarning, OverflowError, ValueError) as error:
        _fail(root, f"not valid YAML: {str(error).strip().splitlines()[0]}", error)


def _check_depth(text: str, root: Location) -> None:
    """Refuse deep nesting by the parser's flat events: building nodes recurses, and fails late after much work."""
    depth = 0
    for event in YAML(typ="safe", pure=True).parse(text):
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if depth > MAX_DEPTH + 1:  # values of the last level are counted when they are converted
            line = event.start_mark.line + 1 if root.line else root.line
            raise ConfigError(f"{Location(root.source, line)}: {_TOO_MUCH}")


def _fail(where: Location, text: str, cause: Exception) -> NoReturn:
    raise ConfigError(f"{where}: {text}") from cause
