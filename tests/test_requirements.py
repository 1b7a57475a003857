"""Versions that several files name are the same in all of them: extras, pins, constraints, the Makefile, the code."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from fastpref.run.plan import software

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]
STUB = [Requirement(line) for line in PROJECT["dependency-groups"]["te-stub"]]
CONSTRAINTS = {
    requirement.name: requirement.specifier
    for line in (ROOT / "requirements" / "gpu-constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
    for requirement in [Requirement(line)]
}


def test_stub_is_pinned_and_kept_out_of_environments() -> None:
    assert all(str(requirement.specifier).startswith("==") for requirement in STUB)
    installed = {Requirement(line).name for extra in ("dev", "megatron", "hf") for line in EXTRAS[extra]}
    assert "transformer-engine" not in installed


def test_makefile_unpacks_what_is_pinned() -> None:
    """It may also unpack an older Transformer Engine, but nothing newer and no other release of what that needs."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    pins = {requirement.name: str(requirement.specifier).removeprefix("==") for requirement in STUB}
    engines = re.findall(r"^TE_(?:VERSION|OLDEST|NEWEST) [:?]?= ([\d.]+)$", makefile, flags=re.MULTILINE)
    assert max(map(Version, engines)) == Version(pins.pop("transformer-engine"))
    assert min(map(Version, engines)) >= software.ENGINE_FLOOR
    assert dict(re.findall(rf"\b({'|'.join(pins)})==([\d.]+)", makefile)) == pins


def test_code_names_the_versions_that_are_tried() -> None:
    pins = {requirement.name: requirement.specifier for requirement in STUB}
    assert software.ENGINE_TRIED in pins["transformer-engine"]
    (next_megatron,) = re.findall(r"^NEXT_VERSION := (\S+)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert Version(next_megatron) == software.MEGATRON_TRIED
    (floor,) = [Requirement(line) for line in EXTRAS["megatron"] if line.startswith("megatron-core")]
    assert str(floor.specifier) == f">={software.MEGATRON_FLOOR}"
    assert software.MEGATRON_FLOOR in CONSTRAINTS["megatron-core"]
    assert software.MEGATRON_TRIED in CONSTRAINTS["megatron-core"]


@pytest.mark.parametrize("cuda", ["12", "13"])
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_extras_of_transformer_engine_fit_their_python(cuda: str, python: str) -> None:
    """Python 3.11 has no newer Megatron-Core than 0.16.1, which declares the end of the range."""
    requirements = [Requirement(line) for line in EXTRAS[f"te-cu{cuda}"]]
    environment = {"python_version": python}
    (one,) = [found for found in requirements if found.marker is None or found.marker.evaluate(environment)]
    assert one.extras == {"pytorch", f"core_cu{cuda}"}
    newest = Version("2.11.0") if python == "3.11" else software.ENGINE_TRIED
    assert newest in one.specifier and software.ENGINE_TRIED in CONSTRAINTS["transformer-engine"]
    assert (Version("2.12.0") in one.specifier) == (python != "3.11")
    assert Version("2.20.3") not in one.specifier and software.ENGINE_FLOOR not in one.specifier


@pytest.mark.parametrize("is_stale", [True, False])
def test_make_unpacks_anew_what_an_older_makefile_unpacked(tmp_path: Path, is_stale: bool) -> None:
    """Otherwise a package that is added to the list stays away from environments that were there before."""
    engines = [tmp_path / f"transformer-engine-{name}" for name in ("needs", "2.9.0", str(software.ENGINE_TRIED))]
    for folder in (*engines, tmp_path / f"megatron-{software.MEGATRON_TRIED}"):
        folder.mkdir()
    (tmp_path / ".fastpref-ready").touch()
    if is_stale:
        os.utime(engines[0], (0, 0))
    plan = subprocess.run(
        ["make", "-n", "test-te", f"VENV={tmp_path}"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert ("einops==" in plan) == is_stale
    assert "transformer-engine==" not in plan and plan.count("--te-version") == 3
