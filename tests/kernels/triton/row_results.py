"""How a compiled kernel makes the results of a row, from the compiler's last code that still has layouts.

Two kernels that make a result by the same operations in the same order, with the same layouts where lanes and warps
meet, make the same bits of it. Data may move between layouts meanwhile, and what is done element by element may be
done in any.
"""

import hashlib
import re

DEFINITION = re.compile(r"^\s*(%[\w.]+(?:, %[\w.]+)*)(?::\d+)? = (.*)$")
KIND = re.compile(r"\"?([\w.]+)")
LOCATION = re.compile(r" loc\((?:[^()]|\([^()]*\))*\)")
ALIAS = re.compile(r"^(#\w+) = (.*)$")
VALUE = re.compile(r"%[\w.]+(?:@\d+)?(?:#\d+)?")
# Where numbers of different columns meet, or are put beside each other, their layout decides about the order.
MEETS = ("tt.reduce", "tt.reshape", "ttng.warp_group_dot", "tt.dot")


class Code:
    """The operations of a kernel by the values that they define."""

    def __init__(self, ttgir: str) -> None:
        self.aliases: dict[str, str] = {}
        self.operations: dict[str, str] = {}
        self.yields: dict[str, list[list[str]]] = {}
        self.stores: list[list[str]] = []
        self.products: set[str] = set()
        self._digests: dict[str, str] = {}
        # A name may stand for another value in the next region; so each gets the number of its line.
        self._scopes: list[dict[str, str]] = [{}]
        self._owners: list[str | None] = []
        for number, line in enumerate(ttgir.splitlines()):
            self._read(number, LOCATION.sub("", line))

    def _read(self, number: int, line: str) -> None:
        if alias := ALIAS.match(line):
            self.aliases[alias[1]] = alias[2]
            return
        text, ended = line.strip(), None
        if text.startswith("}"):
            self._scopes.pop()
            ended = self._owners.pop()
        definition = DEFINITION.match(line)
        body = VALUE.sub(self._unique, definition[2] if definition else text)
        names = definition[1].split(", ") if definition else []
        name = f"{names[0]}@{number}" if definition else ended
        for place, result in enumerate(names):
            self._scopes[-1][result] = f"{result}@{number}"
            self.operations[f"{result}@{number}"] = f"{body} [{place}]" if place else body
        if definition:
            if body.split(" ")[0] in ("ttng.warp_group_dot", "tt.dot"):
                self.products.add(self.expand(body.split(" : ", 1)[1]))
            owner = self._owners[-1] if self._owners else None
            if owner and self.operations[owner].startswith('"tt.reduce"'):
                self.operations[owner] += f" {body.split(' ')[0]}"  # what combines two numbers
        elif ended:
            self.operations[ended] += f" {text}" if text.startswith("})") else ""
        if text.startswith("tt.store"):
            self.stores.append(VALUE.findall(body))
        if text.startswith("scf.yield") and self._owners[-1]:
            self.yields.setdefault(self._owners[-1], []).append(VALUE.findall(body))
        if text.endswith("{"):
            self._owners.append(name)
            self._scopes.append({})

    def _unique(self, match: re.Match[str]) -> str:
        name, mark, place = match[0].partition("#")
        found = next((scope[name] for scope in reversed(self._scopes) if name in scope), name)
        return found + mark + place

    def expand(self, text: str) -> str:
        """Write layouts out in place of their names."""
        return re.sub(r"#\w+", lambda match: self.aliases.get(match[0], match[0]), text)

    def root(self, value: str) -> str:
        """Return the argument that an address is made from."""
        while operands := VALUE.findall(self.operations.get(value, "")):
            value = operands[0]
        return value

    def digest(self, value: str) -> str:
        """Return a digest of all that a value is made by, back to the product, loads and arguments."""
        if value not in self._digests:
            self._digests[value] = "recursion"
            self._digests[value] = hashlib.sha256(self._describe(value).encode()).hexdigest()[:16]
        return self._digests[value]

    def _describe(self, value: str) -> str:
        name, _, place = value.partition("#")
        operation = self.operations.get(name)
        if operation is None:
            return "argument"
        kind = KIND.match(operation)[1]
        if kind == "ttg.convert_layout":
            return self.digest(VALUE.findall(operation)[0])
        if kind in ("scf.for", "tt.load", "ttng.warp_group_dot_wait", "ttg.local_load"):
            return kind
        if kind == "scf.if":
            ways = [self.digest(way[int(place or 0)]) for way in self.yields[name]]
            return f"{kind} {ways}"
        parts = [self.digest(part) for part in VALUE.findall(operation)]
        text = VALUE.sub("%", operation)
        return f"{self.expand(text) if kind in MEETS else text.split(' : ')[0]} {parts}"


def row_results(ttgir: str) -> dict[str, list[str]]:
    """Return digests of what a forward kernel stores of its rows, by argument: `parts_ptr`, `targets_ptr`."""
    code = Code(ttgir)
    found: dict[str, list[str]] = {}
    for address, value, *_ in code.stores:
        found.setdefault(code.root(address).removeprefix("%"), []).append(code.digest(value))
    return {name: found[name] for name in ("parts_ptr", "targets_ptr")}


def product_layouts(ttgir: str) -> set[str]:
    """Return the types of the operands and results of the matrix products, layouts written out."""
    return Code(ttgir).products
