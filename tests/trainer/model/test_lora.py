"""Adapters compute what peft's do on transformers models, in every layout, and cross between the two both ways."""

import copy
import json
from pathlib import Path

import hf_oracle
import megatron_runs
import pytest
import torch
from megatron_runs import Layout
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fastpref.errors import CheckpointError, ConfigError
from fastpref.run.architecture.architecture import Architecture
from fastpref.run.architecture.lora_config import TARGETS
from fastpref.run.plan.pipeline import PipelinePlan
from fastpref.testing.numerics import assert_within_rule
from fastpref.testing.workers import RankPool
from fastpref.trainer import LoraConfig, ModelOptions, add_lora, build_models, load_models, save_adapter
from fastpref.trainer.model.lora import adapters_of, lora_of
from fastpref.trainer.model.request import PassRequest, answering

peft = pytest.importorskip("peft", reason="peft, the oracle of the adapters, is not installed")

SUBSETS = {
    "all": TARGETS,
    "q-v": ("q_proj", "v_proj"),
    "k-up-down": ("k_proj", "up_proj", "down_proj"),
    "o-gate": ("o_proj", "gate_proj"),
}


def make_adapter(model: torch.nn.Module, path: Path, lora: LoraConfig) -> torch.nn.Module:
    """Wraps `model` with peft's adapters, neither factor zero, and saves them to `path`."""
    config = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=list(lora.target_modules),
        use_rslora=lora.use_rslora,
        task_type="CAUSAL_LM",
    )
    wrapped = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.5 / parameter.size(1) ** 0.5, generator=generator)
    wrapped.save_pretrained(path)
    return wrapped.eval()


def check(run, variant: str, targets: tuple, layout: Layout, tmp_path: Path, options: ModelOptions, **settings) -> None:
    lora = LoraConfig(r=3, lora_alpha=4.0, target_modules=targets, path=str(tmp_path / "adapter"), **settings)
    model = hf_oracle.make_model(variant)
    path = hf_oracle.save(model, tmp_path / "model")
    problem = hf_oracle.make_problem(model.config.vocab_size)
    wrapped = make_adapter(model, tmp_path / "adapter", lora)
    answers = [hf_oracle.answer(wrapped, problem), hf_oracle.answer_fp64(wrapped, problem)]
    fp32, exact = (
        hf_oracle.Answer(a.logits_SLV, {name.replace(".default", ""): g for name, g in a.gradients.items()})
        for a in answers
    )
    logits = run(megatron_runs.answer_lora, str(path), lora, str(tmp_path / "out"), layout, problem, options)
    (logits,) = [each for each in logits if each is not None][-1:]
    got = hf_oracle.Answer(logits, load_file(tmp_path / "out" / "adapter_model.safetensors"))
    hf_oracle.assert_as_accurate(got, fp32, exact)


def alone(function, *args) -> list:
    return [function(*args)]


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("variant", ["llama", "qwen2"])
def test_lora_equals_peft(variant: str, subset: str, tmp_path: Path) -> None:
    check(alone, variant, SUBSETS[subset], Layout(), tmp_path, ModelOptions())


def test_lora_scales_by_the_root_of_the_rank_on_request(tmp_path: Path) -> None:
    check(alone, "gemma3", TARGETS, Layout(), tmp_path, ModelOptions(), use_rslora=True)


@pytest.mark.parametrize("variant", ["qwen2", "gemma3"])
def test_lora_in_bfloat16_is_as_accurate_as_peft(variant: str, tmp_path: Path) -> None:
    lora = LoraConfig(r=3, lora_alpha=4.0, path=str(tmp_path / "adapter"))
    model = hf_oracle.make_model(variant).bfloat16()
    path = hf_oracle.save(model, tmp_path / "model")
    # peft keeps adapters of 16-bit models in fp32: here they are what ours are, in the file, too
    wrapped = make_adapter(model, tmp_path / "adapter", lora).bfloat16()
    wrapped.save_pretrained(tmp_path / "adapter")
    problem = hf_oracle.make_problem(model.config.vocab_size)
    options = ModelOptions(params_dtype=torch.bfloat16)
    logits = megatron_runs.answer_lora(str(path), lora, str(tmp_path / "out"), Layout(), problem, options)
    gradients = load_file(tmp_path / "out" / "adapter_model.safetensors")
    plain, exact = hf_oracle.answer(wrapped, problem), hf_oracle.answer_fp64(wrapped, problem)
    assert_within_rule(logits, plain.logits_SLV, exact.logits_SLV)
    assert set(gradients) == {name.replace(".default", "") for name in exact.gradients}
    for name, truth in exact.gradients.items():
        ours = gradients[name.replace(".default", "")]
        assert_within_rule(ours, plain.gradients[name], truth, kind="gradient")


@pytest.mark.parametrize("granularity", ["full", "selective"])
def test_lora_recompute_changes_nothing(granularity: str, tmp_path: Path) -> None:
    check(alone, "qwen2", TARGETS, Layout(), tmp_path, ModelOptions(recompute_granularity=granularity))


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(tp=2, sp=True), Layout(pp=2), Layout(pp=2, vpp=2)], ids=str)
@pytest.mark.parametrize(
    ("variant", "subset"), [("qwen2", "all"), ("llama-tied-odd-vocab", "k-up-down"), ("gemma3", "q-v")]
)
def test_lora_on_two_ranks_equals_peft(
    rank_pool_2: RankPool, variant: str, subset: str, layout: Layout, tmp_path: Path
) -> None:
    check(rank_pool_2.run, variant, SUBSETS[subset], layout, tmp_path, ModelOptions(sequence_parallel=layout.sp))


def test_lora_with_a_stage_of_the_head_alone_equals_peft(rank_pool_2: RankPool, tmp_path: Path) -> None:
    options = ModelOptions(pipeline_plan=PipelinePlan(2, (4, 0)))
    check(rank_pool_2.run, "llama", TARGETS, Layout(pp=2), tmp_path, options)


@pytest.mark.parametrize("layout", [Layout(tp=4), Layout(tp=2, pp=2, sp=True)], ids=str)
def test_lora_on_four_ranks_equals_peft(rank_pool_4: RankPool, layout: Layout, tmp_path: Path) -> None:
    """Four ranks share two key heads: a rank's rows of the fused layer end inside a group."""
    options = ModelOptions(sequence_parallel=layout.sp, recompute_granularity="full")
    check(rank_pool_4.run, "qwen2", SUBSETS["q-v"], layout, tmp_path, options)


def test_lora_with_fused_norm_reads_normed_input(tmp_path: Path, one_rank) -> None:
    """Transformer Engine's layers hold the norm before them; the adapter must see what the weight sees."""
    config = hf_oracle.VARIANTS["llama"].to_dict()
    (model,) = build_models(config, ModelOptions(transformer_impl="local"), seed=0)
    add_lora([model], config, LoraConfig(r=2), seed=0)
    linear = model.decoder.layers[0].self_attention.linear_qkv
    torch.nn.init.normal_(linear.adapter.lora_B)
    hidden_LSI = torch.randn(5, 1, 48)
    weight_I = torch.randn(48)
    norm = torch.nn.RMSNorm(48, eps=1e-3)
    norm.weight.data.copy_(weight_I)
    expected, _ = linear(norm(hidden_LSI))
    base = linear.weight
    for gamma, zero_centered in ((weight_I, False), (weight_I - 1, True)):

        class FusedNormLinear(torch.nn.Module):
            layer_norm_weight, eps, zero_centered_gamma, weight = gamma, 1e-3, zero_centered, base

            def forward(self, input_LSI):
                return norm(input_LSI) @ self.weight.t(), None

        fused = FusedNormLinear()
        fused.register_forward_hook(linear.adapter.add_to)
        torch.testing.assert_close(fused(hidden_LSI)[0], expected)


# --- files


def lora_of_files(directory: Path, **settings) -> LoraConfig:
    return LoraConfig(**{"r": 3, "lora_alpha": 4.0, "path": str(directory), **settings})


@pytest.fixture
def saved(tmp_path: Path) -> tuple[torch.nn.Module, Path, Path]:
    """A model with peft's adapters, its directory, and theirs."""
    model = hf_oracle.make_model("qwen2")
    path = hf_oracle.save(model, tmp_path / "model")
    wrapped = make_adapter(model, tmp_path / "adapter", LoraConfig(r=3, lora_alpha=4.0))
    return wrapped, path, tmp_path / "adapter"


@pytest.fixture
def one_rank():
    with megatron_runs.parallel(Layout()):
        yield


def test_export_gives_peft_back_what_it_wrote(saved, tmp_path: Path, rank_pool_4: RankPool) -> None:
    wrapped, path, adapter = saved
    ids_SL = hf_oracle.make_problem(96).input_ids_SL
    expected_SLV = wrapped(ids_SL).logits
    merged_SLV = copy.deepcopy(wrapped).merge_and_unload()(ids_SL).logits
    checksums = {megatron_runs.reexport_lora(str(path), lora_of_files(adapter), str(tmp_path / "one"), Layout())}
    for layout in (Layout(tp=2, pp=2, sp=True), Layout(tp=4)):
        out = tmp_path / str(layout)
        checksums |= set(
            rank_pool_4.run(megatron_runs.reexport_lora, str(path), lora_of_files(adapter), str(out), layout)
        )
    assert len(checksums) == 1
    for out in (tmp_path / "one", tmp_path / str(Layout(tp=2, pp=2, sp=True)), tmp_path / str(Layout(tp=4))):
        hf_oracle.assert_same_bits(hf_oracle.read_tensors(out / "adapter"), hf_oracle.read_tensors(adapter))
        base = AutoModelForCausalLM.from_pretrained(path)
        assert torch.equal(peft.PeftModel.from_pretrained(base, out / "adapter")(ids_SL).logits, expected_SLV)
        ours_SLV = AutoModelForCausalLM.from_pretrained(out / "merged")(ids_SL).logits
        torch.testing.assert_close(ours_SLV, merged_SLV)


def test_export_of_a_subset_names_only_its_targets(tmp_path: Path, one_rank) -> None:
    config = hf_oracle.VARIANTS["llama"].to_dict()
    models = build_models(config, seed=0)
    add_lora(models, config, LoraConfig(r=2, target_modules=SUBSETS["k-up-down"]), seed=0)
    save_adapter(models, tmp_path / "out")
    tensors = hf_oracle.read_tensors(tmp_path / "out")
    assert len(tensors) == 4 * 3 * 2
    assert tensors["base_model.model.model.layers.3.self_attn.k_proj.lora_B.weight"].shape == (24, 2)
    assert {name.split(".")[-3] for name in tensors} == set(SUBSETS["k-up-down"])


def test_initial_adapters_are_pefts_and_the_same_in_every_layout(tmp_path: Path, rank_pool_2: RankPool) -> None:
    model = hf_oracle.make_model("llama")
    path = hf_oracle.save(model, tmp_path / "model")
    runs = {"one": Layout(), "tp": Layout(tp=2), "pp": Layout(pp=2)}
    for name, layout in runs.items():
        run = alone if name == "one" else rank_pool_2.run
        run(megatron_runs.reexport_lora, str(path), LoraConfig(r=16), str(tmp_path / name), layout)
    tensors = hf_oracle.read_tensors(tmp_path / "one" / "adapter")
    for name in runs:
        hf_oracle.assert_same_bits(hf_oracle.read_tensors(tmp_path / name / "adapter"), tensors)
        hf_oracle.assert_same_bits(hf_oracle.read_tensors(tmp_path / name / "merged"), hf_oracle.read_tensors(path))
    theirs = dict(peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules=list(TARGETS))).named_parameters())
    for name, tensor in tensors.items():
        if name.endswith("lora_B.weight"):
            assert not tensor.any()
        else:  # uniform: the largest of many draws comes close to the bound, in ours as in peft's
            bound = tensor.size(1) ** -0.5
            largest = theirs[name.replace("lora_A", "lora_A.default")].abs().max().item()
            assert 0.98 * bound < tensor.abs().max() <= bound and 0.98 * bound < largest <= bound
    assert len({tensor.sum().item() for name, tensor in tensors.items() if "lora_A" in name}) == len(tensors) // 2


def test_reference_pass_is_the_base_model(saved, one_rank) -> None:
    _, path, adapter = saved
    ids_SL, positions_SL = hf_oracle.make_problem(96).input_ids_SL, torch.arange(24)[None].expand(2, -1)
    plain = load_models(path)[0](ids_SL, positions_SL, None)
    (model,) = load_models(path)
    add_lora([model], path, lora_of_files(adapter), seed=0)
    adapted = model(ids_SL, positions_SL, None)
    with answering(model, PassRequest(is_reference=True)):
        assert torch.equal(model(ids_SL, positions_SL, None), plain)
    assert torch.equal(model(ids_SL, positions_SL, None), adapted)
    assert (adapted - plain).abs().max() > 0.1


def test_only_adapters_are_trained(tmp_path: Path, one_rank) -> None:
    config = hf_oracle.VARIANTS["llama-tied-odd-vocab"].to_dict()
    (model,) = build_models(config, seed=0)
    add_lora([model], config, LoraConfig(r=2), seed=0)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(adapters_of(model)) == 16 and len(trained) == 32 and all(".adapter.lora_" in name for name in trained)


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(tp=2, sp=True)], ids=str)
def test_every_adapter_counts_once_in_the_gradient_norm(rank_pool_2: RankPool, layout: Layout) -> None:
    config = hf_oracle.VARIANTS["qwen2"].to_dict()
    counts = rank_pool_2.run(megatron_runs.counted_parameters, config, layout, LoraConfig(r=2))
    whole = peft.get_peft_model(hf_oracle.make_model("qwen2"), peft.LoraConfig(r=2, target_modules=list(TARGETS)))
    assert sum(counts) == sum(parameter.numel() for parameter in whole.parameters() if parameter.requires_grad)


# --- dropout


def test_dropout_acts_in_training_only_and_follows_the_seed(one_rank) -> None:
    config = hf_oracle.VARIANTS["llama"].to_dict()
    (model,) = build_models(config, seed=0)
    add_lora([model], config, LoraConfig(r=2, lora_dropout=0.5), seed=0)
    for adapter in adapters_of(model).values():
        torch.nn.init.normal_(adapter.lora_B)
    ids_SL, positions_SL = hf_oracle.make_problem(96).input_ids_SL, torch.arange(24)[None].expand(2, -1)

    def run(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return model(ids_SL, positions_SL, None)

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    with answering(model, PassRequest(is_reference=True)):
        assert torch.equal(run(1), run(2))
    model.eval()
    assert torch.equal(run(1), run(2))


def test_dropout_keeps_the_expected_output(one_rank) -> None:
    config = hf_oracle.VARIANTS["llama"].to_dict()
    (model,) = build_models(config, seed=0)
    add_lora([model], config, LoraConfig(r=8, lora_dropout=0.25), seed=0)
    linear = model.decoder.layers[0].mlp.linear_fc2
    torch.nn.init.normal_(linear.adapter.lora_B)
    hidden_LSI = torch.randn(1, 1, 80).expand(20_000, 1, 80)
    torch.manual_seed(0)
    noisy_H = linear(hidden_LSI)[0].mean((0, 1))
    linear.eval()
    expected_H = linear(hidden_LSI[:1])[0][0, 0]
    spread_H = 5 * (0.25 / 0.75 * (linear.adapter.delta_weight() * hidden_LSI[0, 0]).square().sum(1) / 20_000).sqrt()
    assert ((noisy_H - expected_H).abs() <= spread_H).all()


# --- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r must be a whole number >= 1, got 0"),
        ({"r": 4.5}, "r must be a whole number >= 1, got 4.5"),
        ({"lora_alpha": 0.0}, "lora_alpha must be a finite number > 0"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\)"),
        ({"target_modules": ("q_proj", "lm_head")}, "target_modules must name only q_proj, .*; got 'lm_head'"),
        ({"target_modules": "q_proj"}, r"target_modules must be a list of names, got 'q_proj'; write \['q_proj'\]"),
        ({"target_modules": ()}, "target_modules must name at least one layer"),
        ({"target_modules": ("q_proj", "q_proj")}, "each once"),
    ],
)
def test_lora_config_refuses_what_cannot_work(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**settings)


@pytest.mark.parametrize("variant", ["mixtral", "qwen3-moe"])
def test_add_lora_refuses_experts_by_name(variant: str, one_rank) -> None:
    config = next(c for c in hf_oracle.VARIANTS.values() if c.model_type == variant.replace("-", "_")).to_dict()
    models = build_models(config, seed=0)
    with pytest.raises(ConfigError, match=r"lora\.target_modules: gate_proj, up_proj, down_proj cannot be adapted in"):
        add_lora(models, config, LoraConfig(r=2), seed=0)
    add_lora(models, config, LoraConfig(r=2, target_modules=("q_proj", "o_proj")), seed=0)
    assert len(adapters_of(models[0])) == 2 * config["num_hidden_layers"]


def test_add_lora_refuses_a_second_time(one_rank) -> None:
    config = hf_oracle.VARIANTS["llama"].to_dict()
    models = build_models(config, seed=0)
    with pytest.raises(ConfigError, match="the model has no adapters; save_hf"):
        save_adapter(models, "never")
    add_lora(models, config, LoraConfig(r=2), seed=0)
    with pytest.raises(ConfigError, match="has adapters already"):
        add_lora(models, config, LoraConfig(r=2), seed=0)
    applied = lora_of(models)
    assert applied is not None and applied.arch == Architecture.from_hf(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 4}, "r is 3, the run has 4; set lora.r to 3.*wrong shapes"),
        ({"lora_alpha": 8.0}, "lora_alpha is 4.0, the run has 8.0; set lora.lora_alpha to 4.0"),
        ({"use_rslora": True}, "use_rslora is False, the run has True"),
        ({"target_modules": ("q_proj",)}, r"unexpected tensors: .*; set lora.target_modules to \[q_proj, k_proj"),
    ],
)
def test_add_lora_refuses_files_of_other_settings(saved, settings: dict, message: str, one_rank) -> None:
    _, path, adapter = saved
    with pytest.raises(CheckpointError, match=message):
        add_lora(load_models(path), path, lora_of_files(adapter, **settings), seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora True is not supported"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern .* is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save .* is not supported"),
        ({"peft_type": "IA3"}, "peft_type must be LORA, got 'IA3'"),
    ],
)
def test_add_lora_refuses_other_kinds_of_adapters(saved, changes: dict, message: str, one_rank) -> None:
    _, path, adapter = saved
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | changes))
    with pytest.raises(CheckpointError, match=message):
        add_lora(load_models(path), path, lora_of_files(adapter), seed=0)


def test_add_lora_refuses_damaged_values_on_every_rank(saved, rank_pool_2: RankPool) -> None:
    _, path, adapter = saved
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.3.mlp.down_proj.lora_A.weight"][0, -1] = float("nan")
    save_file(tensors, adapter / "adapter_model.safetensors")
    for layout in (Layout(tp=2), Layout(pp=2)):  # in the slice of the last rank only
        for message in rank_pool_2.run(megatron_runs.lora_error, str(path), lora_of_files(adapter), layout):
            assert "CheckpointError" in message and "not finite" in message and "down_proj.lora_A" in message
