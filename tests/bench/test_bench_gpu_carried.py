"""What is carried to a GPU: the keys of a Triton cache, its filling without a GPU, and what it all weighs."""

import zipfile
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")

from bench.gpu.carried.keys import LIBRARY, Build, build_at  # noqa: E402

INSTALLED = Path(triton.__file__).parents[1]


def test_build_at_has_the_key_of_triton_itself() -> None:
    from triton.runtime.cache import triton_key

    build = build_at(INSTALLED)
    assert build.key == triton_key() and build.version == triton.__version__


def test_build_at_reads_a_wheel_like_a_folder_and_sees_one_other_file(tmp_path: Path) -> None:
    """Sub-packages, modules beside packages of the same first letters, and what is no module."""
    files = {
        "__init__.py": "__version__ = '1.2.3'\n",
        "runtime/cache.py": "a",
        "compiler/__init__.py": "",
        "compiler/code.py": "b",
        "backends/__init__.py": "",
        "backends/nvidia/__init__.py": "",
        "backends/nvidia/driver.c": "no module",
        "backends/nvidia/driver.py": "c",
        "backends/nvidia/include/cuda.py": "no package",
        "language/__init__.py": "",
        "language/core.py": "d",
        LIBRARY: "e",
    }
    for name, content in files.items():
        file = tmp_path / "triton" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    wheel = tmp_path / "triton-1.2.3-cp312.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in files:
            archive.write(tmp_path / "triton" / name, f"triton/{name}")
    folder = build_at(tmp_path)
    assert build_at(wheel) == folder and list(folder.files) == [
        *("runtime/cache.py", "compiler/code.py", "backends/nvidia/__init__.py", "backends/nvidia/driver.py"),
        *(LIBRARY, "language/core.py"),
    ]
    (tmp_path / "triton" / "language" / "core.py").write_text("other")
    assert build_at(tmp_path).differences(folder) == ["language/core.py"]
    with pytest.raises(FileNotFoundError, match="holds no triton/__init__.py"):
        build_at(tmp_path / "triton")
    assert Build("1", {}).differences(Build("2", {})) == ["version"]
