"""Values of Arrow columns as the JSON that they were made from.

Arrow's own types do not say all: `datasets` describes its types in the metadata of a schema, and JSON whose objects
differ from row to row is stored as text, or as structs that have the members of all rows. Imports pyarrow.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pyarrow

from fastpref.data import strict_json

Decode = Callable[[Any], Any]
"""Takes a value of `to_pylist`, not None; raises ValueError with the reason where it has no form in JSON."""

_MEDIA = ("Image", "Audio", "Video", "Pdf", "Nifti", "Mesh")


def decoders(schema: Any) -> dict[str, Decode]:
    """Return for each column how its values are decoded; a value None is absent and needs none.

    Args:
        schema: a `pyarrow.Schema`.
    """
    features = _features(schema)
    return {field.name: _decoder(field, features.get(field.name)) for field in schema}


def media_columns(schema: Any) -> set[str]:
    """Return the columns that hold a media type of `datasets`, at any depth."""
    return {name for name, feature in _features(schema).items() if _has_media(feature)}


def _features(schema: Any) -> dict[str, Any]:
    """The types of `datasets` by column; none where the metadata are of another form."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def _decoder(field: Any, feature: Any) -> Decode:
    types, kind, type_name = pyarrow.types, field.type, _type_name(feature)
    if type_name in _MEDIA:
        return _refuse_media
    if _is_json(field, type_name):
        return _from_json
    if isinstance(kind, pyarrow.BaseExtensionType):
        kind = kind.storage_type
    if types.is_struct(kind):
        return partial(_from_struct, {child.name: _decoder(child, _member(feature, child.name)) for child in kind})
    if types.is_map(kind):
        return partial(_from_map, _decoder(kind.item_field, None))
    if hasattr(kind, "value_field"):  # every kind of list
        return partial(_from_list, _decoder(kind.value_field, _element(feature)))
    if type_name == "ClassLabel" and types.is_integer(kind) and isinstance(feature.get("names"), list):
        return partial(_from_label, feature["names"])
    return _as_is


def _is_json(field: Any, type_name: str) -> bool:
    kind = field.type
    # A version of Arrow that does not know the type leaves its name in the metadata of the field.
    name = getattr(kind, "extension_name", None) or (field.metadata or {}).get(b"ARROW:extension:name", b"").decode(
        errors="replace"
    )
    if name == "arrow.json":
        return True
    types = pyarrow.types
    return type_name == "Json" and (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _type_name(feature: Any) -> str:
    name = feature.get("_type") if isinstance(feature, dict) else None
    return name if isinstance(name, str) else ""


def _member(feature: Any, name: str) -> Any:
    """Type of a struct's member; a `Sequence` of objects is stored as an object of lists."""
    if not isinstance(feature, dict):
        return None
    if _type_name(feature) == "Sequence" and isinstance(feature.get("feature"), dict):
        return {"_type": "List", "feature": feature["feature"].get(name)}
    return feature.get(name)


def _element(feature: Any) -> Any:
    if isinstance(feature, list):  # an older way to write a list
        return feature[0] if feature else None
    return feature.get("feature") if _type_name(feature) else None


def _has_media(feature: Any) -> bool:
    if _type_name(feature) in _MEDIA:
        return True
    children = feature.values() if isinstance(feature, dict) else feature if isinstance(feature, list) else ()
    return any(map(_has_media, children))


def _as_is(value: Any) -> Any:
    return value


def _from_json(text: Any) -> Any:
    if not isinstance(text, str):
        raise ValueError(f"JSON must be stored as text, got a {type(text).__name__}")
    return strict_json.parse_text(text)


def _from_struct(members: Mapping[str, Decode], value: Any) -> Any:
    # A null stands for a member that other rows have.
    return {name: members[name](item) for name, item in value.items() if item is not None}


def _from_list(element: Decode, value: Any) -> Any:
    return [None if item is None else element(item) for item in value]


def _from_map(item_of: Decode, value: Any) -> Any:
    decoded: dict[Any, Any] = {}
    for key, item in value:
        if key in decoded:
            raise ValueError(f"key {key!r} occurs twice in one map")
        decoded[key] = None if item is None else item_of(item)
    return decoded


def _from_label(names: list[Any], value: Any) -> Any:
    if value == -1:  # no label
        return None
    if not 0 <= value < len(names):
        raise ValueError(f"label {value} is none of the {len(names)} that the column has names for")
    return names[value]


def _refuse_media(value: Any) -> Any:
    raise ValueError(
        "an image, sound or other medium, but pairs are text only; remove the column, or name it in `ignored_fields`"
    )
