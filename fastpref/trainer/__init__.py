"""The Megatron-Core preference trainer; needs the extra `megatron`."""

from fastpref.errors import MissingDependencyError, raise_if_any

try:
    from fastpref.run.plan.software import megatron_problems

    raise_if_any(megatron_problems())
    # First: it keeps Megatron's import-time remarks about optional packages out of the log.
    from fastpref.trainer.ranks import platform  # noqa: F401  (imported for its effect)
    from fastpref.trainer.ranks.optional_packages import broken_is_absent
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] == "fastpref":
        raise
    raise MissingDependencyError(
        f'fastpref.trainer needs {error.name}: pip install "fastpref[megatron]"', name=error.name
    ) from error

# Modules below import more of Megatron, which asks for more of these packages.
with broken_is_absent():
    from fastpref.checkpoint.reference_cache import ReferenceCache
    from fastpref.losses import DPOConfig
    from fastpref.run.architecture.lora_config import LoraConfig
    from fastpref.run.config.arguments import TrainingArguments
    from fastpref.run.config.run_config import ModelConfig, ReferenceConfig, RunConfig
    from fastpref.run.config.run_file import load_run_config
    from fastpref.trainer.dpo_trainer import DPOTrainer
    from fastpref.trainer.loop import TrainResult
    from fastpref.trainer.model.build import ModelOptions, build_models, load_models, save_hf
    from fastpref.trainer.model.lora import add_lora, save_adapter
    from fastpref.trainer.ranks.platform import initialize_megatron
    from fastpref.trainer.reference.scoring import score_reference

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
