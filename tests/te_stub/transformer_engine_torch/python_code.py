"""The Python code of the Transformer Engine that is installed, as text."""

import functools
import re
from importlib.util import find_spec
from pathlib import Path


@functools.cache
def python_code() -> str:
    """All of its modules for torch, one after another; empty where there are none."""
    spec = find_spec("transformer_engine")
    if spec is None or spec.origin is None:
        return ""
    modules = sorted((Path(spec.origin).parent / "pytorch").rglob("*.py"))
    return "\n".join(path.read_text(encoding="utf-8") for path in modules)


def names_asked_for() -> set[str]:
    """What it takes out of the extension."""
    names = set(re.findall(r"\btex\.([A-Za-z]\w*)", python_code()))
    imports = re.findall(r"from transformer_engine_torch import (?:([^(\n]+)|\(([^)]+)\))", python_code())
    for one_line, lines in imports:
        names.update(re.findall(r"[A-Za-z]\w*", re.sub(r"#.*|\bas \w+", "", one_line or lines)))
    return names
