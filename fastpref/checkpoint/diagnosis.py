"""What a directory holds in place of the model or the adapter that it was given as, and what to give instead."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from fastpref.checkpoint.directory import STATE_FILE
from fastpref.checkpoint.headers import listed, read_json
from fastpref.checkpoint.manifest import MANIFEST_FILE
from fastpref.errors import CheckpointError

CONFIG_FILE = "config.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# What trainers leave beside a model.
_TRAINER_STATE = re.compile(
    r"(training_args|optimizer|scheduler|scaler|sampler|rng_state|random_states)(_\d+)*\.(bin|pt|pth|pkl)"
)
_SHARD = re.compile(r".+-\d{5}-of-\d{5}\.safetensors")
_WEIGHTS = ("model.safetensors", "adapter_model.safetensors")
# How a file is named while it is not whole.
_UNFINISHED = (".part", ".partial", ".incomplete", ".aria2", ".crdownload", ".download")
# Megatron's checkpoints have one of these; other distributed checkpoints of PyTorch have none.
_MEGATRON = ("latest_checkpointed_iteration.txt", "common.pt", "metadata.json")
_COMPLETE_IT = f"put {CONFIG_FILE} and the tokenizer beside them and give DIR"
_WRITERS = {CONFIG_FILE: "transformers'", ADAPTER_CONFIG_FILE: "peft's"}
_EXPORT = "write its model with `fastpref export CONFIG --output DIR{}` and give DIR"


def other_contents(directory: Path, wanted: str) -> str | None:
    """Say what a directory is that lacks a file or weights, and what to give instead; None where it is nothing known.

    Args:
        directory: an existing directory.
        wanted: `CONFIG_FILE` where it was given as a model, `ADAPTER_CONFIG_FILE` where it was given as an adapter.
    """
    return next(_findings(directory, wanted), None)


def _findings(directory: Path, wanted: str) -> Iterator[str]:
    names = sorted(entry.name for entry in directory.iterdir())
    if {MANIFEST_FILE, STATE_FILE} <= {*names}:
        yield f"it is a checkpoint of training; {_EXPORT.format(f' --checkpoint {directory}')}"
    if any((directory / "checkpoints").glob(f"step-*/{MANIFEST_FILE}")):
        yield f"it is the output directory of a run; {_EXPORT.format('')}"
    yield from _distributed(directory, names)
    if wanted == CONFIG_FILE and ADAPTER_CONFIG_FILE in names:
        base = _base_model(directory)
        yield f"it is an adapter; give it as lora.path, and its base model{base} as model.path"
    if wanted == ADAPTER_CONFIG_FILE and CONFIG_FILE in names and ADAPTER_CONFIG_FILE not in names:
        yield "it is a whole model and no adapter; give it as model.path"
    yield from _foreign_weights(names, wanted)
    yield from _weights_elsewhere(directory, names, "model" if wanted == CONFIG_FILE else "adapter_model")
    inside = sorted(
        str(path.parent) for pattern in ("*", "*/*") for path in directory.glob(f"{pattern}/{wanted}") if path.is_file()
    )
    if inside:
        yield f"directories inside it have one; give one of them: {listed(inside)}"


def _distributed(directory: Path, names: list[str]) -> Iterator[str]:
    """Say of a checkpoint whose ranks wrote parts of the weights how to put them together."""
    parts = sorted(path.parent for pattern in ("*.distcp", "*/*.distcp") for path in directory.glob(pattern))
    if _MEGATRON[0] in names or any((part / name).exists() for part in parts for name in _MEGATRON):
        yield "it is a checkpoint of Megatron; convert it to Hugging Face's form with Megatron's tools"
    if parts:
        models = [part for part in parts if "optim" not in part.name] or parts
        yield (
            f"it is a checkpoint of FSDP in parts; `accelerate merge-weights {models[0]} DIR` writes its weights; "
            + _COMPLETE_IT
        )
    if "zero_to_fp32.py" in names:
        yield (
            f"it is a checkpoint of DeepSpeed in parts; `python {directory / 'zero_to_fp32.py'} {directory} DIR "
            f"--safe_serialization` writes its weights; {_COMPLETE_IT}"
        )


def _foreign_weights(names: list[str], wanted: str) -> Iterator[str]:
    """Say of weights in another form what they are."""
    if any(name.endswith(".gguf") for name in names):
        found = listed(name for name in names if name.endswith(".gguf"))
        yield f"it holds weights in the form of GGUF ({found}); download the model's own safetensors files"
    if "adapters.safetensors" in names or "adapters.npz" in names:
        yield "it is an adapter of mlx; `mlx_lm.fuse` adds it into its model, which can be given as model.path"
    if any(name.startswith("consolidated.") for name in names):
        found = listed(name for name in names if name.startswith("consolidated."))
        yield (
            f"it holds weights in the form of their maker's own code ({found}); download {CONFIG_FILE} and the "
            "safetensors files in Hugging Face's form"
        )
    pickles = [name for name in names if name.endswith(_PICKLES) and not _TRAINER_STATE.fullmatch(name)]
    if pickles:
        yield (
            f"it holds its weights as pickles ({listed(pickles)}), which can run any code when loaded; convert them in "
            f"a sandbox with {_WRITERS[wanted]} `save_pretrained` and load the safetensors files"
        )


def _weights_elsewhere(directory: Path, names: list[str], stem: str) -> Iterator[str]:
    """Say of safetensors files why they are not found."""
    dangling = [name for name in names if name.endswith(".safetensors") and not (directory / name).exists()]
    if dangling:
        yield f"it has links to files that do not exist: {listed(dangling)}; download them again"
    partial = [name for name in names if name.endswith(_UNFINISHED)]
    partial += sorted(path.name for path in directory.glob(".cache/huggingface/download/*.incomplete"))
    if partial:
        yield f"it has files of a download that was not finished: {listed(partial)}; download the model again"
    weights = [name for name in names if name.endswith(".safetensors")]
    index = f"{stem}.safetensors.index.json"
    if any(map(_SHARD.fullmatch, weights)) and index not in names:
        yield f"its weights are in several files without their index, {index}; download that, too"
    if len(weights) == 1 and weights[0] not in _WEIGHTS and index not in names:
        yield f"its weights have another name, {weights[0]}; rename the file to {stem}.safetensors"


def _base_model(directory: Path) -> str:
    try:
        name = read_json(directory / ADAPTER_CONFIG_FILE).get("base_model_name_or_path")
    except (CheckpointError, OSError):
        return ""
    return f" ({name})" if isinstance(name, str) and name else ""
