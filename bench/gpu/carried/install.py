"""Put a carried cache where the Triton of this machine looks for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from bench.gpu.carried.fill import installed_build, read_manifest
from bench.gpu.carried.keys import Build, entry_name
from bench.measure import Row

GROUP = "__grp__"


def install(carried: Path, target: Path) -> Row:
    """Copy the entries of a carried cache, under the names that this machine's Triton gives them.

    A build of the same version whose library alone is another one compiles the same sources, so its entries are those
    of the carried build under other names. Files of an entry name each other by absolute paths, which are written anew.

    Args:
        carried: filled by `python -m bench gpu-cache`.
        target: what TRITON_CACHE_DIR names.

    Returns:
        A row: how many entries, and for which build; "missing" with the reason where the cache cannot be used.
    """
    manifest = read_manifest(carried)
    if not manifest["entries"]:
        return {
            "status": "missing",
            "reason": f"{carried} holds no cache; fill it with: python -m bench gpu-cache {carried}",
        }
    try:
        here = installed_build()
    except (ImportError, RuntimeError, FileNotFoundError) as error:
        return {"status": "missing", "reason": f"{type(error).__name__}: {error}"}
    other = here.differences(Build(manifest["version"], manifest["files"]))
    if [name for name in other if not name.startswith("_C/")]:
        found = f"the cache is for Triton {manifest['version']}, here is {here.version}"
        return {
            "status": "missing",
            "reason": f"{found}, which differs in {', '.join(other[:3])}; kernels are compiled here",
        }
    for name, entry in manifest["entries"].items():
        parts = {part: entry[part] for part in ("source", "backend", "options", "environment")}
        _copy(carried / name, target / entry_name(here.key, **parts))
    row: Row = {"status": "ok", "entries": len(manifest["entries"]), "triton": here.version}
    return row | ({"reason": "for another build of the same version: its library differs"} if other else {})


def _copy(source: Path, target: Path) -> None:
    """Copy one entry; its index is written last, as Triton takes what the index names for complete."""
    target.mkdir(parents=True, exist_ok=True)
    indices = []
    for file in sorted(source.iterdir()):
        if file.name.startswith(GROUP):
            indices.append(file)
        elif file.is_file() and not (target / file.name).exists():
            shutil.copyfile(file, target / file.name)
    for file in indices:
        names = json.loads(file.read_text(encoding="utf-8"))["child_paths"]
        paths = {name: str(target / name) for name in names if (target / name).exists()}
        (target / file.name).write_text(json.dumps({"child_paths": paths}), encoding="utf-8")
