"""What Triton calls the entries of its cache, for the build in a folder or a wheel that this Python cannot import.

An entry is a folder named by a hash of five things: Triton's own files (its compiler's sources and its library), the
kernel with its specialisation, the version of ptxas and the architecture, the options, the environment. The first
alone belongs to a build; the others are the same for every build of one version.
"""

from __future__ import annotations

import base64
import hashlib
import inspect
import re
import zipfile
from collections.abc import Iterator
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import NamedTuple

LIBRARY = "_C/libtriton.so"
CHUNK_BYTES = 2**20


class Build(NamedTuple):
    """A build of Triton, as its cache sees it.

    Attributes:
        version: as "3.6.0".
        files: SHA-256 by path below `triton/`, in the order in which they enter the key.
    """

    version: str
    files: dict[str, str]

    @property
    def key(self) -> str:
        """What `triton.runtime.cache.triton_key` returns there."""
        return self.version + "-".join(self.files.values())

    def differences(self, other: Build) -> list[str]:
        """Return the files, and "version", in which two builds differ."""
        names = dict.fromkeys([*self.files, *other.files])
        found = [name for name in names if self.files.get(name) != other.files.get(name)]
        return (["version"] if self.version != other.version else []) + found


def build_at(place: Path) -> Build:
    """Read a build.

    Args:
        place: a wheel, or the folder that holds `triton/`.

    Raises:
        FileNotFoundError: no Triton is there.
    """
    root: Traversable = zipfile.Path(place) if place.suffix == ".whl" else place
    triton = root / "triton"
    if not (triton / "__init__.py").is_file():
        raise FileNotFoundError(f"{place} holds no triton/__init__.py; give a wheel of Triton or the folder above it")
    version = re.search(r"__version__ = ['\"]([^'\"]+)", (triton / "__init__.py").read_text(encoding="utf-8"))
    assert version, f"{place}: triton/__init__.py names no version"
    files = {"runtime/cache.py": _sha256(triton / "runtime" / "cache.py")}
    for package in ("compiler", "backends"):
        files |= dict(_modules(triton / package, package))
    files[LIBRARY] = _sha256(triton / LIBRARY)
    files |= dict(_modules(triton / "language", "language"))
    return Build(version[1], files)


def entry_name(build_key: str, source: str, backend: str, options: str, environment: str) -> str:
    """Return the name of an entry's folder.

    Args:
        build_key: `Build.key`.
        source: hash of kernel, signature and specialisation.
        backend: version of ptxas and architecture, as Triton writes them.
        options: hash of warps, stages and the like.
        environment: the variables that enter, as Triton writes them.
    """
    key = f"{build_key}-{source}-{backend}-{options}-{environment}"
    digest = hashlib.sha256(key.encode("utf-8")).digest()
    return base64.b32encode(digest).decode("ascii").rstrip("=")


def _modules(package: Traversable, path: str) -> Iterator[tuple[str, str]]:
    """Yield (path, SHA-256) of every module below a package, in the order of `pkgutil.walk_packages`."""
    seen = set()
    for each in sorted(package.iterdir(), key=lambda each: each.name):
        name = inspect.getmodulename(each.name)
        if each.is_dir() and "." not in each.name and (each / "__init__.py").is_file():
            yield f"{path}/{each.name}/__init__.py", _sha256(each / "__init__.py")
            yield from _modules(each, f"{path}/{each.name}")
        elif not each.is_dir() and name not in (None, "__init__") and name not in seen:
            seen.add(name)
            yield f"{path}/{each.name}", _sha256(each)


def _sha256(file: Traversable) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
