"""Models of Transformer Engine's layers train like Megatron's own in one process, and resume; a part of the matrix."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from checks.layout_parity.cases import Case, OneProcess
from checks.layout_parity.runs import train
from checks.te_parity.cases import (
    ALL_LAYOUTS,
    HALF,
    Ranks,
    Resumed,
    compare_layers,
    compare_resumed,
    perturbed_adapter,
)
from fastpref.testing.workers import RankPool
from fastpref.trainer import LoraConfig
from fastpref.trainer.model import layers

ONE = "one rank"
OVERLAPPED = "DP2 overlapped reduce and gather"
# Every layout of two ranks once, every model, loss and kind of rows.
CASES = [
    (ONE, "dense", "ORPO", "packed"),
    (ONE, "windowed", "DPO", "packed"),
    (ONE, "experts", "DPO", "packed, shared"),
    ("TP2", "tied", "DPO", "packed"),
    ("TP2-SP", "dense", "DPO", "packed, shared"),
    ("PP2", "dense", "ORPO", "padded"),
    ("PP2-VPP2", "dense", "DPO", "packed"),
    ("CP2", "dense", "DPO", "padded"),
    ("CP2", "windowed", "DPO", "padded"),
    ("CP2", "Gemma 3", "DPO", "packed, shared"),
    (OVERLAPPED, "dense", "ORPO", "packed, shared"),
    ("TP2-SP recompute", "dense", "DPO", "padded"),
    ("EP2 overlapped reduce and gather", "experts", "DPO", "packed"),
    ("TP2-SP x PP2-VPP2", "Gemma 3", "DPO", "padded"),
    ("EP2 x TP2-SP", "experts", "DPO", "padded"),
]
HALF_CASES = [(ONE, "experts", "packed"), ("TP2-SP", "dense", "padded"), ("CP2", "dense", "padded")]
RESUMED = [
    Resumed(before=OVERLAPPED, after=OVERLAPPED, is_half=True),
    Resumed(before="EP2", after="EP2", model="experts"),
    Resumed(before="TP2-SP", after="PP2-VPP2", model="Gemma 3"),
    Resumed(before=OVERLAPPED, after=ONE),
    Resumed(before="EP2 x TP2-SP", after=ONE, model="experts"),
    Resumed(before="TP2-SP", after="PP2", with_lora=True),
    Resumed(before="TP2-SP", after=ONE, layers=("TE", "local")),
    Resumed(before=ONE, after="PP2", layers=("local", "TE")),
    Resumed(before="EP2", after=ONE, model="experts", layers=("TE", "local")),
    Resumed(before="EP2", after=ONE, model="experts", layers=("local", "TE")),
]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> OneProcess:
    return OneProcess(tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> LoraConfig:
    return perturbed_adapter(tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def ranks(rank_pool_2: RankPool, rank_pool_4: RankPool) -> Iterator[Ranks]:
    yield Ranks(rank_pool_2, rank_pool_4)


def case_of(layout: str, model: str, loss: str, form: str, **settings: object) -> Case:
    ranks, of_layout = ALL_LAYOUTS[layout]
    settings = {**of_layout, **settings}
    return Case(layout=layout, ranks=ranks, model=model, loss=loss, form=form, settings=settings)


def check(case: Case, ranks: Ranks, one_process: OneProcess, tmp_path: Path) -> None:
    found, tolerance = compare_layers(case, ranks, one_process, tmp_path)
    assert found.within(tolerance), (found, tolerance)


@pytest.mark.parametrize("names", CASES, ids=" ".join)
def test_te_trains_like_megatrons_own_layers(ranks: Ranks, one_process: OneProcess, tmp_path: Path, names) -> None:
    check(case_of(*names), ranks, one_process, tmp_path)


@pytest.mark.parametrize("model", ["dense", "experts"])
@pytest.mark.parametrize("wanted", ["transformer_engine", "local"])
def test_models_of_other_layers_are_not_compared(tmp_path: Path, monkeypatch, model: str, wanted: str) -> None:
    """Not even where one part of them is Transformer Engine's: their last norm, and what the optimizer looks at."""
    other, own = "_local_layer_spec", "_transformer_engine_layer_spec"
    replaced, by = (own, other) if wanted == "transformer_engine" else (other, own)
    monkeypatch.setattr(layers, replaced, getattr(layers, by))
    run = case_of(ONE, model, "DPO", "padded").run({"transformer_impl": wanted})
    with pytest.raises(AssertionError, match=r"decoder\.layers\.0\..* is (local|transformer_engine): "):
        train(run, str(tmp_path))


@pytest.mark.parametrize("names", HALF_CASES, ids=" ".join)
def test_te_in_bf16_is_as_accurate_as_megatrons_own_layers(
    ranks: Ranks, one_process: OneProcess, tmp_path: Path, names
) -> None:
    layout, model, form = names
    check(case_of(layout, model, "DPO", form, **HALF), ranks, one_process, tmp_path)


@pytest.mark.parametrize(("layout", "form"), [(ONE, "packed, shared"), ("TP2-SP", "padded"), ("CP2", "padded")])
def test_lora_on_te_trains_like_on_megatrons_own_layers(
    ranks: Ranks, one_process: OneProcess, lora: LoraConfig, tmp_path: Path, layout: str, form: str
) -> None:
    size, settings = ALL_LAYOUTS[layout]
    case = Case(layout=layout, ranks=size, model="dense", loss="DPO", form=form, settings=settings, lora=lora)
    check(case, ranks, one_process, tmp_path)


@pytest.mark.parametrize("case", RESUMED, ids=lambda case: case.described()["layout"] + " " + case.described()["model"])
def test_te_resumes_in_the_same_layout_bit_for_bit_and_in_others(
    ranks: Ranks, lora: LoraConfig, tmp_path: Path, case: Resumed
) -> None:
    found, tolerance = compare_resumed(case, ranks, lora, tmp_path)
    assert found.within(tolerance), (found, tolerance)
