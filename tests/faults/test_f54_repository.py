"""Fault 54: foreign words, hosts and paths, loose dependencies or a build that needs a network turn the suite red."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("claude", "anthropic", "chatgpt", "copilot", "sub-?agents?")
RULES = {
    "a tool of somebody's workplace": re.compile(rf"\b(?:{'|'.join(TOOLS)})\b", re.IGNORECASE),
    "work that is not done": re.compile(r"\b(?:TODO|FIXME|XXX)\b"),
    "a package registry or mirror": re.compile(
        r"pypi\.org|pythonhosted\.|download\.pytorch\.|pypi\.nvidia\.|anaconda\.(?:org|com)|npmjs\.|crates\.io"
        r"|--(?:extra-)?index-url|--find-links|--trusted-host"
    ),
    "a path of one machine": re.compile(
        r"(?<![\w.~<>$}])/(?:work|home|root|Users|mnt|tmp|opt|scratch|data)/\w|\.\./shared\b|\"shared\" / "
    ),
    "an action that is not pinned to a commit": re.compile(r"\buses:\s*\S+@(?![0-9a-f]{40}\b)"),
    "an image without a version": re.compile(r"\bimage:\s*\S+:latest\b"),
}
# What runs commands for people and for CI.
SCRIPTS = re.compile(r"(?:^|/)(?:Makefile|run|Dockerfile)$|\.(?:sh|sbatch|ya?ml)$")
INSTALL = re.compile(r"\bpip3? (?:install|download)\b.*")


def tracked_files() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a checkout: nobody can say which files belong to the project")
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


def foreign_words(files: Iterable[Path]) -> Iterator[str]:
    """Where a rule is broken, but for this file, which has to spell them out."""
    for file in set(files) - {Path(__file__).resolve()}:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(lines, start=1):
            for what, pattern in RULES.items():
                if found := pattern.search(line):
                    yield f"{file.name}:{number}: {what}: {found[0]}"


def loose_installs(files: Iterable[Path]) -> Iterator[str]:
    """Commands that take whatever version is newest today."""
    for file in files:
        if not SCRIPTS.search(file.as_posix()):
            continue
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            found = INSTALL.search(line)
            if found and " -c " not in found[0] and "==" not in found[0]:
                yield f"{file.name}:{number}: installs without a constraint: {found[0]}"


def requirements_of(pyproject: Path, without: Sequence[str] = ()) -> Iterator[tuple[Requirement, str]]:
    """Every requirement but those of some extras, with what stands behind it on its line."""
    text = pyproject.read_text(encoding="utf-8")
    content = tomllib.loads(text)
    project = content["project"]
    groups = {"build": content["build-system"]["requires"], "": project.get("dependencies", [])}
    groups |= project.get("optional-dependencies", {})
    for group in (group for name, group in groups.items() if name not in without):
        for requirement in group:
            for line in text.splitlines():
                _, found, rest = line.partition(f'"{requirement}"')
                if found:
                    yield Requirement(requirement), rest


def loose_requirements(pyproject: Path) -> Iterator[str]:
    """Dependencies without a floor, or without a reason for it behind them."""
    for requirement, rest in requirements_of(pyproject):
        if requirement.name == "fastpref":
            continue
        if not any(part.operator in (">=", "==", "~=") for part in requirement.specifier):
            yield f"{requirement} has no floor"
        if not re.search(r"#\s*\S", rest):
            yield f"{requirement} has no reason behind it"


def read_constraints(file: Path) -> dict[str, Requirement]:
    lines = (line.split("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines())
    return {canonicalize_name(Requirement(line).name): Requirement(line) for line in lines if line}


def loose_constraints(file: Path) -> Iterator[str]:
    """Constraints that leave one end open."""
    for requirement in read_constraints(file).values():
        operators = {part.operator for part in requirement.specifier}
        if not (operators == {"=="} or operators == {">=", "<"}):
            yield f"{file.name}: {requirement} is neither pinned nor bounded on both sides"


def test_repository_speaks_of_itself_alone() -> None:
    assert sorted(foreign_words(tracked_files())) == []


def test_every_dependency_has_a_floor_and_a_reason() -> None:
    assert list(loose_requirements(ROOT / "pyproject.toml")) == []


def test_every_install_is_constrained() -> None:
    assert list(loose_installs(tracked_files())) == []
    files = sorted((ROOT / "requirements").glob("*.txt"))
    assert len(files) == 2 and [problem for file in files for problem in loose_constraints(file)] == []


def test_pins_meet_the_floors_and_are_complete() -> None:
    """Every dependency of the development set-up is pinned at a version that its dependents accept."""
    pins = read_constraints(ROOT / "requirements" / "cpu-constraints.txt")
    versions = {name: next(iter(pin.specifier)).version for name, pin in pins.items()}
    # what is for GPUs, and the peers of the benchmarks, are not part of it
    for requirement, _ in requirements_of(ROOT / "pyproject.toml", without=("te-cu12", "te-cu13", "bench")):
        name = canonicalize_name(requirement.name)
        if name != "fastpref":
            assert requirement.specifier.contains(versions[name]), f"{requirement}, but the pin is {versions[name]}"
    if metadata.version("torch").split("+")[0] != versions["torch"]:
        pytest.skip("another set-up than the pinned one is installed")
    for name, version in versions.items():
        try:
            installed = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        assert installed.version.split("+")[0] == version, name
        for requirement in map(Requirement, installed.requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                needed = canonicalize_name(requirement.name)
                assert needed in versions, f"{name} needs {requirement}, which is not pinned"
                assert requirement.specifier.contains(versions[needed], prereleases=True), f"{name}: {requirement}"


PLANTED = {
    "notes.md": "Written by Claude.",
    "code.py": "x = 1  # TODO: later",
    "setup.cfg": "https://pypi.org/simple",
    "run.py": 'DATA = "/work/data"',
    "test_x.py": 'GOLDEN = ROOT / "shared" / "golden"',
    "ci.yml": "  - uses: actions/checkout@v4",
    "job.yaml": "  image: torch:latest",
}


@pytest.mark.parametrize("name", PLANTED)
def test_foreign_words_are_found(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(f"fine\n{PLANTED[name]}\n")
    (problem,) = foreign_words([tmp_path / name])
    assert problem.startswith(f"{name}:2: ")


def test_loose_ends_are_found(tmp_path: Path) -> None:
    (tmp_path / "Makefile").write_text("a:\n\tpip install -c pins.txt x\n\t$(BIN)/pip install --quiet x\n")
    assert list(loose_installs([tmp_path / "Makefile"])) == [
        "Makefile:3: installs without a constraint: pip install --quiet x"
    ]
    (tmp_path / "pins.txt").write_text("a==1\nb>=1,<2\nc>=1  # reason\nd\n")
    assert [problem.split()[1] for problem in loose_constraints(tmp_path / "pins.txt")] == ["c>=1", "d"]
    (tmp_path / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["s>=1"] # why\n[project]\ndependencies = [\n"a>=1",\n"b", # why\n]\n'
    )
    assert list(loose_requirements(tmp_path / "pyproject.toml")) == ["a>=1 has no reason behind it", "b has no floor"]


BUILD = """
import socket, sys
def refuse(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise PermissionError(f"a build must not use the network: {event} {args}")
sys.addaudithook(refuse)
from setuptools import build_meta
print(getattr(build_meta, f"build_{sys.argv[1]}")(sys.argv[2]))
"""


def build(kind: str, source: Path, out: Path) -> Path:
    # without a compiler the optional engine is left out, and a minute saved
    environment = os.environ | {"CC": "false", "CXX": "false"}
    command = [sys.executable, "-c", BUILD, kind, str(out)]
    result = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return out / result.stdout.split()[-1]


def test_source_distribution_builds_and_installs_without_network(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for file in tracked_files():
        target = source / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    sdist = build("sdist", source, tmp_path)
    subprocess.run(["tar", "-xzf", str(sdist), "-C", str(tmp_path)], check=True)
    unpacked = tmp_path / sdist.name.removesuffix(".tar.gz")
    for name in ("LICENSE", "README.md", "pyproject.toml", "setup.py", "csrc/cpu/dispatch.cpp", "csrc/cpu/abi.h"):
        assert (unpacked / name).is_file(), name
    wheel = build("wheel", unpacked, tmp_path)
    packaged = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("fastpref/")}
    modules = {path.relative_to(source).as_posix() for path in (source / "fastpref").rglob("*.py")}
    assert packaged == modules | {"fastpref/py.typed"}
    target = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(target)]
    subprocess.run([*pip, str(wheel)], check=True)
    code = "import fastpref, fastpref.cli, torch; print(fastpref.__file__)"
    environment = os.environ | {"PYTHONPATH": str(target)}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(target / "fastpref" / "__init__.py")
