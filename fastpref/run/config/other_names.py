"""Settings of other trainers by the names that people bring along, and what stands for each here.

The names are those of TRL 1.16 and of its earlier versions, of Transformers' `TrainingArguments`, ms-swift,
LLaMA-Factory, axolotl, OpenRLHF, verl and Megatron-LM. A name that is a key of some section here needs no entry.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

# Our key, then what other trainers call it.
_SAME: Mapping[str, Sequence[str]] = {
    "model.path": ("model_name_or_path", "model_name", "model_id", "base_model", "pretrain", "model_dir", "load"),
    "model.tokenizer": ("tokenizer_name_or_path", "tokenizer_name", "tokenizer_path", "tokenizer_model"),
    "reference.path": (
        *("ref_model", "ref_model_path", "ref_model_name_or_path", "ref_pretrain", "reference_model"),
        "reference_model_path",
    ),
    "data.train": (
        *("dataset", "datasets", "dataset_name", "dataset_path", "train_file", "train_files", "train_dataset"),
        *("train_path", "data_path", "prompt_data"),
    ),
    "data.eval": (
        *("eval_dataset", "val_dataset", "val_files", "validation_file", "eval_file", "test_datasets", "eval_path"),
        *("val_file", "test_file"),
    ),
    "data.max_length": (
        *("cutoff_len", "sequence_len", "max_seq_length", "max_seq_len", "model_max_length", "max_len", "seq_length"),
    ),
    "data.max_completion_length": ("max_target_length", "max_response_length"),
    "data.truncation": ("truncation_mode", "truncation_strategy", "truncation_side"),
    "data.chat_template": ("chat_template_path", "chat_template_jinja"),
    "data.chat_template_kwargs": ("template_kwargs",),
    "data.prompt_field": ("prompt_key", "input_key", "field_prompt", "prompt_column"),
    "data.chosen_field": ("chosen_key", "field_chosen", "chosen_column"),
    "data.rejected_field": ("rejected_key", "field_rejected", "rejected_column"),
    "loss.beta": ("pref_beta", "dpo_beta", "rl_beta", "orpo_alpha", "simpo_beta", "kl_beta"),
    "loss.pref_loss": ("loss_type", "loss_name"),
    "loss.f_divergence": ("f_divergence_type",),
    "loss.f_alpha": ("f_alpha_divergence_coef",),
    "loss.ld_alpha": ("dpo_ld_alpha", "ld_dpo_alpha"),
    "loss.label_smoothing": ("dpo_label_smoothing", "cdpo_label_smoothing"),
    "lora.r": ("lora_r", "rank"),
    "lora.target_modules": ("lora_target", "lora_target_modules", "target_layers"),
    "lora.path": ("adapter_name_or_path", "lora_model_dir", "lora_path", "adapters", "peft_model_id"),
    "training.per_device_train_batch_size": (
        *("micro_batch_size", "train_micro_batch_size_per_gpu", "micro_train_batch_size", "train_micro_batch_size"),
        "per_device_batch_size",
    ),
    "training.per_device_eval_batch_size": ("eval_batch_size", "eval_micro_batch_size"),
    "training.learning_rate": ("lr",),
    "training.lr_scheduler_type": ("lr_scheduler", "lr_decay_style", "lr_scheduler_name", "lr_schedule"),
    "training.min_lr": ("lr_min", "min_learning_rate"),
    "training.adam_beta1": ("beta1",),
    "training.adam_beta2": ("beta2",),
    "training.adam_epsilon": ("adam_eps", "eps"),
    "training.weight_decay": ("wd",),
    "training.warmup_steps": ("lr_warmup_steps", "lr_warmup_iters", "num_warmup_steps"),
    "training.warmup_ratio": ("lr_warmup_fraction", "lr_warmup_ratio", "warmup_proportion", "lr_warmup_steps_ratio"),
    "training.num_train_epochs": (
        *("num_epochs", "epochs", "max_epochs", "total_epochs", "n_epochs", "max_num_epochs"),
    ),
    "training.max_steps": ("train_iters", "total_training_steps", "max_num_steps", "iters"),
    "training.max_grad_norm": ("clip_grad", "gradient_clipping", "max_norm", "grad_clip"),
    "training.output_dir": ("save", "save_path", "output_path", "default_local_dir"),
    "training.save_steps": ("save_interval", "save_freq", "save_every", "save_period"),
    "training.eval_steps": ("eval_interval", "test_freq", "val_period", "steps_per_eval"),
    "training.logging_steps": ("log_interval", "log_every_n_steps", "steps_per_report"),
    "training.save_total_limit": ("max_ckpt_num", "keep_top_k"),
    "training.seed": ("data_seed", "random_state", "random_seed"),
    "training.drop_last": ("dataloader_drop_last",),
    "training.packing": (*("padding_free", "sample_packing", "use_remove_padding", "neat_packing", "packing_samples"),),
    "training.disable_progress": ("disable_tqdm",),
    "training.moe_aux_loss_coeff": ("router_aux_loss_coef",),
    "training.tensor_model_parallel_size": ("tensor_parallel_size", "tp_size", "tp", "tensor_parallel_degree"),
    "training.pipeline_model_parallel_size": ("pipeline_parallel_size", "pp_size", "pp", "pipeline_parallel_degree"),
    "training.context_parallel_size": ("cp_size", "cp", "context_parallel_degree", "sequence_parallel_size"),
    "training.expert_model_parallel_size": ("expert_parallel_size", "ep_size", "ep", "expert_parallel_degree"),
    "training.distributed_timeout_seconds": ("ddp_timeout", "nccl_timeout"),
}

_NO_MOVING_REFERENCE = "the reference stays as it is; fastpref.integrations.trl.DPOTrainer can move it"
_PRECISION = "the number format is training.bf16: true, training.fp16: true, or neither for fp32"
_NO_QUANTIZATION = "weights are trained as they are, not quantised; leave it out, and save memory by a lora section"
_ADAPTERS = "a lora section trains adapters, a file without one trains the weights; leave it out"
_PLAIN_ADAPTERS = "adapters are plain LoRA on the layers of lora.target_modules; leave it out"
_ONCE = "pairs are read and tokenised once, before the first step; leave it out"
_STEPS = "set training.{0} to a number of steps; without it the run does so at its end only"
_HUB = "nothing is uploaded; write the model with `fastpref train --export DIR` and upload that directory"
_RECOMPUTE = "this is training.recompute_granularity here: full for whole layers, selective for the attention alone"
_SHARDED = "training.use_distributed_optimizer: true shards the optimizer; parallel sizes are keys of training"
_NO_FSDP = (
    "Megatron-FSDP and PyTorch's FSDP are not supported; training.use_distributed_optimizer: true shards the "
    "optimizer, and training.tensor_model_parallel_size and the other parallel sizes shard the weights"
)
_TEXT_ONLY = "vision-language and audio models are not supported; leave it out, and train a text model on text"
_NO_FP8 = f"FP8 and FP4 are not supported; {_PRECISION}"
_NO_GRAPHS = "CUDA graphs are not supported; leave it out"
_ENGINE = "training.transformer_impl chooses between transformer_engine and local layers; leave it out for the default"
_ALWAYS_FUSED = "the fused head is always in use; leave it out"
_ATTENTION = "attention is that of Transformer Engine where it is installed; leave it out"
_NO_CODE = "code of a model never runs here; leave it out"
_METHOD = "the method is loss.pref_loss: sigmoid for DPO, orpo, simpo, cpo, ..."
_AS_SAVED = "model and tokenizer are what their files say; leave it out, or change the files"
_LOCAL = "files are read from local directories; download the model and name its directory in model.path"
_SPLITS = "data.train and data.eval name files, each with one split; leave it out"
_WHOLE_FILES = "data.train takes a list of files, all pairs of each; leave it out, or write the pairs meant to a file"
_WANDB = "wandb reads variables of its own, WANDB_PROJECT, WANDB_NAME and others; leave it out"
_TRACKERS = "training.report_to takes tensorboard and wandb; leave it out"
_LOGS = "everything is logged under training.output_dir; leave it out"
_LAUNCHER = "torchrun starts the ranks; leave it out"
_MACHINE = "this is left to PyTorch and Megatron-Core; leave it out"
_KEPT = "checkpoints always hold what resuming needs; `fastpref export` writes a model alone"
_BEST = "each checkpoint stays; `fastpref export --checkpoint DIR` takes any of them"
_NO_GENERATION = "evaluation computes metrics only; leave it out"
_PADDING = "padding is never seen by the model; leave it out"
_OFFLOAD = "activations stay on the device; training.recompute_granularity saves their memory"
_WITH_SFT = "write loss.pref_loss: [sigmoid, sft] with loss.loss_weights: [1, this weight]"

# What has no key of the same meaning, and what to write instead.
_INSTEAD: Mapping[str, str] = {
    **dict.fromkeys(("rpo_alpha", "pref_ftx", "dpo_sft_loss_weight", "nll_loss_coef"), _WITH_SFT),
    **dict.fromkeys(("rlhf_type", "rl", "stage"), _METHOD),
    "gamma_beta_ratio": "write loss.simpo_gamma as this ratio times loss.beta",
    "reference_free": "choose a loss that reads no reference, such as loss.pref_loss: simpo or cpo",
    "use_weighting": "the weights of WPO are in fastpref.integrations.trl.DPOTrainer only; leave it out",
    "precompute_ref_log_probs": "write reference.mode: precomputed",
    "precompute_ref_batch_size": "the reference scores training.per_device_eval_batch_size pairs at a time",
    **dict.fromkeys(("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"), _NO_MOVING_REFERENCE),
    **dict.fromkeys(("gradient_checkpointing", "activation_checkpointing", "recompute_activations"), _RECOMPUTE),
    **dict.fromkeys(
        ("gradient_checkpointing_kwargs", "recompute_method", "recompute_num_layers", "recompute_modules"),
        "training.recompute_granularity alone says what is recomputed; leave it out",
    ),
    **dict.fromkeys(("use_gradient_checkpointing", "enable_activation_checkpointing", "grad_checkpoint"), _RECOMPUTE),
    **dict.fromkeys(("torch_dtype", "dtype", "precision", "mixed_precision", "params_dtype"), _PRECISION),
    **dict.fromkeys(("load_in_4bit", "load_in_8bit", "quantization_bit", "quantization_config"), _NO_QUANTIZATION),
    **dict.fromkeys(("use_peft", "use_lora", "finetuning_type", "train_type", "tuner_type", "adapter"), _ADAPTERS),
    "lora_rank": "this is lora.r here; without lora.lora_alpha that is 8, and not twice the rank",
    **dict.fromkeys(("modules_to_save", "lora_modules_to_save", "use_dora", "lora_bias"), _PLAIN_ADAPTERS),
    **dict.fromkeys(("init_lora_weights", "init_weights", "lora_target_parameters", "rank_pattern"), _PLAIN_ADAPTERS),
    **dict.fromkeys(("lora_fan_in_fan_out", "loftq_config", "bias", "additional_target"), _PLAIN_ADAPTERS),
    **dict.fromkeys(("peft_use_dora", "loraplus_lr_ratio", "pissa_init", "use_galore"), _PLAIN_ADAPTERS),
    "lora_target_linear": "adapters are on all linear layers unless lora.target_modules names some; leave it out",
    **dict.fromkeys(("dataset_num_proc", "preprocessing_num_workers", "dataloader_num_workers", "streaming"), _ONCE),
    **dict.fromkeys(("dataloader_pin_memory", "overwrite_cache", "remove_unused_columns", "num_workers"), _ONCE),
    **dict.fromkeys(("dataset_prepared_path", "load_from_cache_file", "tokenized_path"), _ONCE),
    "no_remove_unused_columns": _ONCE,
    **dict.fromkeys(("dataset_splits", "dataset_train_split", "dataset_test_split", "dataset_split"), _SPLITS),
    **dict.fromkeys(("dataset_config", "dataset_configs"), _SPLITS),
    **dict.fromkeys(("dataset_mixer", "dataset_mixture", "mix_strategy", "interleave_probs"), _WHOLE_FILES),
    **dict.fromkeys(("max_samples", "max_train_samples", "max_eval_samples"), _WHOLE_FILES),
    "dataset_dir": "write it in front of the names in data.train and data.eval",
    "group_by_length": "training.packing: true leaves out the padding; leave it out",
    "apply_chat_template": "messages pass the chat template and strings do not, as data.train holds them; leave it out",
    **dict.fromkeys(
        ("train_on_inputs", "train_on_prompt", "mask_prompt"),
        "prompts are not scored, but by loss.orpo_nll; leave it out",
    ),
    "distributed_timeout_minutes": "write training.distributed_timeout_seconds, in seconds",
    **dict.fromkeys(("save_strategy", "saves_per_epoch"), _STEPS.format("save_steps")),
    **dict.fromkeys(
        ("eval_strategy", "evaluation_strategy", "evals_per_epoch", "do_eval"), _STEPS.format("eval_steps")
    ),
    **dict.fromkeys(("logging_strategy", "logging_first_step"), "set training.logging_steps to a number of steps"),
    "do_train": "`fastpref train` trains, `fastpref eval` evaluates; leave it out",
    **dict.fromkeys(("push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo"), _HUB),
    **dict.fromkeys(("deepspeed", "zero_stage", "ds_config", "adam_offload"), _SHARDED),
    **dict.fromkeys(("use_megatron_fsdp", "use_custom_fsdp", "use_torch_fsdp2", "megatron_fsdp"), _NO_FSDP),
    **dict.fromkeys(("fsdp", "fsdp2", "fsdp_config", "fsdp_version", "fsdp_plugin", "fsdp_strategy"), _NO_FSDP),
    **dict.fromkeys(("data_parallel_sharding_strategy", "outer_dp_sharding_strategy", "sharding_strategy"), _NO_FSDP),
    **dict.fromkeys(("fsdp_double_buffer", "init_model_with_meta_device", "fsdp_transformer_layer_cls"), _NO_FSDP),
    **dict.fromkeys(("fsdp_size", "fsdp_final_state_dict_type", "data_parallel_shard_degree", "dp_shard"), _NO_FSDP),
    **dict.fromkeys(("dp_shard_size", "dp_replicate_size", "fully_shard", "reshard_after_forward"), _NO_FSDP),
    **dict.fromkeys(
        ("fsdp_offload_params", "fsdp_cpu_offload", "use_fsdp", "nccl_ub", "fsdp_manual_registration"), _NO_FSDP
    ),
    **dict.fromkeys(
        ("freeze_vit", "freeze_aligner", "freeze_vision_tower", "freeze_multi_modal_projector"), _TEXT_ONLY
    ),
    **dict.fromkeys(("vit_lr", "aligner_lr", "vit_gradient_checkpointing", "max_pixels", "min_pixels"), _TEXT_ONLY),
    **dict.fromkeys(("image_max_pixels", "image_min_pixels", "video_max_pixels", "video_fps", "media_dir"), _TEXT_ONLY),
    **dict.fromkeys(("image_folder", "images_key", "image_key", "is_multimodal", "processor_type"), _TEXT_ONLY),
    **dict.fromkeys(
        ("use_liger_kernel", "enable_liger_kernel", "liger_kernel_config", "use_liger_loss"), _ALWAYS_FUSED
    ),
    **dict.fromkeys(("attn_implementation", "attn_impl", "flash_attn", "flash_attention"), _ATTENTION),
    **dict.fromkeys(
        ("use_flash_attention_2", "use_flash_attn", "attention_backend", "xformers_attention", "sdp_attention"),
        _ATTENTION,
    ),
    **dict.fromkeys(("s2_attention", "shift_attn"), _ATTENTION),
    **dict.fromkeys(("tf32", "torch_compile", "compile", "device", "device_map", "low_cpu_mem_usage"), _MACHINE),
    **dict.fromkeys(("moe_permute_fusion", "moe_grouped_gemm", "moe_shared_expert_overlap"), _MACHINE),
    **dict.fromkeys(("cross_entropy_loss_fusion", "use_unsloth", "half_precision_backend"), _MACHINE),
    **dict.fromkeys(("model_type", "tokenizer_type", "use_fast_tokenizer", "tokenizer_use_fast"), _AS_SAVED),
    **dict.fromkeys(("special_tokens", "new_special_tokens", "resize_vocab", "rope_scaling", "rope_theta"), _AS_SAVED),
    **dict.fromkeys(("model_revision", "hf_use_auth_token", "cache_dir", "use_hf", "use_modelscope"), _LOCAL),
    **dict.fromkeys(("load_safetensors", "save_safetensors"), "models are read and written so; leave it out"),
    "finetune": "model.path gives the first weights; leave it out",
    **dict.fromkeys(("trust_remote_code", "model_init_kwargs"), _NO_CODE),
    **dict.fromkeys(
        ("optim", "optimizer", "optim_args", "optimizer_name", "use_8bit_adam"), "the optimizer is AdamW; leave it out"
    ),
    "betas": "write training.adam_beta1 and training.adam_beta2",
    **dict.fromkeys(
        ("lr_scheduler_kwargs", "cosine_min_lr_ratio", "min_lr_rate"), "the schedule ends at training.min_lr"
    ),
    "neftune_noise_alpha": "no noise is added to embeddings; leave it out",
    "disable_dropout": "models train without dropout; leave it out (lora.lora_dropout is that of adapters)",
    **dict.fromkeys(
        ("global_batch_size", "train_batch_size", "batch_size"),
        "a batch is training.per_device_train_batch_size times training.gradient_accumulation_steps times the "
        "data-parallel ranks",
    ),
    **dict.fromkeys(
        ("split_dataset_ratio", "val_size", "val_set_size"),
        "write the pairs of the evaluation to a file of their own and name it in data.eval",
    ),
    **dict.fromkeys(
        ("template", "template_type", "agent_template"),
        "the chat template is the tokenizer's own, or data.chat_template",
    ),
    **dict.fromkeys(
        ("auto_resume_from_checkpoints", "load_checkpoint"), "write training.resume_from_checkpoint: latest"
    ),
    "system": "make it the first message of the prompts",
    **dict.fromkeys(
        ("overwrite_output_dir", "overwrite_output"), "a run never overwrites another; choose a new training.output_dir"
    ),
    **dict.fromkeys(("run_name", "wandb_project", "project", "wandb_entity", "wandb_name", "wandb_mode"), _WANDB),
    **dict.fromkeys(("wandb_watch", "wandb_log_model", "wandb_run_id"), _WANDB),
    **dict.fromkeys(("use_swanlab", "swanlab_project", "use_tensorboard"), _TRACKERS),
    **dict.fromkeys(("logging_dir", "log_dir", "tensorboard_dir", "log_level"), _LOGS),
    "plot_loss": "`fastpref plot` draws the curves; leave it out",
    **dict.fromkeys(("nproc_per_node", "nnodes", "num_gpus", "local_rank", "world_size"), _LAUNCHER),
    **dict.fromkeys(("ddp_backend", "ddp_find_unused_parameters"), _LAUNCHER),
    **dict.fromkeys(("load_best_model_at_end", "metric_for_best_model", "greater_is_better"), _BEST),
    **dict.fromkeys(("activation_offloading", "enable_activation_offloading", "offload"), _OFFLOAD),
    "ref_offload": "reference.mode: precomputed keeps no second model in memory",
    **dict.fromkeys(("pad_token", "padding_value", "label_pad_token_id", "pad_to_sequence_len"), _PADDING),
    **dict.fromkeys(("generate_during_eval", "do_predict", "predict_with_generate", "max_new_tokens"), _NO_GENERATION),
    "eval_accumulation_steps": _NO_GENERATION,
    "is_encoder_decoder": "models are decoder-only; leave it out",
    "average_tokens_across_devices": "means are over all pairs of a step on all ranks; leave it out",
    **dict.fromkeys(("save_only_model", "no_save_optim", "no_save_rng"), _KEPT),
}
# What trainers have many settings for, by words of their names.
_SUBJECTS: Mapping[str, str] = {
    "fsdp|fsdp2": _NO_FSDP,
    "deepspeed|deepcompile|zero|zero1|zero2|zero3|ds": _SHARDED,
    "fp8|fp4|float8|mxfp8|nvfp4": _NO_FP8,
    "cuda_graphs?|cudagraphs?": _NO_GRAPHS,
    "te|transformer_engine": _ENGINE,
    "vision|images?|videos?|audios?|vit|pixels|mm|multimodal": _TEXT_ONLY,
}
_KEYS = {name: f"this is {key} here" for key, names in _SAME.items() for name in names} | dict(_INSTEAD)


def advice(key: str) -> str | None:
    """What to write in place of another trainer's setting; None for a name that is none.

    Args:
        key: the name as it was written, with hyphens or underscores.
    """
    name = key.lower().replace("-", "_")
    if name in _KEYS:
        return _KEYS[name]
    return next((text for words, text in _SUBJECTS.items() if re.search(f"(?:^|_)(?:{words})(?:_|$)", name)), None)
