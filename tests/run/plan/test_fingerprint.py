"""Fingerprints of different ages: a setting that one of them does not know has its default there."""

from dataclasses import MISSING, dataclass, fields

import pytest

from fastpref.losses import DPOConfig
from fastpref.run.architecture.architecture import Architecture
from fastpref.run.architecture.experts import Experts
from fastpref.run.architecture.lora_config import LoraConfig
from fastpref.run.architecture.rope import Rope
from fastpref.run.config.arguments import TrainingArguments
from fastpref.run.plan import fingerprint
from fastpref.run.plan.fingerprint import differences

EXPERTS = {"num_experts": 4, "experts_per_token": 2, "ffn_hidden_size": 8, "norm_topk_prob": True, "layers": [True]}

SIMPO = {"loss.pref_loss": "simpo", "loss.beta": 2.0}


@dataclass(frozen=True, kw_only=True)
class NewerArchitecture(Architecture):
    attention_out_bias: bool = False


@dataclass(frozen=True, kw_only=True)
class NewerExperts(Experts):
    num_shared: int = 0


class NewerRope(tuple):
    _fields = (*Rope._fields, "partial")
    _field_defaults = Rope._field_defaults | {"partial": 1.0}


def test_a_field_that_a_fingerprint_lacks_has_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "Architecture", NewerArchitecture)
    monkeypatch.setattr(fingerprint, "Rope", NewerRope)
    newer = {"model.rope": NewerRope, "model.experts": NewerExperts}
    monkeypatch.setattr(fingerprint, "_OBJECTS", fingerprint._OBJECTS | newer)
    rope = list(Rope(1e4))
    for saved, name, neutral, other in (
        ({}, "model.attention_out_bias", False, True),
        ({"model.rope": rope}, "model.rope", [*rope, 1.0], [*rope, 0.5]),
        ({"model.experts": EXPERTS}, "model.experts", EXPERTS | {"num_shared": 0}, EXPERTS | {"num_shared": 1}),
    ):
        assert differences(saved, {name: neutral}) == differences({name: neutral}, saved) == {}
        (found,) = differences(saved, {name: other}).items()
        assert found in (
            ("model.attention_out_bias", (False, True)),
            ("model.rope.partial", (1.0, 0.5)),
            ("model.experts.num_shared", (0, 1)),
        )


@pytest.mark.parametrize(
    ("saved", "now", "found"),
    [
        ({"model.local_rope": None}, {"model.local_rope": [1e4]}, ["model.local_rope"]),
        ({"model.rope": [*Rope(1e4), 0.5]}, {"model.rope": [*Rope(1e4)]}, ["model.rope"]),  # of a newer version
        ({"model.experts": None}, {"model.experts": EXPERTS}, ["model.experts"]),
        ({"lora": '{"r": 4}'}, {"lora": '{"r": 4, "lora_dropout": 0.0}'}, []),
        ({"lora": '{"r": 4, "new": 1}'}, {"lora": '{"r": 2}'}, ["lora.new", "lora.r"]),
        ({"lora": '{"r": 4}'}, {}, ["lora"]),
        ({"seed": 1}, {}, ["seed"]),
        ({}, {"packing": False, "loss.beta": 0.1, "num_train_pairs": 3}, ["num_train_pairs"]),
        # an option that the loss reads was filled in, one that it does not read was not
        (SIMPO, SIMPO | {"loss.simpo_gamma": 0.5, "loss.cpo_alpha": None}, []),
        (SIMPO, SIMPO | {"loss.simpo_gamma": 0.7}, ["loss.simpo_gamma"]),
    ],
)
def test_differences_names_what_differs(saved: dict, now: dict, found: list[str]) -> None:
    assert list(differences(saved, now)) == found


def test_every_new_field_has_a_default() -> None:
    """These were there from the start; a checkpoint that lacks another one must still load."""
    first = {
        *("model_type", "num_layers", "hidden_size", "ffn_hidden_size", "num_heads", "num_query_groups", "head_dim"),
        *("vocab_size", "max_positions", "norm_eps", "activation", "rope", "local_rope", "attention_scale"),
        *("tie_embeddings", "qkv_bias", "qk_norm", "zero_centered_norms", "sandwich_norms", "embedding_scale"),
        *("sliding_window", "sliding_layers", "experts", "init_std"),
    }
    of_experts = {*EXPERTS, "router_aux_loss_coef"}
    required = {Architecture: first, Experts: of_experts, LoraConfig: set(), DPOConfig: set(), TrainingArguments: set()}
    for owner, names in required.items():
        assert {field.name for field in fields(owner) if field.default is MISSING} <= names, owner
    # a checkpoint holds a rope as a list
    in_order = ("theta", "kind", "factor", "low_freq_factor", "high_freq_factor", "original_max_positions")
    assert Rope._fields[:6] == in_order and set(Rope._fields) - set(Rope._field_defaults) == {"theta"}
