"""Compile kernel variants into a Triton cache for a device that is not here."""

from __future__ import annotations

import importlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from bench.gpu.carried.keys import Build, build_at, entry_name

MANIFEST = "manifest.json"
Entry = dict[str, Any]


def installed_build() -> Build:
    """Return the build of Triton that this Python imports; its key is checked against Triton's own.

    Raises:
        RuntimeError: this version of Triton makes its key in another way.
    """
    import triton
    from triton.runtime.cache import triton_key

    build = build_at(Path(triton.__file__).parents[1])
    if build.key != triton_key():
        raise RuntimeError(
            f"Triton {triton.__version__} makes the key of its cache in a way that bench.gpu.carried.keys "
            "does not know; fill the cache with 3.6 to 3.9"
        )
    return build


def target_build(wheel: Path | None) -> Build:
    """Return the build that the cache is for: that of a wheel, or the one that is installed here.

    Raises:
        ValueError: the wheel's compiler is not the one that is installed here, whose output it would not be.
    """
    here = installed_build()
    if wheel is None:
        return here
    build = build_at(wheel)
    # The library is compiled for one version of Python; its sources are those of the version.
    other = [name for name in build.differences(here) if not name.startswith("_C/")]
    if other:
        raise ValueError(
            f"{wheel.name} is Triton {build.version}, here is {here.version}, and they differ in {', '.join(other[:3])}"
            f"; put that Triton in front: pip install --no-deps --target DIR triton=={build.version}; PYTHONPATH=DIR"
        )
    return build


def fill(cache: Path, variants: Mapping[str, str], build: Build, processes: int) -> Iterator[Entry]:
    """Compile what is not there yet, and yield each entry as it is done; `error` where one cannot be compiled.

    Args:
        cache: the folder; `MANIFEST` in it says what is there.
        variants: origin by specialisation; in this order.
        build: of the target.
        processes: at once.
    """
    cache.mkdir(parents=True, exist_ok=True)
    entries = read_manifest(cache)["entries"]
    done = {entry["specialization"] for name, entry in entries.items() if (cache / name).is_dir()}
    wanted = [text for text in variants if text not in done]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        pending = {pool.submit(_compile, str(cache), text, build.key): text for text in wanted}
        for future in as_completed(pending):
            text = pending[future]
            try:
                name, parts, seconds = future.result()
            except Exception as error:  # a tile that no device could run either, say; the others are still wanted
                yield {"specialization": text, "origin": variants[text], "error": f"{type(error).__name__}: {error}"}
                continue
            entries[name] = {"specialization": text, "origin": variants[text], "seconds": seconds, **parts}
            _write_manifest(cache, build, entries)
            yield entries[name] | {"name": name}


def read_manifest(cache: Path) -> dict[str, Any]:
    """Return what a folder says it holds; nothing where it is new."""
    file = cache / MANIFEST
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"entries": {}}


def _write_manifest(cache: Path, build: Build, entries: Mapping[str, Entry]) -> None:
    content = {"version": build.version, "files": build.files, "entries": entries}
    partial = cache / f"{MANIFEST}.tmp"
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(cache / MANIFEST)


def _compile(cache: str, specialization: str, build_key: str) -> tuple[str, dict[str, str], float]:
    """Compile one variant in this process: the name of its entry, the other parts of its key, seconds."""
    os.environ |= {"TRITON_CACHE_DIR": cache, "TRITON_STORE_BINARY_ONLY": "1"}
    os.environ.pop("TRITON_INTERPRET", None)
    from triton.compiler import compiler
    from triton.runtime import cache as runtime_cache
    from triton.runtime import driver

    from bench.gpu.carried.record import HopperDriver

    parts: dict[str, str] = {}

    def cache_key(source: Any, backend: Any, options: Any, env_vars: Mapping[str, str]) -> str:
        parts.update(
            source=source.hash(),
            backend=backend.hash(),
            options=options.hash(),
            environment=str(sorted(env_vars.items())),
        )
        return original(source, backend, options, env_vars)

    original, start = runtime_cache.get_cache_key, time.monotonic()
    compiler.get_cache_key, runtime_cache.triton_key = cache_key, lambda: build_key
    driver.set_active(HopperDriver())
    try:
        module, name = json.loads(specialization)["name"].rsplit(".", 1)
        getattr(importlib.import_module(module), name).preload(specialization)
    finally:
        compiler.get_cache_key = original
    entry = entry_name(build_key, **parts)
    assert (Path(cache) / entry).is_dir(), f"Triton did not put {name} where its key says"
    for file in (Path(cache) / entry).glob("*.source"):
        file.unlink()  # for readers; the index may name what is not there
    return entry, parts, round(time.monotonic() - start, 1)


def limited(variants: Mapping[str, str], match: str, most: int | None, names: Sequence[str]) -> dict[str, str]:
    """Return the variants whose origin or name contains a text, at most so many of them."""
    chosen = [text for text, name in zip(variants, names, strict=True) if match in variants[text] or match in name]
    return {text: variants[text] for text in chosen[:most]}
