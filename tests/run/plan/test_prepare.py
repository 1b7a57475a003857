"""What `prepare` refuses before any weight is read, and the estimates that `inspect` makes of a run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_project import MODEL, TEMPLATE

from fastpref.errors import CheckpointError, ConfigError
from fastpref.run.architecture.architecture import Architecture
from fastpref.run.config.layout import ParallelLayout
from fastpref.run.config.run_file import load_run_config
from fastpref.run.plan import preview
from fastpref.run.plan.pipeline import plan_pipeline
from fastpref.run.plan.prepare import PreparedRun, launched_world_size, prepare
from fastpref.testing.workers import RankPool
from fastpref.trainer.model.build import ModelOptions, build_models
from fastpref.trainer.ranks import platform


def prepared(*overrides: str, world_size: int = 1) -> PreparedRun:
    return prepare(load_run_config("run.yaml", overrides), world_size)


def refusal(*overrides: str, world_size: int = 1) -> str:
    with pytest.raises(ConfigError) as caught:
        prepared(*overrides, world_size=world_size)
    return str(caught.value)


def test_prepare_lists_every_missing_path(project: Path) -> None:
    message = refusal(
        "model={path: policy, tokenizer: words}",
        "reference.path=frozen",
        "data.train=[pairs.jsonl, more.jsonl]",
        "data.eval=less.jsonl",
    )
    for text in (
        "model.path: 'policy' is not a directory",
        "model.tokenizer: 'words' is not a directory",
        "reference.path: 'frozen' is not a directory",
        "data.train: 'more.jsonl' does not exist",
        "data.eval: 'less.jsonl' does not exist",
    ):
        assert f"{text}; relative paths start at the current directory, {project}" in message
    heading, *lines = message.splitlines()
    assert heading == "5 problems:" and len(lines) == 5


def test_prepare_refuses_paths_that_only_a_shell_knows(project: Path) -> None:
    message = refusal("training.output_dir='~/runs'", 'data.eval="a\\0b"')
    assert "training.output_dir: '~/runs' begins with ~" in message
    assert "data.eval: 'a\\x00b'" in message


@pytest.mark.parametrize(
    ("name", "value"), [("NVTE_FLASH_ATTN", "0"), ("NVTE_FUSED_ATTN", ""), ("NVTE_UNFUSED_ATTN", "true")]
)
def test_switches_of_attention_that_megatron_refuses_are_named(
    project: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """Megatron asserts that they are 1 while it builds a model, of its own layers, too."""
    for switch in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        monkeypatch.setenv(switch, "1")
    prepared()
    monkeypatch.setenv(name, value)
    message = f"{name} is {value!r} in the environment, and Megatron builds no model where it is not 1; unset {name}"
    assert refusal("training.transformer_impl=local") == message
    monkeypatch.delenv(name)  # the remedy
    prepared()


def test_prepare_refuses_an_output_that_is_a_file(project: Path) -> None:
    (project / "out").write_text("x")
    assert "training.output_dir: 'out' exists and is not a directory" in refusal()


@pytest.mark.parametrize(
    ("overrides", "world_size", "texts"),
    [
        (
            ("training.tensor_model_parallel_size=3",),
            3,
            ["divide num_attention_heads 4 and divide num_key_value_heads 2 or be", "got 3; nearest valid: 2 or 4"],
        ),
        (
            ("training.tensor_model_parallel_size=16",),
            16,
            ["divide num_attention_heads 4 and divide intermediate_size 24, got 16; nearest valid: 4"],
        ),
        (
            ("training.pipeline_model_parallel_size=3",),
            3,
            ["must not exceed num_hidden_layers 2, got 3; nearest valid: pipeline_model_parallel_size 2"],
        ),
        (
            ("training.pipeline_model_parallel_size=2", "training.virtual_pipeline_model_parallel_size=2"),
            2,
            ["virtual_pipeline_model_parallel_size must not exceed num_hidden_layers 2, got 2 * 2; nearest valid: "],
        ),
        (
            ("training.tensor_model_parallel_size=2", "training.pipeline_model_parallel_size=2"),
            6,
            [
                "tensor_model_parallel_size * pipeline_model_parallel_size = 2 * 2 must divide",
                "got 6; start 4 or 8 (torchrun",
            ],
        ),
        (
            ("training.tensor_model_parallel_size=3", "training.pipeline_model_parallel_size=3"),
            2,
            ["must divide the number of ranks", "num_attention_heads 4", "num_hidden_layers 2"],
        ),
        (("data.train=[]",), 1, ["data.train names no file"]),
        (
            ("data.eval=[]", "training.eval_steps=2"),
            1,
            ["training.eval_steps (2) needs data.eval, which names no file"],
        ),
        (
            ("data.eval=[]", "training.eval_on_start=true"),
            1,
            ["training.eval_on_start (True) needs data.eval, which names no file"],
        ),
        (("training.warmup_steps=3",), 1, ["warm-up takes 3 of 3 steps; lower training.warmup_steps"]),
        (("training.drop_last=true", "training.per_device_train_batch_size=6"), 1, ["10 pairs", "needs 12"]),
        (("loss.pref_loss=aot",), 1, ["aot sorts the pairs of a whole batch"]),
        (("model.config.vocab_size=20",), 1, ["pairs.jsonl:", "the model's vocabulary has 20 entries"]),
        (("model.config.max_position_embeddings=8",), 1, ["pairs.jsonl:1: 10 tokens", "max_position_embeddings is 8"]),
        (("model.config.model_type=gpt2",), 1, ["model_type must be one of llama"]),
    ],
)
def test_prepare_refuses(project: Path, overrides: tuple[str, ...], world_size: int, texts: list[str]) -> None:
    message = refusal(*overrides, world_size=world_size)
    for text in texts:
        assert text in message


def test_prepare_accepts_rows_of_exactly_the_positions(project: Path) -> None:
    # 10 tokens are 9 positions: the last token is only a label
    assert len(prepared("model.config.max_position_embeddings=9").train) == 10


def test_prepare_refuses_a_reference_of_another_architecture(project: Path) -> None:
    (project / "frozen").mkdir()
    (project / "frozen" / "config.json").write_text(json.dumps({**MODEL, "hidden_size": 32, "vocab_size": 40}))
    message = refusal("reference.path=frozen")
    assert "reference.path: hidden_size must be the policy's, 16, got 32" in message
    assert "reference.path: vocab_size must be the policy's, 32, got 40" in message


def test_prepare_needs_the_checkpoint_to_continue_from(project: Path) -> None:
    with pytest.raises(CheckpointError, match="no finished checkpoint under out/checkpoints"):
        prepared("training.resume_from_checkpoint=latest")


def test_prepare_for_evaluation_alone(project: Path) -> None:
    run = prepare(
        load_run_config("run.yaml", ["data.train=gone.jsonl", "training.warmup_steps=99"]), 1, for_training=False
    )
    assert run.train is None and len(run.eval) == 4


def test_chat_template_of_a_run_is_the_tokenizers(project: Path) -> None:
    """Whether it is given as text or as a file: for the tokens, the reference's identity and what is exported."""
    template = TEMPLATE.replace("<|end|>", " w0<|end|>")
    (project / "chat.jinja").write_text(template)
    runs = [prepared(f"data.chat_template={text}") for text in ("chat.jinja", json.dumps(template))]
    assert [run.tokenizer.chat_template for run in runs] == [template, template]
    assert runs[0].train.sha256 == runs[1].train.sha256 != prepared().train.sha256
    ids = runs[0].train[0].chosen_input_ids[: runs[0].train[0].num_prompt_tokens]
    assert runs[0].tokenizer.convert_ids_to_tokens(ids)[-3:] == ["w0", "<|end|>", "<|assistant|>"]


def test_chat_template_that_is_no_file_is_a_problem_of_its_key(project: Path) -> None:
    message = refusal("data.chat_template=chat.jinja")
    assert message.startswith("data.chat_template: 'chat.jinja' is no file")
    assert f"relative paths start at {project}" in message


def test_prepare_counts_batches_and_steps(project: Path) -> None:
    run = prepared("training.num_train_epochs=3", world_size=2)
    schedule = run.schedule
    assert (schedule.dp_size, schedule.global_batch_pairs, schedule.steps_per_epoch, schedule.total_steps) == (
        2,
        8,
        2,
        6,
    )
    assert prepared("training.max_steps=7", world_size=2).schedule.total_steps == 7
    assert prepared("training.drop_last=true", world_size=2).schedule.steps_per_epoch == 1


def test_collator_pads_and_masks_as_configured(project: Path) -> None:
    run = prepared("data.pad_to_multiple_of=16", "loss={pref_loss: sigmoid, ld_alpha: 0.5}")
    batch = run.collator()(run.train[:2])
    assert batch["input_ids"].shape == (4, 16)
    assert "nll_labels" in batch


def test_launched_world_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert launched_world_size() == 1
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert launched_world_size() == 6
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(ConfigError, match="WORLD_SIZE must be a number of ranks >= 1, got 'many'"):
        launched_world_size()


def built_parameters(config: dict, layout: ParallelLayout) -> tuple[int, int]:
    """(pipeline stage, parameters) of this rank."""
    platform.initialize_distributed()
    platform.initialize_model_parallel(layout.tp, layout.pp, ep=layout.ep)
    try:
        (model,) = build_models(config, ModelOptions(sequence_parallel=layout.sequence_parallel), seed=0)
        stage = torch.distributed.get_rank() * layout.pp // torch.distributed.get_world_size()
        return stage, sum(parameter.numel() for parameter in model.parameters())
    finally:
        platform.destroy()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_stage_parameters_are_those_of_the_built_model(rank_pool_2: RankPool, tp: int, pp: int, tied: bool) -> None:
    config = {**MODEL, "model_type": "qwen2", "vocab_size": 33, "num_hidden_layers": 3, "tie_word_embeddings": tied}
    plan = plan_pipeline(config["num_hidden_layers"], ParallelLayout(pp=pp))
    layout = ParallelLayout(tp=tp, pp=pp)
    expected = preview.stage_parameters(Architecture.from_hf(config), layout, plan)
    built = rank_pool_2.run(built_parameters, config, layout)
    assert [sum(expected[stage]) for stage, _ in built] == [size for _, size in built]


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True}


@pytest.mark.parametrize(
    "layout",
    [ParallelLayout(ep=2), ParallelLayout(tp=2, ep=2, sequence_parallel=True), ParallelLayout(pp=2)],
    ids=["ep2", "tp2-ep2", "pp2"],
)
def test_stage_parameters_of_experts_are_those_of_the_built_model(
    rank_pool_2: RankPool, layout: ParallelLayout
) -> None:
    config = {**MODEL, **EXPERTS, "model_type": "qwen3_moe"}
    arch = Architecture.from_hf(config)
    expected = preview.stage_parameters(arch, layout, plan_pipeline(config["num_hidden_layers"], layout))
    built = rank_pool_2.run(built_parameters, config, layout)
    assert [sum(expected[stage]) for stage, _ in built] == [size for _, size in built]
    whole, active = preview.model_parameters(arch)
    experts = 2 * 4 * 3 * 48 * config["hidden_size"]
    assert active == whole - experts // 2
    assert sum(stage_experts for _, stage_experts in expected) * layout.ep == experts


def kept_bytes(config: dict, options: ModelOptions, num_tokens: int) -> int:
    """Bytes that autograd keeps for the backward pass of the layers, parameters aside."""
    (model,) = build_models(config, options, seed=0)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    input_ids = torch.arange(num_tokens).remainder(config["vocab_size"]).view(4, -1)
    length = input_ids.size(1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        embedded = model.embedding(input_ids, torch.arange(length).expand(4, -1))
        output = model.decoder(hidden_states=embedded, attention_mask=None, rotary_pos_emb=model.rotary_pos_emb(length))
    size = sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in parameters)
    output.sum().backward()  # lets go of what it keeps, the model among it
    kept.clear()
    return size


@pytest.mark.parametrize("precision", ["", "training.bf16=true"])
@pytest.mark.parametrize(
    ("model_type", "recompute"),
    [
        ("llama", "null"),
        ("llama", "selective"),
        ("llama", "full"),
        ("qwen3", "null"),
        ("gemma3_text", "null"),
        ("gemma3_text", "full"),
        ("qwen3_moe", "null"),
        ("qwen3_moe", "full"),
    ],
)
def test_activation_estimate_is_what_autograd_keeps(
    project: Path, precision: str, model_type: str, recompute: str
) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 8, "num_key_value_heads": 2}
    sizes["head_dim"] = 16
    if model_type == "qwen3_moe":
        # Megatron's own tally of load-balancing losses is made for the first model of a process
        sizes |= {**EXPERTS, "router_aux_loss_coef": 0.0}
    overrides = [
        f"training.recompute_granularity={recompute}",
        "data.pad_to_multiple_of=128",
        *filter(None, [precision]),
    ]

    def estimate(num_layers: int) -> tuple[int, int]:
        config = {**MODEL, **sizes, "model_type": model_type, "num_hidden_layers": num_layers}
        run = prepared(*overrides, f"model.config={json.dumps(config)}")
        dtype = torch.bfloat16 if precision else torch.float32
        granularity = None if recompute == "null" else recompute
        options = ModelOptions(params_dtype=dtype, recompute_granularity=granularity)
        return preview.estimate_memory(run).activations, kept_bytes(config, options, 4 * preview.longest_row(run))

    platform.initialize_distributed()
    platform.initialize_model_parallel()
    try:
        (few, few_kept), (many, many_kept) = estimate(2), estimate(6)
    finally:
        platform.destroy()
    # per layer, so that what the embedding and the last norm keep does not count
    assert many - few == pytest.approx(many_kept - few_kept, rel=0.03)


def test_memory_estimate_adds_up(project: Path) -> None:
    fp32, bf16 = (preview.estimate_memory(prepared(f"training.bf16={value}")) for value in ("false", "true"))
    size = fp32.parameters
    layout = ParallelLayout()
    ((shared, experts),) = preview.stage_parameters(Architecture.from_hf(MODEL), layout, plan_pipeline(2, layout))
    assert (size, size, size, 0) == (shared, fp32.model_parameters, fp32.active_parameters, experts)
    assert (fp32.weights, fp32.reference, fp32.gradients, fp32.optimizer) == (4 * size, 4 * size, 4 * size, 8 * size)
    assert (bf16.weights, bf16.reference, bf16.gradients, bf16.optimizer) == (2 * size, 2 * size, 4 * size, 12 * size)
    assert fp32.total == 20 * size + fp32.activations + fp32.head
    assert preview.estimate_memory(prepared("loss.pref_loss=orpo")).reference == 0
    sharded = preview.estimate_memory(prepared("training.use_distributed_optimizer=true", world_size=4))
    assert sharded.optimizer == 2 * size


WIDE = f"model.config={json.dumps({**MODEL, 'vocab_size': 8200})}"
SCREENED = "training.head_forward=screened"


@pytest.mark.parametrize(
    ("settings", "heads", "rows"),
    [
        ([], 2, 8200),  # the policy's, and that of a reference with weights of its own
        (["reference.mode=precomputed"], 1, 8200),
        (["loss.pref_loss=orpo"], 1, 8200),
        (["lora.r=2"], 1, 8200),
        (["training.tensor_model_parallel_size=2"], 2, 4100),
    ],
)
def test_memory_estimate_counts_screened_heads(project: Path, settings: list[str], heads: int, rows: int) -> None:
    world_size = 8200 // rows
    exact, screened = (
        preview.estimate_memory(prepared(WIDE, *settings, *plan, world_size=world_size)) for plan in ([], [SCREENED])
    )
    # 16 bytes and an fp32 scale a row
    assert (exact.screened, screened.screened) == (0, heads * rows * 20)
    assert screened.total == exact.total + screened.screened


def test_last_stage_alone_has_a_screened_head(project: Path) -> None:
    run = prepared(WIDE, SCREENED, "training.pipeline_model_parallel_size=2", world_size=2)
    first, last = preview._stage_memories(run)
    assert (first.screened, last.screened) == (0, 2 * 8200 * 20)


def test_screened_head_needs_columns(project: Path) -> None:
    message = refusal(SCREENED)
    assert "training.head_forward screened needs 4096 columns of the vocabulary on a rank, got 32 on 1" in message
    assert message.endswith("the exact pass would take its place; set exact")
    shared = refusal(WIDE, SCREENED, "training.tensor_model_parallel_size=4", world_size=4)
    assert "got 8200 on 4: " in shared and shared.endswith("set exact, or lower tensor_model_parallel_size")


def test_full_logits_are_those_of_one_microbatch(project: Path) -> None:
    run = prepared("training.tensor_model_parallel_size=2", world_size=2)
    # 4 rows of 16 positions over half of 32 columns in fp32
    assert preview.longest_row(run) == 16
    assert preview.full_logits_bytes(run) == 4 * 16 * 16 * 4


def test_pair_views_hold_every_token(project: Path) -> None:
    run = prepared()
    first, second = preview.pair_views(run)
    assert first.source == "pairs.jsonl:1" and second.source == "pairs.jsonl:2"
    ids = run.train[0]
    assert len(first.prompt) + len(first.chosen) == len(ids.chosen_input_ids)
    assert len(first.prompt) + len(first.rejected) == len(ids.rejected_input_ids)
    assert "".join(first.rejected) == "w5w6w7<|end|>"
    evaluation = replace(run, train=None)
    assert preview.pair_views(evaluation)[0].source == "held_out.jsonl:1"
