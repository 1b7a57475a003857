"""What `fastpref check` says of installed versions, read from records of distributions that a test lays down."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from fastpref.errors import ConfigError
from fastpref.run.config.arguments import TrainingArguments
from fastpref.run.plan import software

ENGINE = {"transformer-engine": "2.11.0", "transformer-engine-torch": "2.11.0", "transformer-engine-cu13": "2.11.0"}
# What the wheels of Megatron-Core say of Transformer Engine.
DECLARED = {
    "0.16.1": ['transformer-engine[core_cu13,pytorch]<2.12.0,>=2.9.0a0; extra == "dev"'],
    "0.17.1": ['transformer-engine[core_cu13,pytorch]; extra == "dev"'],
    "0.19.2": ['transformer-engine[core_cu13,pytorch]; extra == "te"'],
}
Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Installs distributions, by their records alone, in the place of everything that is installed here."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def lay_down(versions: Mapping[str, str], requires: Mapping[str, list[str]] | None = None) -> Path:
        for name, version in versions.items():
            folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
            folder.mkdir()
            lines = ["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}"]
            lines += [f"Requires-Dist: {line}" for line in (requires or {}).get(name, [])]
            (folder / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return tmp_path

    return lay_down


def megatron(install: Install, version: str) -> None:
    install({"megatron-core": version}, {"megatron-core": DECLARED.get(version.split("+")[0], DECLARED["0.19.2"])})


def refusal(**settings: object) -> str:
    with pytest.raises(ConfigError) as caught:
        software.check_software(TrainingArguments(**settings))  # type: ignore[arg-type]
    return str(caught.value)


@pytest.mark.parametrize(("megatron_core", "engine"), [("0.16.1", "2.11.0"), ("0.17.1", "2.20.2"), ("0.19.2", "2.8.0")])
def test_sets_that_fit_are_taken_in_silence(install: Install, megatron_core: str, engine: str) -> None:
    megatron(install, megatron_core)
    install(dict.fromkeys(ENGINE, engine))
    assert software.check_software(TrainingArguments(transformer_impl="transformer_engine")) == []


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        (
            ENGINE | {"transformer-engine-torch": "2.18.0"},
            "its distributions must be of one version, got transformer-engine 2.11.0, transformer-engine-torch 2.18.0, "
            "transformer-engine-cu13 2.11.0",
        ),
        (ENGINE | {"transformer-engine-cu13": "2.11.0.post1"}, "its distributions must be of one version"),
        ({"transformer-engine": "2.11.0"}, "transformer-engine 2.11.0 is installed without its extension for PyTorch"),
        ({"transformer-engine": "2.11.0", "transformer-engine-cu13": "2.11.0"}, "without its extension for PyTorch"),
        ({"transformer-engine": "2.11.0", "transformer-engine-torch": "2.11.0"}, "is installed without its kernels"),
        ({"transformer-engine-torch": "2.11.0"}, "parts of it are installed without transformer-engine itself"),
        ({"transformer-engine-cu12": "2.11.0"}, "parts of it are installed without transformer-engine itself"),
        (ENGINE | {"transformer-engine-cu12": "2.11.0"}, "kernels for two versions of CUDA"),
        (
            {**dict.fromkeys(list(ENGINE)[:2], "2.11.0"), "transformer-engine-cu12": "2.11.0"},
            "its kernels are for CUDA 12 and PyTorch is for CUDA 13",
        ),
        (dict.fromkeys(ENGINE, "2.7.0"), "2.7.0 is installed, and at least 2.8 is needed"),
        (dict.fromkeys(ENGINE, "1.13.0"), "1.13.0 is installed, and at least 2.8 is needed"),
        (dict.fromkeys(ENGINE, "2.21.0"), "2.21.0 is installed, but megatron-core 0.16.1 declares <2.12.0,>=2.9.0a0"),
    ],
)
def test_engine_that_cannot_be_used_is_refused(install: Install, parts: dict[str, str], reason: str) -> None:
    megatron(install, "0.16.1")
    install(parts)
    message = refusal()
    assert message.startswith("Transformer Engine cannot be used: ") and reason in message
    assert 'pip install --no-build-isolation --no-cache-dir "transformer-engine[pytorch,core_cu13]==2.11.0"' in message
    # the way out that is always there
    assert "training.transformer_impl: local" in message
    assert software.check_software(TrainingArguments(transformer_impl="local")) is not None


def test_remedy_is_accepted(install: Install) -> None:
    """What the message says to install passes the check that asked for it, beside every Megatron-Core."""
    for version in DECLARED:
        megatron(install, version)
        command = software.to_install().split('"')[1]
        requirement = Requirement(command)
        assert requirement.extras == {"pytorch", "core_cu13"}
        (pin,) = requirement.specifier
        install(dict.fromkeys(ENGINE, pin.version))
        assert software.check_software(TrainingArguments()) == []
        for folder in Path(sys.path[0]).glob("*.dist-info"):
            (folder / "METADATA").unlink()
            folder.rmdir()


@pytest.mark.parametrize("place", ["transformer_engine", "transformer_engine/wheel_lib", "."])
def test_engine_built_from_its_source_has_one_distribution(install: Install, place: str) -> None:
    folder = install({"transformer-engine": "2.14.0+0c1b2d3"})
    megatron(install, "0.19.2")
    (folder / "transformer_engine").mkdir()
    (folder / "transformer_engine" / "__init__.py").touch()
    assert "without its extension" in refusal()
    (folder / place).mkdir(exist_ok=True)
    name = "transformer_engine_torch" + EXTENSION_SUFFIXES[0]
    (folder / place / name).touch()
    assert software.check_software(TrainingArguments()) == []


def test_pytorch_without_cuda_says_nothing_of_its_version(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    megatron(install, "0.19.2")
    install(ENGINE)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert software.check_software(TrainingArguments()) == []
    assert 'core_cu13]==2.20.2", with core_cu12 for a PyTorch of CUDA 12' in software.to_install()


def test_a_cuda_without_kernels_is_asked_for_no_extra(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformer-engine has the extras core_cu12 and core_cu13 alone."""
    monkeypatch.setattr(torch.version, "cuda", "14.0")
    assert 'core_cu13]==2.20.2" beside a PyTorch of CUDA 13, as it has no kernels for CUDA 14' in software.to_install()


@pytest.mark.parametrize("version", ["0.16.0", "0.15.3", "0.16.1.dev0"])
def test_megatron_core_below_the_floor_is_refused(install: Install, version: str) -> None:
    megatron(install, version)
    assert f"megatron-core {version} is installed, and at least 0.16.1 is needed: pip install 'megatron" in refusal()


def test_what_is_newer_than_anything_tried_is_remarked_on(install: Install) -> None:
    megatron(install, "0.21.0")
    install(dict.fromkeys(ENGINE, "2.30"))
    first, second = software.check_software(TrainingArguments())
    assert "megatron-core 0.21.0 is newer than 0.19.2" in first and "transformer-engine 2.30 is newer than" in second


@pytest.mark.parametrize("megatron_core", ["0.16.1", "0.19.2"])
def test_build_from_a_commit_is_no_newer_than_its_release(install: Install, megatron_core: str) -> None:
    """As containers and checkouts have them: the release's number, then the commit."""
    megatron(install, f"{megatron_core}+7f1e2d3")
    install(dict.fromkeys(ENGINE, "2.20.2+0c1b2d3"))
    assert not [note for note in software.check_software(TrainingArguments()) if "newer" in note]


def test_engine_outside_of_what_megatron_declares_but_tried_is_remarked_on(install: Install) -> None:
    megatron(install, "0.16.1")
    install(dict.fromkeys(ENGINE, "2.18.0"))
    (note,) = software.check_software(TrainingArguments())
    assert "megatron-core 0.16.1 declares transformer-engine <2.12.0,>=2.9.0a0, and 2.18.0 is installed" in note


def test_lack_of_the_engine_stops_no_check_on_a_laptop(install: Install) -> None:
    assert software.check_software(TrainingArguments(transformer_impl="transformer_engine")) == []
    megatron(install, "0.19.2")
    assert software.check_software(TrainingArguments()) == []
    (note,) = software.check_software(TrainingArguments(transformer_impl="transformer_engine"))
    assert note.startswith("Transformer Engine is not installed here; where the run trains, install it with pip")


def test_lack_of_the_engine_beside_a_gpu(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    megatron(install, "0.19.2")
    assert "training.transformer_impl is transformer_engine, but it is not installed; install it with pip" in refusal(
        transformer_impl="transformer_engine"
    )
    (note,) = software.check_software(TrainingArguments())
    assert "experts" in note and "Install it with pip install" in note
    assert software.check_software(TrainingArguments(transformer_impl="local")) == []


@pytest.mark.parametrize(
    ("at_fault", "distribution"),
    [("flash_attn_2_cuda", "flash-attn"), ("flash_attn_interface", "flash-attn-3"), ("onnx", "onnx")],
)
def test_remedy_names_the_distribution_whose_package_is_at_fault(
    install: Install, at_fault: str, distribution: str
) -> None:
    folder = install({distribution: "3.0.0"})
    (record,) = folder.glob("*.dist-info")
    (record / "top_level.txt").write_text(f"another_package\n{at_fault}\n", encoding="utf-8")
    message = software.broken_engine("ImportError: undefined symbol", at_fault)
    assert f" {distribution}, or build it" in message or f"in {distribution}: install" in message
    assert "training.transformer_impl: local" in message and "pip uninstall -y transformer-engine" not in message


@pytest.mark.parametrize("text", [None, b"", b"Name: x\n", b"Version: of my own\n", b"Version: 2.11.0\n\xff\xfe\x80"])
@pytest.mark.parametrize("spoilt", ["transformer-engine", "transformer-engine-torch", "transformer-engine-cu13", "all"])
def test_unreadable_records_stop_nothing(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoilt: str, text: bytes | None
) -> None:
    """As an uninstallation that was cut leaves them; whether the code works is found out when it is imported."""
    install(ENGINE)
    megatron(install, "0.19.2")
    for name in [*ENGINE, "megatron-core"] if spoilt == "all" else [spoilt]:
        (record,) = tmp_path.glob(f"{name.replace('-', '_')}-[0-9]*.dist-info/METADATA")
        record.unlink()
        if text is not None:
            record.write_bytes(text)
    for on_gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)  # noqa: B023 (called in this turn)
        for wanted in (None, "transformer_engine"):
            assert software.check_software(TrainingArguments(transformer_impl=wanted)) == []
