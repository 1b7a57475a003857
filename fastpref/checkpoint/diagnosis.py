"""What a directory holds in place of the model or the adapter that it was given as, and what to give instead."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fastpref.checkpoint.directory import STATE_FILE
from fastpref.checkpoint.headers import listed, read_json
from fastpref.checkpoint.manifest import MANIFEST_FILE
from fastpref.errors import CheckpointError

CONFIG_FILE = "config.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# What Hugging Face's trainers leave beside a model.
_TRAINER_STATE = ("training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state.pth", "scaler.pt")
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
    if "latest_checkpointed_iteration.txt" in names or any(name.endswith(".distcp") for name in names):
        yield "it is a checkpoint of Megatron; convert it to Hugging Face's form with Megatron's tools"
    if wanted == CONFIG_FILE and ADAPTER_CONFIG_FILE in names:
        base = _base_model(directory)
        yield f"it is an adapter; give it as lora.path, and its base model{base} as model.path"
    if wanted == ADAPTER_CONFIG_FILE and CONFIG_FILE in names and ADAPTER_CONFIG_FILE not in names:
        yield "it is a whole model and no adapter; give it as model.path"
    yield from _foreign_weights(names, wanted)
    inside = sorted(
        str(path.parent) for pattern in ("*", "*/*") for path in directory.glob(f"{pattern}/{wanted}") if path.is_file()
    )
    if inside:
        yield f"directories inside it have one; give one of them: {listed(inside)}"


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
    pickles = [name for name in names if name.endswith(_PICKLES) and name not in _TRAINER_STATE]
    if pickles:
        yield (
            f"it holds its weights as pickles ({listed(pickles)}), which can run any code when loaded; convert them in "
            f"a sandbox with {_WRITERS[wanted]} `save_pretrained` and load the safetensors files"
        )


def _base_model(directory: Path) -> str:
    try:
        name = read_json(directory / ADAPTER_CONFIG_FILE).get("base_model_name_or_path")
    except (CheckpointError, OSError):
        return ""
    return f" ({name})" if isinstance(name, str) and name else ""
