"""Damage to documents that leaves most of their structure whole: what random bytes alone would hardly ever reach."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from random import Random
from typing import Any

DEEP = 3000
# Values that a parser takes in and a checker may trip over, as JSON text.
ODD_JSON = (
    *(
        "null",
        "true",
        "-1",
        "0",
        "0.5",
        "-0.0",
        "1e308",
        "1e999",
        "-1e-999",
        "NaN",
        "-Infinity",
        "9" * 4000,
        "1" * 5000,
    ),
    *("9223372036854775807", "9223372036854775808", "18446744073709551616", "340282366920938463463374607431768211456"),
    *('""', '"\\ud800"', '"\\udc00\\ud800"', '"\\u0000"', '"../x"', '"/etc/passwd"', '"~"', '"1"', '" "'),
    *('"\\u2028\\u0085"', '"' + "x" * 5000 + '"', "[]", "{}", "[[]]", "[null]", '[""]', '{"":{"":{}}}'),
    *("[" * 40 + "]" * 40, "[" * 900 + "]" * 900, '{"a":' * 900 + "0" + "}" * 900, "[" * DEEP + "]" * DEEP),
)
ODD_KEYS = ("", "\ud800", "\0", "x" * 300, "..", "../x", "a/b", "__class__", "\u2028", ".")
ODD_YAML = (
    *("", "~", "on", "no", "1e-5", "1_0", "0x_", "0xg", "0o8", "0b2", "1:30:00", ".inf", "-.nan", "+.INF", "=", "<<"),
    *("2001-12-14t21:59:43.10-05:00", "&a [*a]", "&a x", "*a", "*b", "|", ">-", "|9", "'", '"', '"\\ud800"', '"\\x"'),
    *('"\\UFFFFFFFF"', '"\\U00110000"', '"\\u00"', "? a", "- - -", "[[[[", "]]", "{{", "{a: 1, a: 2}", "[a: b, c]"),
    *("!!python/object/apply:os.system [x]", "!!int x", "!!float 1e400", "!!bool maybe", "!!null x", "!!str &x y"),
    *("!!timestamp 1", "!!binary x", "!!set {a}", "!!omap [a: 1]", "!!merge x", "!<tag:x> y", "! x", "!e!x y", "!<"),
    *("99999999999999999999", "0x" + "f" * 40, "1" * 5000, "[" * 40 + "]" * 40, "[" * DEEP, "{<<: {a: 1}}", "# x"),
    *("\u2028x", "\ufeffx", "\x85x", "\tx", "%YAML 1.1\n---\nx", "%TAG ! x\n---\n! y", "---\n---", "...", "x\n...\ny"),
)
ODD_BYTES = (
    b"\0",
    b"\xff",
    b"\xed\xa0\x80",
    b"\xef\xbb\xbf",
    b"\r",
    b"\n",
    b"\\ud800",
    b"\x1f\x8b",
    b"\xff\xff\xff\x7f",
)


class Members(list):
    """A JSON object as its list of [key, value], so that keys can come twice."""


class Text(str):
    """JSON text that is written as it is."""


def damage(kind: str, content: bytes, random: Random) -> bytes:
    """`content` after one to three changes, most of them in terms of its `kind`: json, jsonl, yaml, safetensors, ..."""
    change = {"json": _json, "jsonl": _jsonl, "yaml": _yaml, "safetensors": _safetensors}.get(kind, _bytes)
    for _ in range(random.randint(1, 3)):
        chosen: Callable[[bytes, Random], bytes] = _bytes if random.random() < 0.2 else change
        try:
            content = chosen(content, random)
        except (ValueError, OverflowError, RecursionError):  # no longer of its kind
            content = _bytes(content, random)
    return content


def _bytes(content: bytes, random: Random) -> bytes:
    start = random.randrange(len(content) + 1)
    stop = min(len(content), start + random.choice((1, 1, 4, 8, 64)))
    cut = content[start:stop]
    flipped = bytes([cut[0] ^ 1 << random.randrange(8)]) + cut[1:] if cut else b""
    new = random.choice((b"", flipped, cut * 2, cut[::-1], b"\0" * len(cut), b"\xff" * len(cut), *ODD_BYTES))
    return content[:start] if random.random() < 0.1 else content[:start] + new + content[stop:]


def _json(content: bytes, random: Random) -> bytes:
    tree = json.loads(content, object_pairs_hook=lambda pairs: Members(map(list, pairs)))
    slots = list(_slots([tree]))
    holder, index = random.choice(slots)
    if isinstance(holder, Members):
        member = holder[index]
        other_holder, other_index = random.choice(slots)
        other = other_holder[other_index]
        change = random.randrange(6)
        if change == 0:
            del holder[index]
        elif change == 1:
            holder.insert(random.randrange(len(holder) + 1), list(member))
        elif change == 2:
            keys = [key for slot, number in slots if isinstance(slot, Members) for key in [slot[number][0]]]
            member[0] = random.choice((*ODD_KEYS, *keys))
        elif change == 3:
            member[1] = other[1] if isinstance(other_holder, Members) else other
        else:
            member[1] = _odd(member[1], random)
    elif random.random() < 0.2:
        del holder[index]
    else:
        holder[index] = _odd(holder[index], random)
    return _emit(tree).encode("utf-8", "surrogatepass")


def _slots(holder: list) -> Any:
    for index, item in enumerate(holder):
        yield holder, index
        value = item[1] if isinstance(holder, Members) else item
        if isinstance(value, list):
            yield from _slots(value)


def _odd(value: Any, random: Random) -> Any:
    if isinstance(value, str) and random.random() < 0.3:
        return value + random.choice(("\ud800", "\0", "\u2028", " ", "/../x", "\x7f"))
    if type(value) is int and random.random() < 0.5:
        return random.choice((value + 1, value - 1, -value, value * 2**32, 2**64 - value, float(value)))
    return [value] if random.random() < 0.1 else Text(random.choice(ODD_JSON))


def _emit(node: Any) -> str:
    if isinstance(node, Text):
        return str(node)
    if isinstance(node, Members):
        return "{" + ",".join(f"{json.dumps(key)}:{_emit(value)}" for key, value in node) + "}"
    if isinstance(node, list):
        return "[" + ",".join(map(_emit, node)) + "]"
    return json.dumps(node)


def _jsonl(content: bytes, random: Random) -> bytes:
    lines = content.splitlines(keepends=True)
    index = random.randrange(len(lines))
    lines[index] = _json(lines[index], random) + b"\n"
    return b"".join(lines)


def _yaml(content: bytes, random: Random) -> bytes:
    lines = content.decode().split("\n")
    index = random.randrange(len(lines))
    line, other, odd = lines[index], random.choice(lines), random.choice(ODD_YAML)
    place = random.randrange(len(line) + 1)
    changed = random.choice(
        (
            [],
            [line, line],
            [other],
            [f" {line}"],
            [line[1:]],
            [re.sub(r": .*", lambda _: f": {odd}", line)],
            [re.sub(r"[^ :]*:", lambda _: f"{odd}:", line)],
            [re.sub(r": .*", lambda _: ": " + random.choice(ODD_JSON), line)],
            [line[:place] + odd + line[place:]],
            [odd, line],
        )
    )
    lines[index : index + 1] = changed
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _safetensors(content: bytes, random: Random) -> bytes:
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    change = random.randrange(5)
    if change == 0:
        data = _bytes(data, random)
    else:
        header = _json(header, random)
    stated = len(header)
    if change == 1:
        stated = random.choice((0, stated - 1, stated + 1, stated + len(data) + 1, 2**31, 2**32, 2**63, 2**64 - 1))
    return (stated % 2**64).to_bytes(8, "little") + header + data
