"""The Megatron-Core preference trainer; needs the extra `megatron`."""

from fastpref.errors import MissingDependencyError

try:
    # First: it keeps Megatron's import-time remarks about optional packages out of the log.
    from fastpref.trainer import platform  # noqa: F401  (imported for its effect)
except ImportError as error:
    if (error.name or "").split(".")[0] == "fastpref":
        raise
    raise MissingDependencyError(
        f'fastpref.trainer needs {error.name}: pip install "fastpref[megatron]"', name=error.name
    ) from error

from fastpref.checkpoint.reference_cache import ReferenceCache
from fastpref.losses import DPOConfig
from fastpref.trainer.arguments import TrainingArguments
from fastpref.trainer.config_file import load_run_config
from fastpref.trainer.dpo_trainer import DPOTrainer, initialize_megatron
from fastpref.trainer.loop import TrainResult
from fastpref.trainer.lora import add_lora, save_adapter
from fastpref.trainer.lora_config import LoraConfig
from fastpref.trainer.model import ModelOptions, build_models, load_models, save_hf
from fastpref.trainer.run_config import ModelConfig, ReferenceConfig, RunConfig
from fastpref.trainer.scoring import score_reference

__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "LoraConfig",
    "ModelConfig",
    "ModelOptions",
    "ReferenceCache",
    "ReferenceConfig",
    "RunConfig",
    "TrainResult",
    "TrainingArguments",
    "add_lora",
    "build_models",
    "initialize_megatron",
    "load_models",
    "load_run_config",
    "save_adapter",
    "save_hf",
    "score_reference",
]
