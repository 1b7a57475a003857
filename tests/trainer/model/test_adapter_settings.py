"""Adapters that peft wrote with every kind of setting: they answer as in peft, or are refused by name."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import hf_oracle
import megatron_runs
import pytest
import torch
from megatron_runs import Layout
from safetensors.torch import load_file, save_file

from fastpref.errors import CheckpointError
from fastpref.run.architecture.adapter_files import AdapterFiles
from fastpref.run.architecture.architecture import Architecture
from fastpref.run.architecture.lora_config import TARGETS
from fastpref.run.architecture.peft_settings import KNOWN
from fastpref.trainer import LoraConfig, add_lora, load_models

peft = pytest.importorskip("peft", reason="peft, the oracle of the adapters, is not installed")

FULL_NAMES = [
    f"model.layers.{layer}.{'mlp' if name in ('gate_proj', 'up_proj', 'down_proj') else 'self_attn'}.{name}"
    for layer in range(4)
    for name in TARGETS
]
UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:q_proj|k_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\."
    r"(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)))"
)
Q_NAME = "base_model.model.model.layers.0.self_attn.q_proj"


@dataclasses.dataclass(frozen=True)
class Saved:
    """A model directory, an adapter for all of its layers, and the model in memory."""

    model: Path
    adapter: Path
    base: torch.nn.Module
    arch: Architecture

    def changed(self, path: Path, changes: dict[str, Any], removed: tuple[str, ...] = ()) -> Path:
        shutil.copytree(self.adapter, path)
        config = json.loads((path / "adapter_config.json").read_text()) | changes
        (path / "adapter_config.json").write_text(
            json.dumps({key: value for key, value in config.items() if key not in removed})
        )
        return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    folder = tmp_path_factory.mktemp("saved")
    model = hf_oracle.make_model("llama")
    path = hf_oracle.save(model, folder / "model")
    base = copy.deepcopy(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, target_modules=list(TARGETS)))
    generator = torch.Generator().manual_seed(5)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.5 / parameter.size(1) ** 0.5, generator=generator)
    wrapped.save_pretrained(folder / "adapter")
    return Saved(path, folder / "adapter", base, Architecture.from_hf(base.config.to_dict()))


def lora_of(path: Path, **settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 6.0, "path": str(path), **settings})


def answer_of_peft(saved: Saved, path: Path) -> torch.Tensor:
    ids_SL = hf_oracle.make_problem(96).input_ids_SL
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(copy.deepcopy(saved.base), path)(ids_SL).logits


def answer(saved: Saved, path: Path, **settings: Any) -> torch.Tensor:
    ids_SL = hf_oracle.make_problem(96).input_ids_SL
    with megatron_runs.parallel(Layout()), torch.no_grad():
        (model,) = load_models(saved.model)
        add_lora([model], saved.model, lora_of(path, **settings), seed=0)
        return model(ids_SL, torch.arange(24)[None].expand(2, -1), None)


def refusal(saved: Saved, path: Path, **settings: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        AdapterFiles(path, saved.arch, lora_of(path, **settings))
    return str(caught.value)


def test_every_field_of_pefts_configuration_is_decided_about() -> None:
    fields = {field.name for kind in (peft.PeftConfig, peft.LoraConfig) for field in dataclasses.fields(kind)}
    assert fields <= KNOWN, "decide what these mean for an adapter that is read"


ACCEPTED: dict[str, dict[str, Any]] = {
    "plain": {},
    "another order": {"target_modules": list(reversed(TARGETS))},
    "regular expression": {"target_modules": r".*\.(q|k|v|o|gate|up|down)_proj"},
    "unsloth": {"target_modules": UNSLOTH, "auto_mapping": {"base_model_class": "X", "unsloth_fixed": True}},
    "all linear": {"target_modules": "all-linear"},
    "full names": {"target_modules": FULL_NAMES},
    "ends of names": {"target_modules": ["self_attn.q_proj", *TARGETS[1:]]},
    "excludes others": {"target_modules": "all-linear", "exclude_modules": ["lm_head", "score"]},
    "every layer": {"layers_to_transform": [0, 1, 2, 3]},
    "every layer of a pattern": {"layers_to_transform": [0, 1, 2, 3], "layers_pattern": "layers"},
    "no layer named": {"layers_to_transform": []},
    "ranks that repeat r": {"rank_pattern": {"q_proj": 4, r"layers\.0\.mlp\..*": 4}},
    "rank from the pattern alone": {"r": 64, "rank_pattern": {".*": 4}},
    "alpha from the pattern alone": {"lora_alpha": 16, "alpha_pattern": {".*_proj": 6.0}},
    "float alpha": {"lora_alpha": 6.0},
    "start: no": {"init_lora_weights": False},
    "start: gaussian": {"init_lora_weights": "gaussian"},
    "start: orthogonal": {"init_lora_weights": "orthogonal"},
    "start: eva": {"init_lora_weights": "eva", "eva_config": {"rho": 1.5}},
    "settings of other starts": {"loftq_config": {}, "corda_config": None, "lora_ga_config": {"stable_gamma": 8}},
    "llama-factory": {"task_type": "CAUSAL_LM", "revision": "main", "inference_mode": False, "bias": "none"},
    "dropout": {"lora_dropout": 0.5},
    "megatron_core": {"megatron_core": "megatron.core", "megatron_config": None},
    "qalora off": {"use_qalora": False, "qalora_group_size": 32},
    "a newer peft": {"peft_version": "9.0", "use_x": False, "x_config": None, "x_list": [], "x_map": {}, "x_name": ""},
    "an older peft": {"merge_weights": False, "enable_lora": None},
    "ms-swift": {"lora_dtype": "AUTO", "lorap_lr_ratio": 16.0, "lorap_emb_lr": 1e-6},
    "biases of layers that have none": {"bias": "all"},
    "weights as in other models": {"fan_in_fan_out": True},
}


@pytest.fixture(scope="module")
def plain_answer(saved: Saved) -> torch.Tensor:
    """What the run's settings and the adapter's tensors give, whatever else its file says."""
    return answer(saved, saved.adapter)


def assert_answers_plainly(saved: Saved, path: Path, plain_answer: torch.Tensor) -> None:
    AdapterFiles(path, saved.arch, lora_of(path))
    torch.testing.assert_close(plain_answer, answer_of_peft(saved, path), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ACCEPTED)
def test_adapter_answers_as_in_peft(saved: Saved, plain_answer: torch.Tensor, tmp_path: Path, kind: str) -> None:
    assert_answers_plainly(saved, saved.changed(tmp_path / "adapter", ACCEPTED[kind]), plain_answer)


@pytest.mark.filterwarnings("ignore")
def test_adapter_with_the_fields_of_the_first_peft_answers_as_in_peft(
    saved: Saved, plain_answer: torch.Tensor, tmp_path: Path
) -> None:
    kept = {"peft_type", "base_model_name_or_path", "target_modules", "r", "lora_alpha", "task_type", "bias"}
    config = json.loads((saved.adapter / "adapter_config.json").read_text())
    path = saved.changed(tmp_path / "adapter", {}, removed=tuple({*config} - kept))
    assert_answers_plainly(saved, path, plain_answer)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adapter_of_16_bits_answers_as_in_peft(saved: Saved, tmp_path: Path, dtype: torch.dtype) -> None:
    path = saved.changed(tmp_path / "adapter", {})
    file = path / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
    torch.testing.assert_close(answer(saved, path), answer_of_peft(saved, path), rtol=1e-4, atol=1e-4)


def test_adapter_beside_that_of_a_reference_answers_as_in_peft(
    saved: Saved, plain_answer: torch.Tensor, tmp_path: Path
) -> None:
    path = saved.changed(tmp_path / "adapter", {})
    saved.changed(path / "reference", {"use_rslora": True})
    assert_answers_plainly(saved, path, plain_answer)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    **{
        f"start: {start}": (
            {"init_lora_weights": start, **more},
            f"init_lora_weights '{start}' is not supported: peft changes the base model's weights",
        )
        for start, more in {
            **{
                "pissa": {},
                "pissa_niter_4": {},
                "olora": {},
                "OLoRA": {},
                "loftq": {"loftq_config": {"loftq_bits": 4}},
            },
            **{"corda": {"corda_config": {}}, "lora_ga": {"lora_ga_config": {}}},
        }.items()
    },
    "start: mica": ({"init_lora_weights": "mica"}, "init_lora_weights 'mica' is not supported"),
    "start: unknown": ({"init_lora_weights": 3}, "init_lora_weights 3 is not supported"),
    **{
        f"{key} on": ({key: value}, f"{key} {value!r} is not supported; ")
        for key, value in {
            "alora_invocation_tokens": [1, 2],
            "arrow_config": {"top_k": 2},
            "ensure_weight_tying": True,
            "kasa_config": {"beta": 1.0},
            "layer_replication": [[0, 2], [1, 4]],
            "megatron_config": {"hidden_size": 8},
            "modules_to_save": ["lm_head"],
            "monteclora_config": {"num_samples": 2},
            "target_parameters": ["mlp.experts.gate_up_proj"],
            "trainable_token_indices": [1, 2],
            "use_bdlora": {"nblocks": 2},
            "use_dora": True,
            "use_qalora": True,
            "velora_config": {"num_groups": 2},
        }.items()
    },
    # peft merges no bias into a layer that has none
    "bias of B": ({"lora_bias": True}, "lora_bias True is not supported; train an adapter without it"),
    "dora as a text": ({"use_dora": "false"}, "use_dora 'false' is not supported"),
    "dora as a number": ({"use_dora": 1}, "use_dora 1 is not supported"),
    "unknown, on": ({"use_x": True}, "use_x True is not known here"),
    "unknown, zero": ({"x_shift": 0}, "x_shift 0 is not known here"),
    "task": ({"task_type": "SEQ_CLS"}, "task_type must be CAUSAL_LM, got 'SEQ_CLS'"),
    "kind": ({"peft_type": "ADALORA"}, "peft_type must be LORA, got 'ADALORA'"),
    "r as a text": ({"r": "4"}, "r must be a whole number >= 1, got '4'"),
    "r as a truth": ({"r": True}, "r must be a whole number >= 1, got True"),
    "r as a float": ({"r": 4.0}, "r must be a whole number >= 1, got 4.0"),
    "another r": ({"r": 5}, "r is 5, the run has 4; set lora.r to 5"),
    "alpha as a text": ({"lora_alpha": "6"}, "lora_alpha must be a number, got '6'"),
    "alpha as a truth": ({"lora_alpha": True}, "lora_alpha must be a number, got True"),
    "alpha not finite": ({"lora_alpha": float("nan")}, "lora_alpha must be a number, got nan"),
    "no alpha": ({"lora_alpha": 0}, "lora_alpha must be above 0, got 0; merge it into its model"),
    "another alpha": ({"lora_alpha": 6.5}, "lora_alpha is 6.5, the run has 6.0; set lora.lora_alpha to 6.5"),
    "rslora": ({"use_rslora": True}, "use_rslora is True, the run has False; set lora.use_rslora to true"),
    "rslora as a text": ({"use_rslora": "false"}, "use_rslora must be true or false, got 'false'"),
    "ranks": ({"rank_pattern": {r"layers\.1\.mlp\.up_proj": 5}}, "rank_pattern gives layers another r than 4"),
    "alphas": ({"alpha_pattern": {"^model.layers.2.self_attn.q_proj": 9}}, "layers.2.self_attn.q_proj 9; merge"),
    "pattern as a list": ({"rank_pattern": [3]}, "rank_pattern must map names of layers to numbers, got [3]"),
    "pattern of texts": ({"alpha_pattern": {"q_proj": "4"}}, "alpha_pattern must map names of layers to numbers"),
    "pattern that is none": ({"rank_pattern": {"(": 3}}, "rank_pattern '(.*\\\\.)?(()$' is no regular expression"),
    "some layers": ({"layers_to_transform": [0, 1]}, "leaves out layers of which there are tensors"),
    "one layer": ({"layers_to_transform": 3}, "leaves out layers of which there are tensors"),
    "layers of another pattern": (
        {"layers_to_transform": [0, 1, 2, 3], "layers_pattern": "h"},
        "leaves out layers of which there are tensors",
    ),
    "layers as texts": ({"layers_to_transform": ["0"]}, "layers_to_transform must be a whole number or a list of them"),
    "layers and a text": (
        {"layers_to_transform": [0], "target_modules": "all-linear"},
        "layers_to_transform [0] must be null where target_modules is a text",
    ),
    "excluded layers": ({"exclude_modules": r".*layers\.0\..*"}, "leaves out layers of which there are tensors"),
    "excluded projection": ({"exclude_modules": ["o_proj"]}, "model.layers.0.self_attn.o_proj"),
    "fewer targets": ({"target_modules": ["q_proj"]}, "leaves out layers of which there are tensors"),
    "no targets": ({"target_modules": None}, "target_modules is missing"),
    "targets as a map": ({"target_modules": {"q_proj": 1}}, "target_modules must be a text or a list of texts"),
    "targets that are no expression": ({"target_modules": "("}, "target_modules '(' is no regular expression"),
    "head": ({"target_modules": [*TARGETS, "lm_head"]}, "layers that cannot be adapted here: lm_head"),
    "embedding": ({"target_modules": [*TARGETS, "embed_tokens"]}, "cannot be adapted here: model.embed_tokens"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_adapter_is_refused_by_name(saved: Saved, tmp_path: Path, kind: str) -> None:
    changes, message = REFUSED[kind]
    assert message in refusal(saved, saved.changed(tmp_path / "adapter", changes))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_merged_adapter_that_changed_its_base_is_what_peft_answers(saved: Saved, tmp_path: Path, start: str) -> None:
    """The remedy works, and is needed: the adapter alone beside the base model answers otherwise."""
    path = saved.changed(tmp_path / "adapter", {"init_lora_weights": start})
    assert "merge it into its model with peft's `merge_and_unload`" in refusal(saved, path)
    expected = answer_of_peft(saved, path)
    plain = answer_of_peft(saved, saved.adapter)
    assert (expected - plain).abs().max() > 0.1 * plain.abs().max()
    peft.PeftModel.from_pretrained(copy.deepcopy(saved.base), path).merge_and_unload().save_pretrained(tmp_path / "m")
    ids_SL = hf_oracle.make_problem(96).input_ids_SL
    with megatron_runs.parallel(Layout()), torch.no_grad():
        (model,) = load_models(tmp_path / "m")
        merged = model(ids_SL, torch.arange(24)[None].expand(2, -1), None)
    torch.testing.assert_close(merged, expected, rtol=1e-3, atol=1e-3)


# --- tensors


@pytest.mark.parametrize(
    ("found", "given", "remedy"),
    [
        (("q_proj", "v_proj"), TARGETS, "set lora.target_modules to [q_proj, v_proj]"),
        (("q_proj", "v_proj"), ("q_proj",), "set lora.target_modules to [q_proj, v_proj]"),
        (("down_proj",), ("up_proj",), "set lora.target_modules to [down_proj]"),
    ],
)
def test_targets_that_fit_are_named_and_fit(
    saved: Saved, tmp_path: Path, found: tuple[str, ...], given: tuple[str, ...], remedy: str
) -> None:
    path = saved.changed(tmp_path / "adapter", {"target_modules": list(found)})
    file = path / "adapter_model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if name.split(".")[-3] in found}, file)
    message = refusal(saved, path, target_modules=given)
    assert remedy in message and "only" not in message
    torch.testing.assert_close(
        answer(saved, path, target_modules=found), answer_of_peft(saved, path), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("base_model.model.lm_head.lora_A.weight", "tensors of what cannot be adapted here"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "tensors of what cannot be adapted here"),
        (f"{Q_NAME}.lora_magnitude_vector", "tensors of what cannot be adapted here"),
        (f"{Q_NAME}.lora_B.bias", "tensors of what cannot be adapted here"),
        (f"{Q_NAME}.base_layer.bias", "tensors of what cannot be adapted here"),
        ("base_model.model.model.layers.0.mlp.experts.3.up_proj.lora_A.weight", "tensors of what cannot be adapted"),
    ],
)
def test_tensors_of_what_is_never_adapted_are_called_that(
    saved: Saved, tmp_path: Path, name: str, message: str
) -> None:
    path = saved.changed(tmp_path / "adapter", {})
    file = path / "adapter_model.safetensors"
    save_file({**load_file(file), name: torch.zeros(3, 48)}, file)
    found = refusal(saved, path)
    assert message in found and name in found
    assert "lora.target_modules" not in found


def renamed(path: Path, old: str, new: str) -> Path:
    file = path / "adapter_model.safetensors"
    save_file({key.replace(old, new): tensor for key, tensor in load_file(file).items()}, file)
    return path


@pytest.mark.filterwarnings("ignore")
def test_names_with_that_of_pefts_own_adapter_are_read_as_in_peft(saved: Saved, tmp_path: Path) -> None:
    path = renamed(saved.changed(tmp_path / "adapter", {}), ".weight", ".default.weight")
    torch.testing.assert_close(answer(saved, path), answer_of_peft(saved, path), rtol=1e-4, atol=1e-4)
    file = path / "adapter_model.safetensors"
    save_file({**load_file(file), f"{Q_NAME}.lora_A.weight": torch.zeros(4, 48)}, file)
    assert f"{Q_NAME}.lora_A.weight is there twice" in refusal(saved, path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (".weight", ".policy.weight"),
        ("base_model.model.model.", "base_model.model._orig_mod.model."),
        ("base_model.model.", "_fsdp_wrapped_module.base_model.model."),
        (".lora_", "._checkpoint_wrapped_module.lora_"),
        ("base_model.model.", "base_model.model.base_model.model."),
        ("base_model.model.", ""),
    ],
)
def test_names_that_peft_does_not_read_are_refused(saved: Saved, tmp_path: Path, old: str, new: str) -> None:
    path = renamed(saved.changed(tmp_path / "adapter", {}), old, new)
    message = refusal(saved, path)
    assert "tensors carry names under which peft does not read them" in message
    assert "missing" not in message and "merge" not in message
    with torch.no_grad():
        base = saved.base(hf_oracle.make_problem(96).input_ids_SL).logits
    torch.testing.assert_close(answer_of_peft(saved, path), base)


def test_an_adapter_of_some_layers_alone_is_to_be_merged(saved: Saved, tmp_path: Path) -> None:
    path = saved.changed(tmp_path / "adapter", {"layers_to_transform": [1, 2]})
    file = path / "adapter_model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if ".layers.1." in name or ".layers.2." in name}, file)
    assert "an adapter of some layers alone is not supported: merge it into its model" in refusal(saved, path)


def test_empty_tensors_are_called_those_of_zero_3(saved: Saved, tmp_path: Path) -> None:
    path = saved.changed(tmp_path / "adapter", {})
    file = path / "adapter_model.safetensors"
    save_file({name: torch.zeros(0) for name in load_file(file)}, file)
    assert "DeepSpeed's ZeRO-3 leaves empty tensors where it saves without gathering" in refusal(saved, path)


def test_an_adapter_of_mlx_is_called_that(saved: Saved, tmp_path: Path) -> None:
    path = tmp_path / "adapter"
    path.mkdir()
    settings = {"fine_tune_type": "lora", "num_layers": 16, "lora_parameters": {"rank": 3, "scale": 20.0}}
    (path / "adapter_config.json").write_text(json.dumps(settings))
    save_file({"model.layers.0.self_attn.q_proj.lora_a": torch.zeros(48, 3)}, path / "adapters.safetensors")
    assert "it is an adapter of mlx; `mlx_lm.fuse` adds it into its model" in refusal(saved, path)


@pytest.mark.parametrize("variant", ["qwen3-moe", "mixtral"])
def test_all_linear_layers_of_a_mixture_are_those_of_its_attention(variant: str, tmp_path: Path) -> None:
    model = hf_oracle.make_model(variant)
    path = hf_oracle.save(model, tmp_path / "model")
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=attention))
    wrapped.save_pretrained(tmp_path / "adapter")
    arch = Architecture.of(path)
    lora = LoraConfig(r=2, target_modules=tuple(attention), path=str(tmp_path / "adapter"))
    AdapterFiles(tmp_path / "adapter", arch, lora)
    file = tmp_path / "adapter" / "adapter_config.json"
    for targets, is_fit in (("all-linear", True), ([*attention, "up_proj", "w1"], False)):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": targets}))
        if is_fit:
            AdapterFiles(tmp_path / "adapter", arch, lora)
            continue
        with pytest.raises(CheckpointError, match=r"cannot be adapted here: .*experts"):
            AdapterFiles(tmp_path / "adapter", arch, lora)
