"""DPOConfig: what it accepts, what it fills in, and that nothing is accepted and ignored."""

import math
from dataclasses import asdict, fields, replace
from typing import NamedTuple

import pytest
from loss_pairs import NEEDED

from fastpref.errors import ConfigError
from fastpref.losses import LOSSES, DPOConfig, Loss, expected_initial_loss

MARGIN = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "discopop"}
LOG_RATIOS = MARGIN | {"nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down"}


class Known(NamedTuple):
    """An option: its default, a value that differs from it, and the losses that read it by their definitions."""

    default: float | str | None
    other: float | str
    readers: set[str]


OPTIONS = {
    "label_smoothing": Known(0.0, 0.1, {"sigmoid", "robust", "exo_pair", "aot", "aot_unpaired", "simpo", "cpo"}),
    "orpo_nll": Known("response", "prompt_and_response", {"orpo"}),
    "simpo_gamma": Known(0.5, 1.0, {"simpo"}),
    "simpo_alpha": Known(0.0, 0.2, {"simpo"}),
    "cpo_alpha": Known(1.0, 0.5, {"cpo"}),
    "nll_reduction": Known("token", "sequence", {"simpo", "cpo", "sft"}),
    "ipo_reduction": Known("mean", "sum", {"ipo"}),
    "bco_delta": Known("zero", "running_mean", {"bco_pair"}),
    "discopop_tau": Known(0.05, 0.1, {"discopop"}),
    "f_divergence": Known("reverse_kl", "js", MARGIN),
    "f_alpha": Known(0.5, 0.3, MARGIN),
    "ld_alpha": Known(None, 0.5, LOG_RATIOS),
}
# what makes the option of the key readable
COMPANIONS = {"f_alpha": {"f_divergence": "alpha"}}


def needed(name: str, option: str) -> dict:
    extra = NEEDED.get(name, {}) | COMPANIONS.get(option, {})
    if option == "nll_reduction" and name == "simpo":
        extra["simpo_alpha"] = 0.2
    return {key: value for key, value in extra.items() if key != option}


def test_default_is_dpo() -> None:
    config = DPOConfig()
    assert (config.beta, config.pref_loss, config.label_smoothing) == (0.1, "sigmoid", 0.0)
    assert config.loss_names == ("sigmoid",)
    assert config.use_ref_model
    assert not config.needs_global_batch
    assert not config.needs_nll_mask
    assert not config.needs_mean_nll_count


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_needs_its_name_alone(name: str) -> None:
    config = DPOConfig(pref_loss=name, **NEEDED.get(name, {}))
    assert config.use_ref_model == (name not in {"orpo", "simpo", "cpo", "sft"})
    assert config.needs_global_batch == (name in {"aot", "aot_unpaired"})
    assert config.needs_mean_nll_count == (name in {"cpo", "sft"})


def test_every_option_has_an_entry_here() -> None:
    own = {field.name for field in fields(DPOConfig)} - {"beta", "pref_loss", "loss_weights", "tie_value"}
    assert own == set(OPTIONS) == {option for loss in LOSSES.values() for option in loss.options}


@pytest.mark.parametrize("name", LOSSES)
def test_conditions_of_an_option_name_options_of_the_same_loss(name: str) -> None:
    for option in LOSSES[name].options.values():
        assert {condition[0] for condition in (option.only_if, option.unless) if condition} <= set(LOSSES[name].options)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_option_is_read_or_refused(name: str, option: str) -> None:
    _, other, readers = OPTIONS[option]
    arguments = {"pref_loss": name, option: other} | needed(name, option)
    if name in readers:
        assert getattr(DPOConfig(**arguments), option) == other
        return
    with pytest.raises(ConfigError) as caught:
        DPOConfig(**arguments)
    message = str(caught.value)
    assert f"{option} is not read by {name}, got {other!r}; remove it, or use " in message
    assert all(reader in message for reader in readers)


@pytest.mark.parametrize("option", [option for option in OPTIONS if option not in {"label_smoothing", "ld_alpha"}])
def test_option_given_at_its_default_is_refused_too_where_nothing_reads_it(option: str) -> None:
    name = "orpo" if option != "orpo_nll" else "sigmoid"
    with pytest.raises(ConfigError, match=f"{option} is not read by {name}, got"):
        DPOConfig(pref_loss=name, **{option: OPTIONS[option].default})


@pytest.mark.parametrize(("name", "option"), [(name, option) for option in OPTIONS for name in sorted(LOSSES)])
def test_option_left_out_is_filled_in_where_it_is_read(name: str, option: str) -> None:
    default, _, readers = OPTIONS[option]
    given = (needed(name, option) if name in readers else {}) | NEEDED.get(name, {})
    config = DPOConfig(pref_loss=name, **given)
    unset = 0.0 if option == "label_smoothing" else None
    assert getattr(config, option) == given.get(option, default if name in readers else unset)
    assert DPOConfig(**asdict(config)) == config


def test_option_of_one_loss_of_several_is_accepted() -> None:
    config = DPOConfig(pref_loss=["simpo", "sft"], simpo_gamma=2.0, loss_weights=[1, 0.2])
    assert config.pref_loss == config.loss_names == ("simpo", "sft")
    assert config.loss_weights == (1, 0.2)
    assert not config.use_ref_model
    assert DPOConfig(pref_loss=("sigmoid", "sft"), f_divergence="js", ld_alpha=0.5).nll_reduction == "token"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pref_loss": "sigmod"}, r"got 'sigmod'; did you mean sigmoid\?"),
        ({"pref_loss": ("hinge", "apo-zero")}, r"got 'apo-zero'; did you mean apo_zero\?"),
        ({"pref_loss": ()}, r"pref_loss must name at least one loss"),
        ({"pref_loss": []}, r"pref_loss must name at least one loss"),
        ({"pref_loss": 3}, r"pref_loss must be one of sigmoid, .*, aot_unpaired; got 3"),
        ({"pref_loss": [["sigmoid"]]}, r"pref_loss must be one of sigmoid, .*; got \['sigmoid'\]"),
        ({"pref_loss": ("hinge", "hinge")}, r"each loss once, got hinge 2 times; use loss_weights"),
        ({"loss_weights": (1.0, 2.0)}, r"one weight for each loss in pref_loss, got 2 for sigmoid; None"),
        ({"loss_weights": (0.0,)}, r"loss_weights must be a finite number > 0, got 0.0; to drop a loss, leave it out"),
        ({"loss_weights": 1.0}, r"loss_weights must be a list with one weight for each loss .*, got 1.0"),
        ({"pref_loss": "orpo", "orpo_nll": "responce"}, r"got 'responce'; did you mean response\?"),
        ({"pref_loss": "simpo", "simpo_gamma": -1}, r"simpo_gamma must be a finite number >= 0, got -1; the default"),
        ({"pref_loss": "simpo", "simpo_alpha": math.inf}, r"simpo_alpha must be .* got inf"),
        ({"pref_loss": "cpo", "cpo_alpha": -1.0}, r"cpo_alpha must be .* got -1.0"),
        (
            {"pref_loss": "sft", "nll_reduction": "mean"},
            r"nll_reduction must be one of token, sequence; got 'mean'; the default is token",
        ),
        ({"pref_loss": "ipo", "ipo_reduction": "summ"}, r"got 'summ'; did you mean sum\?"),
        (
            {"pref_loss": "bco_pair", "bco_delta": 0.0},
            r"bco_delta must be one of zero, running_mean; got 0.0; the default is zero",
        ),
        (
            {"pref_loss": "discopop", "discopop_tau": 0.0},
            r"discopop_tau must be in \(0, 1\], got 0.0; the default is 0.05",
        ),
        ({"pref_loss": "discopop", "discopop_tau": 1.5}, r"discopop_tau must be .* got 1.5"),
        ({"f_divergence": "forward_k1"}, r"got 'forward_k1'; did you mean forward_kl\?"),
        ({"f_divergence": "alpha", "f_alpha": math.nan}, r"f_alpha must be a finite number, got nan"),
        ({"f_alpha": 0.5}, r"f_alpha is not read by sigmoid, got 0.5; .*with f_divergence='alpha'"),
        ({"ld_alpha": 1.1}, r"ld_alpha must be in \[0, 1\], got 1.1"),
        ({"tie_value": 2}, r"tie_value must be in \[0, 1\], got 2"),
        (
            {"pref_loss": ("sigmoid", "apo_zero"), "f_divergence": "js"},
            r"f_divergence is not defined for apo_zero, got 'js'; remove the option or the loss",
        ),
        ({"pref_loss": ("sigmoid", "orpo"), "ld_alpha": 0.5}, r"ld_alpha is not defined for orpo, got 0.5"),
        (
            {"pref_loss": ("orpo", "sft"), "orpo_nll": "prompt_and_response"},
            r"orpo_nll must leave the prompt out .*got 'prompt_and_response' with orpo \+ sft; use 'response'",
        ),
        (
            {"pref_loss": "cpo", "cpo_alpha": 0, "nll_reduction": "token"},
            r"nll_reduction is not read by cpo, got 'token'",
        ),
        (
            {"pref_loss": "simpo", "nll_reduction": "token"},
            r"nll_reduction is not read by simpo, got 'token'; .*simpo with simpo_alpha other than 0 or .* or sft",
        ),
    ],
    ids=str,
)
def test_config_that_cannot_work_names_argument_rule_and_value(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DPOConfig(**arguments)


def test_config_with_many_problems_lists_them_all() -> None:
    with pytest.raises(ConfigError) as caught:
        DPOConfig(beta=0, label_smoothing=0.7, tie_value=-1, pref_loss="hinge", simpo_gamma=1.0, loss_weights=(1, 1))
    assert str(caught.value).startswith(
        "the preference loss cannot be set up:\n  beta must be a finite number > 0, got 0;"
    )
    wrong = ("beta", "tie_value", "label_smoothing", "loss_weights", "simpo_gamma")
    assert tuple(problem.key for problem in caught.value.problems) == wrong
    with pytest.raises(ConfigError) as caught:
        DPOConfig(beta=0, pref_loss="sigmod")
    assert len(str(caught.value).splitlines()) == 3


def test_reverse_kl_may_stand_beside_a_loss_without_divergences() -> None:
    assert DPOConfig(pref_loss=("sigmoid", "apo_zero"), f_divergence="reverse_kl").f_divergence == "reverse_kl"


def test_config_from_pydantic_takes_lists_and_passes_messages_on() -> None:
    pydantic = pytest.importorskip("pydantic", reason="pydantic comes with the extra megatron")
    adapter = pydantic.TypeAdapter(DPOConfig)
    config = adapter.validate_python({"pref_loss": ["sigmoid", "sft"], "loss_weights": [1, 0.2]})
    assert config == DPOConfig(pref_loss=("sigmoid", "sft"), loss_weights=(1.0, 0.2))
    assert adapter.validate_json('{"pref_loss": "orpo"}') == DPOConfig(pref_loss="orpo")
    with pytest.raises(pydantic.ValidationError, match=r"did you mean sigmoid\?"):
        adapter.validate_python({"pref_loss": ["sigmod"]})


def test_config_is_frozen_and_can_be_replaced() -> None:
    config = DPOConfig(label_smoothing=0.1)
    with pytest.raises(AttributeError):
        config.beta = 1.0  # type: ignore[misc]
    assert replace(config, beta=0.2) == DPOConfig(beta=0.2, label_smoothing=0.1)


LN2 = math.log(2.0)


@pytest.mark.parametrize(
    ("arguments", "loss"),
    [
        ({"pref_loss": "sigmoid"}, LN2),
        ({"pref_loss": "sigmoid", "label_smoothing": 0.3, "f_divergence": "js", "ld_alpha": 0.2}, LN2),
        ({"pref_loss": "hinge"}, 1.0),
        ({"pref_loss": "ipo", "beta": 0.2}, 1 / 0.4**2),
        ({"pref_loss": "ipo", "beta": 0.2, "ipo_reduction": "sum"}, 1 / 0.4**2),
        ({"pref_loss": "robust", "label_smoothing": 0.2}, LN2),
        ({"pref_loss": "exo_pair", "label_smoothing": 0.1}, -LN2 - math.log(0.9) / 2 - math.log(0.1) / 2),
        ({"pref_loss": "nca_pair"}, 2 * LN2),
        ({"pref_loss": "bco_pair", "bco_delta": "running_mean"}, 2 * LN2),
        ({"pref_loss": "sppo_hard", "beta": 0.5}, 2.0),
        ({"pref_loss": "aot", "label_smoothing": 0.1}, LN2),
        ({"pref_loss": "aot_unpaired"}, LN2),
        ({"pref_loss": "apo_zero"}, 1.0),
        ({"pref_loss": "apo_down"}, 1.0),
        ({"pref_loss": "discopop"}, 0.5 * LN2 + 0.5),
        ({"pref_loss": "sigmoid_norm"}, LN2),
        ({"pref_loss": ("sigmoid", "hinge"), "loss_weights": (0.5, 2.0)}, 0.5 * LN2 + 2.0),
        ({"pref_loss": "orpo"}, None),
        ({"pref_loss": "simpo"}, None),
        ({"pref_loss": "cpo"}, None),
        ({"pref_loss": ("sigmoid", "sft")}, None),
    ],
    ids=str,
)
def test_expected_initial_loss_is_the_value_at_policy_equal_to_reference(arguments: dict, loss: float | None) -> None:
    got = expected_initial_loss(DPOConfig(**arguments))
    assert got == loss if loss is None else got == pytest.approx(loss, rel=1e-14)


def test_a_loss_of_a_user_may_name_options_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Loss(lambda config, logps, context: logps.chosen * config.label_smoothing, frozenset({"label_smoothing"}))
    assert mine.options == {"label_smoothing": LOSSES["sigmoid"].options["label_smoothing"]}
    monkeypatch.setitem(LOSSES, "mine", mine)
    assert DPOConfig(pref_loss="mine", label_smoothing=0.1).label_smoothing == 0.1
    with pytest.raises(ConfigError, match="label_smoothing must be in"):
        DPOConfig(pref_loss="mine", label_smoothing=0.7)
    with pytest.raises(ConfigError, match="options: new belong to no loss yet"):
        Loss(mine.function, frozenset({"new"}))


def test_config_says_every_problem_once() -> None:
    for wrong in ({"loss_weights": (-1, -1)}, {"loss_weights": (0,)}):
        with pytest.raises(ConfigError) as caught:
            DPOConfig(pref_loss=("sigmoid", "ipo"), **wrong)
        assert len(caught.value.problems) == 1
