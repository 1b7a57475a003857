"""Who imports whom in the package, read from its source: at any depth of nesting, for types too."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "fastpref"
MODULES = sorted(PACKAGE.rglob("*.py"))


def imported_names(path: Path, package: Path = PACKAGE) -> list[str]:
    """Absolute dotted names of everything that a module imports."""
    names = []
    parents = (package.name, *path.relative_to(package).with_suffix("").parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            names += [f"{module}.{alias.name}" for alias in node.names]
    return names


def import_graph(package: Path = PACKAGE) -> dict[str, set[str]]:
    """Modules of a package by dotted name, with the modules of it that each imports."""
    paths = {_dotted(path, package): path for path in sorted(package.rglob("*.py"))}
    graph: dict[str, set[str]] = {}
    for name, path in paths.items():
        found = {_module_of(imported, paths) for imported in imported_names(path, package)}
        graph[name] = found - {name, ""}
    return graph


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other (Tarjan's strongly connected components of more than one module)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    path: list[str] = []

    def visit(module: str) -> Iterator[list[str]]:
        index[module] = low[module] = len(index)
        path.append(module)
        for other in sorted(graph[module]):
            if other not in index:
                yield from visit(other)
                low[module] = min(low[module], low[other])
            elif other in path:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            start = path.index(module)
            group, path[start:] = path[start:], []
            if len(group) > 1:
                yield sorted(group)

    return [circle for module in graph if module not in index for circle in visit(module)]


def _dotted(path: Path, package: Path) -> str:
    parts = (package.name, *path.relative_to(package).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _module_of(name: str, modules: Mapping[str, Path]) -> str:
    """The module that an imported name is or lies in; empty for another package's."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name
