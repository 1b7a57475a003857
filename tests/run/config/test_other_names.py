"""What people bring along from other trainers gets the advice that leads to the setting meant."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from fastpref.errors import ConfigError
from fastpref.run.config import other_names
from fastpref.run.config.run_config import RunConfig
from fastpref.run.config.run_file import _known_keys, load_run_config

MINIMAL = "model: {path: policy}\ndata: {train: pairs.jsonl}\n"
_KEY = re.compile(r"\b((?:model|reference|data|loss|lora|training)\.[a-z_]+)\b")
KNOWN = {f"{section}.{key}" for section, keys in _known_keys(RunConfig).items() for key in keys or ()}


def refusal(tmp_path: Path, text: str) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_run_config(path)
    return str(caught.value)


def test_every_advice_names_keys_that_are_there() -> None:
    named = {
        (name, key)
        for name, advice in {**other_names._KEYS, **other_names._SUBJECTS}.items()
        for key in _KEY.findall(advice.replace("fastpref.integrations", ""))
    }
    assert len(named) > 150
    assert {(name, key) for name, key in named if key not in KNOWN} == set()


def test_no_known_key_has_an_advice() -> None:
    assert not {key.split(".")[1] for key in KNOWN} & set(other_names._KEYS)


def test_every_setting_of_trl_is_known_or_has_an_advice() -> None:
    trl = pytest.importorskip("trl")
    transformers = pytest.importorskip("transformers")
    general = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    own = {field.name for field in dataclasses.fields(trl.DPOConfig)} - general
    known = {key.split(".")[1] for key in KNOWN}
    assert {name for name in own - known if other_names.advice(name) is None} == set()


@pytest.mark.parametrize(
    ("key", "line", "advice"),
    [
        ("loss.loss_type", "loss: {loss_type: sigmoid}", "this is loss.pref_loss here"),
        ("loss.rpo_alpha", "loss: {rpo_alpha: 1}", "write loss.pref_loss: [sigmoid, sft] with loss.loss_weights"),
        ("lora.lora_target", "lora: {lora_target: all}", "this is lora.target_modules here"),
        ("lora.lora-rank", "lora: {lora-rank: 8}", "this is lora.r here"),
        (
            "training.gradient_checkpointing",
            "training: {gradient_checkpointing: true}",
            "this is training.recompute_",
        ),
        ("model_name_or_path", "model_name_or_path: m", "this is model.path here"),
        ("lr", "lr: 1.0e-6", "this is training.learning_rate here"),
        ("training.target_modules", "training: {target_modules: [q_proj]}", "did you mean lora.target_modules?"),
        ("training.beta1", "training: {beta1: 0.9}", "this is training.adam_beta1 here"),
        ("training.eval_accumulation_steps", "training: {eval_accumulation_steps: 4}", "evaluation computes metrics"),
        ("apply_chat_template", "apply_chat_template: true", "messages pass the chat template"),
        (
            "training.use_megatron_fsdp",
            "training: {use_megatron_fsdp: true}",
            "Megatron-FSDP and PyTorch's FSDP are not",
        ),
        ("training.use-torch-fsdp2", "training: {use-torch-fsdp2: true}", "Megatron-FSDP and PyTorch's FSDP are not"),
        (
            "training.data_parallel_sharding_strategy",
            "training: {data_parallel_sharding_strategy: optim_grads_params}",
            "Megatron-FSDP and PyTorch's FSDP are not supported; training.use_distributed_optimizer: true",
        ),
        ("fsdp", "fsdp: full_shard", "Megatron-FSDP and PyTorch's FSDP are not supported"),
        ("fsdp_config", "fsdp_config: {version: 2}", "Megatron-FSDP and PyTorch's FSDP are not supported"),
        ("freeze_vit", "freeze_vit: true", "vision-language and audio models are not supported"),
        ("use_my_trick", "use_my_trick: true", "nothing here is called so; leave it out, or take one of model, data"),
        ("training.sed", "training: {sed: 1}", "did you mean seed?"),
    ],
)
def test_key_of_another_trainer(tmp_path: Path, key: str, line: str, advice: str) -> None:
    assert f"{key} is not a known key; {advice}" in refusal(tmp_path, f"{MINIMAL}{line}\n")


@pytest.mark.parametrize(
    ("names", "advice"),
    [
        ("fp8 fp8_format fp8-recipe fp8_param_gather enable_fp8 fp4 use_float8", "FP8 and FP4 are not supported"),
        (
            "cuda_graph_scope enable-cuda-graph external_cuda_graph use_cudagraphs optimizer_cuda_graph",
            "CUDA graphs are",
        ),
        (
            "fsdp_min_num_params torch_fsdp2 fully_shard dp_shard_size fsdp_offload",
            "Megatron-FSDP and PyTorch's FSDP are",
        ),
        (
            "use_deepspeed deepspeed_config zero3 zero_optimization ds_tensor_parallel",
            "training.use_distributed_optimiz",
        ),
        ("use_te te_rng_tracker transformer_engine", "training.transformer_impl chooses between"),
        (
            "vision_tower image_processor video_maxlen mm_projector_lr audio_sampling_rate freeze_audio",
            "vision-language",
        ),
    ],
)
def test_subject_of_another_trainer(tmp_path: Path, names: str, advice: str) -> None:
    """Trainers have many settings for these; whatever comes next is answered by its subject."""
    keys = names.split()
    message = refusal(tmp_path, f"{MINIMAL}training: {{{', '.join(f'{key}: 1' for key in keys)}}}\n")
    assert [key for key in keys if f"training.{key} is not a known key; {advice}" not in message] == []


def test_no_key_is_taken_for_a_subject() -> None:
    known = {key.split(".")[1] for key in KNOWN}
    assert [key for key in known if other_names.advice(key) is not None] == []


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        ("loss: {pref_loss: dpo}", "got 'dpo'; the loss of DPO is named sigmoid"),
        ("loss: {pref_loss: [dpo, sft]}", "got 'dpo'; the loss of DPO is named sigmoid"),
        ("loss: {pref_loss: kto_pair}", "bco_pair and apo_zero rate both answers"),
        ("loss: {f_divergence: js_divergence}", "write js"),
        ("loss: {pref_loss: grpo}", "it generates answers while it trains"),
        ('loss: {pref_loss: "sigmoid,sft"}', "write [sigmoid,sft]"),
        ("lora: {target_modules: all-linear}", "leave target_modules out for all of them"),
        ("lora: {target_modules: [all-linear]}", "leave target_modules out for all of them"),
        ('lora: {target_modules: "q_proj,v_proj"}', 'must be a list, got "q_proj,v_proj"; write [q_proj, v_proj]'),
        ("lora: {target_modules: .*_proj}", 'must be a list, got ".*_proj", and must name only q_proj'),
        ("lora: false", "lora must be a section of keys, got false; leave it out"),
        ("data: {max_length: -1}", "null is no limit"),
        ("training: {lr_scheduler_type: constant_with_warmup}", "write constant, with warmup_steps or warmup_ratio"),
        ("training: {report_to: none}", "write []"),
        ("training: {report_to: wandb}", "write [wandb]"),
        ("training: {report_to: all}", "write [tensorboard, wandb]"),
        ("training: {report_to: swanlab}", "must name only tensorboard, wandb; got 'swanlab'"),
        ("training: {resume_from_checkpoint: x, resume_allow_changes: all}", "got 'all'\n"),
        ("training: {bf16: yes}", 'must be true or false, got "yes"; write true'),
        ("training: {num_train_epochs: 0.5}", "set training.max_steps for a part of an epoch"),
        ("training: {save_steps: -1}", "leave it out to save at the end only"),
        ("training: {eval_steps: -1}", "leave it out to evaluate at the end only"),
        ("training: {max_steps: -1}", "leave it out for num_train_epochs"),
        ("training: {recompute_granularity: unsloth}", "write full"),
        ("training: {resume_from_checkpoint: true}", "write latest"),
        ("training: {recompute_granularity: true}", "write full"),
        ("lora: true", "write {} for the defaults"),
    ],
)
def test_value_of_another_trainer(tmp_path: Path, line: str, advice: str) -> None:
    known = "" if line.startswith("data:") else "data: {train: pairs.jsonl}\n"
    message = refusal(tmp_path, f"model: {{path: policy}}\n{known}{line}\n") + "\n"
    assert advice in message
    assert "did you mean ipo" not in message


def test_data_sets_as_mappings(tmp_path: Path) -> None:
    message = refusal(tmp_path, "model: {path: policy}\ndata: {train: [{path: a.jsonl, type: chatml}]}\n")
    assert 'data.train[0] must be a string, got {"path": "a.jsonl"' in message
    assert "name files by their paths alone" in message


def test_advice_of_values_works(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        MINIMAL + "loss: {pref_loss: [sigmoid, sft], loss_weights: [1, 0.5], f_divergence: js}\n"
        "lora: {}\n"
        "training: {report_to: [], lr_scheduler_type: constant, warmup_steps: 1, recompute_granularity: full}\n"
    )
    config = load_run_config(path)
    assert config.training.report_to == ()
    assert len(config.lora.target_modules) == 7


def test_whole_numbers_written_as_floats(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: {config: {rope_theta: 10000.0}, tokenizer: t}\ndata: {train: pairs.jsonl}\n"
        "training: {num_train_epochs: 3.0, warmup_ratio: 0.0, max_grad_norm: 1.0, learning_rate: 1.0e-6}\n"
    )
    config = load_run_config(path)
    assert config.training.num_train_epochs == 3 and isinstance(config.training.num_train_epochs, int)
    assert isinstance(config.training.max_grad_norm, float)
    assert isinstance(config.model.config["rope_theta"], float)
