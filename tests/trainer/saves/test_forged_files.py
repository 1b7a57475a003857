"""Files that do not say what a save writes are refused by name, whatever the manifest says of them."""

import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from saved_states import Built, built, save, take_steps
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from checks.layout_parity.runs import MODEL
from fastpref.errors import CheckpointError
from fastpref.trainer.saves import content

CONFIG = {**MODEL, "num_hidden_layers": 2}
SHARDED, FP16 = {"use_distributed_optimizer": True}, {"fp16": True}
WEIGHT = "decoder.layers.mlp.linear_fc1.weight"
MOMENT, TURNED = f"optimizer.state.exp_avg.{WEIGHT}", "optimizer.state.exp_avg.decoder.layers.mlp.linear_fc2.weight"
INDEX, COMMON = ".metadata", "common.pt"


def place(index: Metadata, key: str) -> MetadataIndex:
    return next(found for found in index.storage_data if found.fqn == key)


def swapped(one: str, other: str) -> Callable[[Metadata], None]:
    def swap(index: Metadata) -> None:
        places, first, second = index.storage_data, place(index, one), place(index, other)
        places[first], places[second] = places[second], places[first]

    return swap


def outside(index: Metadata) -> None:
    where = index.storage_data[place(index, MOMENT)]
    index.storage_data[place(index, MOMENT)] = replace(where, relative_path=f"../step-1/{where.relative_path}")


def another_dtype(index: Metadata) -> None:
    index.state_dict_metadata[MOMENT].properties.dtype = torch.float16


def another_weight(index: Metadata) -> None:
    entries = index.state_dict_metadata
    entries["decoder.layers.mlp.linear_fc1.bias"] = entries["decoder.final_layernorm.weight"]


def without_pieces(index: Metadata) -> None:
    index.state_dict_metadata[MOMENT].chunks = None


def without_place(index: Metadata) -> None:
    del index.storage_data[place(index, MOMENT)]


INDICES: dict[str, tuple[Callable[[Metadata], None], str]] = {
    "a place outside": (outside, "names '../step-1/__0_"),
    "places of other dtypes": (swapped(WEIGHT, MOMENT), "torch.float32, its index says [1, 64, 32] torch.float16"),
    "places of other shapes": (swapped(TURNED, MOMENT), "is [1, "),
    "another dtype": (another_dtype, f"{MOMENT} is torch.float16 in it, not torch.float32"),
    "another weight": (another_weight, "it holds another model, with decoder.layers.mlp.linear_fc1.bias"),
    "no pieces": (without_pieces, "its index cannot be read: TypeError: "),
    "no place": (without_place, f"its files cannot be read: KeyError: MetadataIndex(fqn='{MOMENT}'"),
}
BYTES = {
    "a class of nowhere": b"cnowhere\nClass\n.",
    "text that is none": b"\x80\x04\x8c\x01\xff.",
    "a protocol that is none": b"\x80\xff.",
}


def groups(common: dict[str, Any]) -> list[dict[str, Any]]:
    return common["optimizer"]["optimizer"]["param_groups"]


COMMONS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no groups": (lambda common: common["optimizer"].update(optimizer={}), "an optimizer and its schedule"),
    "no optimizer": (lambda common: common["optimizer"].clear(), "an optimizer and its schedule"),
    "two updates": (lambda common: groups(common)[0].update(step=7), "it says 1, 7 and 1"),
    "other updates": (lambda common: [group.update(step=7) for group in groups(common)], "it says 7 and 1"),
    "many updates": (lambda common: groups(common)[0].update(step=torch.ones(2)), "it says 1, tensor([1., 1.]) and 1"),
    "no position": (lambda common: common["scheduler"].update(num_steps=0), "it says 1 and 0"),
    "no count": (lambda common: common["scheduler"].pop("num_steps"), "it says 1 and None"),
    "one group": (lambda common: groups(common).pop(), "does not hold the state of this run's optimizer"),
    "another group": (lambda common: groups(common)[0].update(wd_mult=0.5), "does not hold the state of this run's"),
    "no loss scale": (lambda common: common["optimizer"].pop("grad_scaler"), "does not hold the loss scale of fp16"),
    "half a loss scale": (lambda common: common["optimizer"]["grad_scaler"].pop("scale"), "the loss scale of fp16"),
    "no schedule": (lambda common: common.update(scheduler=None), "an optimizer and its schedule"),
    "half a schedule": (lambda common: common["scheduler"].pop("lr_decay_steps"), "and schedule: KeyError"),
    "a word": (lambda common: common["optimizer"].update({"optimizer": "word"}), "an optimizer and its schedule"),
}


def refusal(path: Path, run: Built) -> str:
    try:
        small = content.load_all(path, run.models, run.optimizer)
        content.apply(path, run.scheduler.load_state_dict, small["scheduler"])
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("settings", [{**SHARDED, **FP16}, FP16], ids=["sharded", "plain"])
def test_what_a_save_does_not_write_is_refused_by_name(tmp_path: Path, settings: dict[str, Any]) -> None:
    with built(CONFIG, settings) as run:
        take_steps(run, 1)
        save(run, str(tmp_path))
        step = tmp_path / "step-1"

        def told(name: str, damage: Callable[[], Any]) -> str:
            shutil.copy(step / INDEX, tmp_path / INDEX), shutil.copy(step / COMMON, tmp_path / COMMON)
            damage()
            found = refusal(step, run)
            shutil.copy(tmp_path / INDEX, step / INDEX), shutil.copy(tmp_path / COMMON, step / COMMON)
            assert "\n" not in found, name
            return found

        def rewrite(forge: Callable[[Metadata], None]) -> None:
            index = dcp.FileSystemReader(step).read_metadata()
            forge(index)
            (step / INDEX).write_bytes(pickle.dumps(index))

        def retell(forge: Callable[[dict[str, Any]], object]) -> None:
            common = torch.load(step / COMMON, weights_only=True)
            forge(common)
            torch.save(common, step / COMMON)

        assert told("nothing", lambda: None) == ""
        for name, (forge, expected) in INDICES.items():
            assert expected in told(name, lambda forge=forge: rewrite(forge)), name
        for name, raw in BYTES.items():
            found = told(name, lambda raw=raw: (step / INDEX).write_bytes(raw))
            assert "its index cannot be read: " in found, name
        for name, (forge, expected) in COMMONS.items():
            assert expected in told(name, lambda forge=forge: retell(forge)), name
