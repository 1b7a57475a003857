"""Keys of a `config.json` that say nothing about the model: what passes although nothing here reads it.

A key is *inert* where no value of it has an effect on the weights or the forward pass of training, and *neutral at* a
value where this value asks for what the family does anyway, or for nothing. transformers reads none of these in the
supported families, or reads them for other purposes than the forward pass; other programs that read one of the second
kind do something else at its other values, which are therefore refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastpref.run.architecture.families import Activation, Family

# What the library that wrote the file keeps for itself, by the first letters.
_PRIVATE_PREFIXES = ("_", "unsloth_")

# How answers are sampled: transformers before 4.40 kept this in the model's own file.
_GENERATION = """
    assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight assistant_lookbehind bad_words_ids
    begin_suppress_tokens cache_config cache_implementation compile_config constraints continuous_batching_config
    custom_generate decoder_start_token_id disable_compile diversity_penalty do_sample dola_layers early_stopping
    encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff eta_cutoff
    exponential_decay_length_penalty force_words_ids forced_bos_token_id forced_decoder_ids forced_eos_token_id
    generation_config guidance_scale is_assistant length_penalty low_memory max_cache_len max_length
    max_matching_ngram_size max_new_tokens max_time min_length min_new_tokens min_p monotonic_scaling
    no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams
    num_return_sequences output_attentions output_hidden_states output_logits output_scores penalty_alpha
    prefill_chunk_size prompt_lookup_num_tokens remove_invalid_values renormalize_logits repetition_penalty
    return_dict_in_generate sequence_bias speculation_type stop_strings suppress_tokens target_lookbehind
    temperature token_healing top_h top_k top_p typical_p use_cache use_mtp watermarking_config
"""

# Tokens: the data and the tokenizer's own files say which are used.
_TOKENS = """
    add_bos_token add_eos_token bos_token bos_token_id chat_template cls_token_id eos_token eos_token_id
    ignore_index mask_token_id pad_token pad_token_id prefix sep_token_id tokenizer_class tokenizer_model_max_length
    tokenizer_padding_side tokenizer_path tokenizer_type unk_token unk_token_id
"""

# Lengths beside `max_position_embeddings`, the one that transformers reads.
_LENGTHS = "max_seq_len max_seq_length max_sequence_length model_max_length seq_len seq_length"

# Number formats, kernels, memory and parallel layout: this trainer's own settings say those.
_IMPLEMENTATION = """
    attn_implementation chunk_size_feed_forward dtype experts_implementation flash_attention flash_attn
    fuse_attention_ffn fuse_attention_qkv fused_rope gradient_checkpointing params_dtype pretraining_tp
    tensor_parallel_degree tensor_parallel_output torch_dtype torchscript use_bfloat16 use_flash_attention
    use_flash_attention_2 use_flash_attn use_flash_attn_2 use_fused_rms_norm use_fused_rope
    use_memory_efficient_attention use_recompute use_reentrant_checkpointing use_sdpa use_xformers
    virtual_pp_degree world_size
"""

# Heads of classifiers, labels and loss functions, of which a language model has none.
_OTHER_TASKS = """
    classifier_dropout finetuning_task id2label label2id loss_type num_labels problem_type task_specific_params
    tf_legacy_loss
"""

# Where the file comes from, how it was loaded, and what programs beside transformers note down in it.
_RECORDS = """
    architectures author base_model description device_map ignore_keys_at_rope_validation is_composition is_decoder
    library_name license local_files_only low_cpu_mem_usage model_name name_or_path neftune_noise_alpha neuron onnx
    paddlenlp_version pipeline_tag return_dict revision tags tie_last_hidden_states transformers.js_config
    transformers_version trust_remote_code version
"""

_INERT = frozenset("".join((_GENERATION, _TOKENS, _LENGTHS, " ", _IMPLEMENTATION, _OTHER_TASKS, _RECORDS)).split())

# Probabilities of dropping: a model answers without, and is trained without here, as TRL's DPO does unless told else.
_DROPOUT = """
    attention_dropout attention_dropout_prob attention_probs_dropout_prob attn_dropout attn_pdrop dropout
    embd_pdrop embedding_dropout ffn_dropout hidden_dropout hidden_dropout_prob mlp_dropout resid_pdrop
    residual_dropout
"""
DROPOUT_KEYS = tuple(_DROPOUT.split())

_OFF = """
    add_cross_attention alibi attention_out_bias interleaved_rope is_encoder_decoder lm_head_bias
    parallel_attn parallel_residual rope_interleaved tie_encoder_decoder use_alibi
    use_dynamic_ntk use_logn_attn use_mrope use_parallel_residual
"""
_ON = "causal is_causal is_llama_config use_rmsnorm use_rope"
_ZERO = """
    first_k_dense_replace hidden_size_per_layer_input layerdrop moe_shared_expert_intermediate_size mtp_num_layers
    n_shared_experts num_kv_shared_layers num_mtp_layers num_nextn_predict_layers num_shared_experts
    router_jitter_noise router_z_loss_coef shared_expert_intermediate_size
"""
_ONE = """
    embedding_multiplier logit_scale logits_scaling residual_multiplier rope_pct rope_percentage rope_scaling_factor
    rotary_pct rotary_percentage scale_emb
"""
_EMPTY = "auto_map no_split_layers onnx_config pruned_heads"

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(_OFF.split(), (False,)),
    **dict.fromkeys(_ON.split(), (True,)),
    **dict.fromkeys(_ZERO.split(), (0,)),
    **dict.fromkeys(_ONE.split(), (1,)),
    **dict.fromkeys(_EMPTY.split(), ({}, [])),
    "norm_type": ("rmsnorm", "rms_norm", "RMSNorm"),
    "normalization": ("rmsnorm", "rms_norm", "RMSNorm"),
    "position_embedding_type": ("rope", "rotary"),
    "rope_type": ("default",),
}

# Settings of experts that mean something only beside a number of experts, which a dense family refuses.
_EXPERT_SETTINGS = frozenset(("decoder_sparse_step", "norm_topk_prob", "output_router_logits", "router_aux_loss_coef"))
_EXPERT_COUNTS = (
    "moe_intermediate_size",
    "n_routed_experts",
    "num_experts",
    "num_experts_per_tok",
    "num_local_experts",
)

_ACTIVATION_KEYS = ("activation", "activation_function", "hidden_act", "hidden_activation", "mlp_hidden_act")
# Other spellings of the one function; the first is transformers' own.
ACTIVATION_NAMES: dict[Activation, tuple[str, ...]] = {
    "silu": ("silu", "swish"),
    "gelu_pytorch_tanh": ("gelu_pytorch_tanh",),
}
_GATED_ACTIVATION_NAMES: dict[Activation, tuple[str, ...]] = {"silu": ("swiglu",), "gelu_pytorch_tanh": ("geglu",)}
_QK_NORM_KEYS = ("qk_layer_norms", "qk_layernorm", "qk_norm", "use_qk_layernorm", "use_qk_norm")
_QKV_BIAS_KEYS = ("attention_qkv_bias", "qkv_bias", "use_qkv_bias")
_BIAS_KEYS = ("bias", "use_bias")


def without_inert(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Return the entries of a family's `config.json` whose keys can have an effect."""
    inert = _INERT | _EXPERT_SETTINGS if family.experts is None else _INERT
    return {
        key: value for key, value in config.items() if key not in inert and not str(key).startswith(_PRIVATE_PREFIXES)
    }


def neutral_values(family: Family, *, qkv_bias: bool) -> dict[str, tuple[Any, ...]]:
    """Return the values at which keys that nothing reads ask for nothing but what the model does anyway.

    Args:
        family: the model's family.
        qkv_bias: its query, key and value projections have a bias.
    """
    found = dict(_NEUTRAL)
    activation = family.activation[1]
    found |= dict.fromkeys(_ACTIVATION_KEYS, ACTIVATION_NAMES[activation] + _GATED_ACTIVATION_NAMES[activation])
    found |= dict.fromkeys(_QK_NORM_KEYS, (family.qk_norm,))
    found |= dict.fromkeys(_QKV_BIAS_KEYS, (qkv_bias,))
    if not qkv_bias:
        found |= dict.fromkeys(_BIAS_KEYS, (False,))
    if family.experts is None:
        found |= dict.fromkeys(_EXPERT_COUNTS, (0,))
    return found | {"decoder_sparse_step": (1,), "mlp_only_layers": ([],), "norm_topk_prob": (True,)}
