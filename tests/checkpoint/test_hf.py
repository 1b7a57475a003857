"""Model directories: what is written can be read by others, and nothing hostile is."""

import contextlib
import json
import os
import sys
import threading
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastpref.checkpoint import hf
from fastpref.checkpoint.headers import TensorSpec
from fastpref.checkpoint.hf import ModelDirectory, ModelWriter
from fastpref.errors import CheckpointError

TENSORS = {
    "b": torch.arange(12.0).reshape(3, 4),
    "a": torch.randn(5, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "c": torch.tensor([[1.5], [float("nan")]], dtype=torch.float64),
    "empty": torch.empty(0, 4, dtype=torch.float16),
}
SPECS = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()]


def write(
    path: Path, config: dict | None = None, max_shard_bytes: int = 1 << 30, companions: Path | None = None
) -> Path:
    with ModelWriter(path, SPECS, config or {"model_type": "llama"}, companions, max_shard_bytes) as writer:
        for name, tensor in TENSORS.items():
            writer.write(name, tensor)
    return path


def same(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return got.dtype == expected.dtype and torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0))


# --- writing and reading


def test_writer_replaces_leaves_out_and_copies_through_links(tmp_path: Path) -> None:
    source, blobs = tmp_path / "source", tmp_path / "blobs"
    (source / "additional_chat_templates").mkdir(parents=True)
    blobs.mkdir()
    for name in ("tokenizer.json", "vocab.txt", "additional_chat_templates/rag.jinja", "modeling.py"):
        (blobs / Path(name).name).write_text(name)
        (source / name).symlink_to(blobs / Path(name).name)
    replaced = {"vocab.txt": None, "LICENSE": b"free", "tokenizer_config.json": b"{}"}
    with ModelWriter(tmp_path / "m", [], {}, source, replaced=replaced):
        pass
    files = {str(file.relative_to(tmp_path / "m")): file for file in (tmp_path / "m").rglob("*") if file.is_file()}
    kept = ("tokenizer.json", "additional_chat_templates/rag.jinja")
    assert sorted(files) == sorted(["config.json", "LICENSE", "tokenizer_config.json", *kept])
    assert not any(file.is_symlink() for file in files.values())
    assert all(files[name].read_text() == name for name in kept) and files["LICENSE"].read_text() == "free"


@pytest.mark.parametrize(("max_shard_bytes", "num_files"), [(1 << 30, 1), (50, 2), (1, 4)])
def test_writer_writes_what_safetensors_reads(tmp_path: Path, max_shard_bytes: int, num_files: int) -> None:
    path = write(tmp_path / "m", max_shard_bytes=max_shard_bytes)
    files = sorted(path.glob("*.safetensors"))
    assert len(files) == num_files
    theirs = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert set(theirs) == set(TENSORS)
    assert all(same(theirs[name], tensor) for name, tensor in TENSORS.items())
    ours = ModelDirectory(path)
    assert {name: (info.dtype, info.shape) for name, info in ours.tensors.items()} == {s.name: s[1:] for s in SPECS}
    assert all(same(ours.read(name), tensor) for name, tensor in TENSORS.items())


def test_reader_reads_slices(tmp_path: Path) -> None:
    directory = ModelDirectory(write(tmp_path / "m"))
    for start, stop in ((0, 2), (1, 3), (2, 2), (1, None)):
        assert torch.equal(directory.read("b", 0, start, stop), TENSORS["b"][start:stop])
        assert torch.equal(directory.read("b", 1, start, stop), TENSORS["b"][:, start:stop])


def test_reader_reads_what_safetensors_writes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    directory = ModelDirectory(tmp_path)
    assert all(same(directory.read(name), tensor) for name, tensor in TENSORS.items())
    assert directory.config == {"model_type": "llama"}


def test_writer_publishes_only_a_finished_directory(tmp_path: Path) -> None:
    path = tmp_path / "m"
    with pytest.raises(KeyboardInterrupt), ModelWriter(path, SPECS, {}) as writer:
        writer.write("b", TENSORS["b"])
        assert not path.exists()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with (
        pytest.raises(CheckpointError, match=r"3 tensors of .* were never written"),
        ModelWriter(path, SPECS, {}) as writer,
    ):
        writer.write("b", TENSORS["b"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_writer_leaves_nothing_behind_when_the_disk_fails(tmp_path: Path, monkeypatch, call: str) -> None:
    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf.os, call, fail)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_writer_refuses_a_directory_in_use(tmp_path: Path) -> None:
    path = write(tmp_path / "m")
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(CheckpointError, match="exists and is not empty; choose a new directory"):
        ModelWriter(path, SPECS, {})
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    (tmp_path / "empty").mkdir()
    assert ModelDirectory(write(tmp_path / "empty")).tensors.keys() == TENSORS.keys()


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("a", TENSORS["a"]), ("b", TENSORS["b"].double()), ("b", TENSORS["b"].T), ("z", TENSORS["b"])],
)
def test_writer_refuses_a_tensor_that_was_not_announced(tmp_path: Path, name: str, tensor: torch.Tensor) -> None:
    with (
        pytest.raises(CheckpointError, match="was written, expected TensorSpec"),
        ModelWriter(tmp_path / "m", SPECS, {}) as w,
    ):
        w.write(name, tensor)


def test_writer_writes_strided_tensors(tmp_path: Path) -> None:
    tensor = torch.arange(12.0).reshape(4, 3).T
    with ModelWriter(tmp_path / "m", [TensorSpec("b", tensor.dtype, (3, 4))], {}) as writer:
        writer.write("b", tensor.requires_grad_())
    assert torch.equal(load_file(tmp_path / "m/model.safetensors")["b"], tensor.detach())


def test_writer_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    specs = [TensorSpec(f"t{i}", torch.float32, (1 << 20,)) for i in range(8)]
    tensor = torch.zeros(1 << 20)
    tracemalloc.start()
    with ModelWriter(tmp_path / "m", specs, {}) as writer:
        for spec in specs:
            writer.write(spec.name, tensor)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "m/model.safetensors").stat().st_size > 8 * 4 * (1 << 20)
    assert peak < 2 << 20


def test_writer_copies_tokenizer_files_but_no_code(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenization_custom.py", "pytorch_model.bin"):
        (source / name).write_text(name)
    path = write(tmp_path / "m", companions=source)
    expected = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(file.name for file in path.iterdir()) == expected
    assert (path / "tokenizer.json").read_text() == "tokenizer.json"


# --- refusals


def test_reader_refuses_code_that_comes_with_a_model(tmp_path: Path) -> None:
    path = write(tmp_path / "m", {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}})
    (path / "modeling_evil.py").write_text("raise SystemExit('imported')")
    with pytest.raises(CheckpointError, match=r"config.json: `auto_map` asks for Python code.*never runs"):
        ModelDirectory(path)
    assert "modeling_evil" not in sys.modules


OUTSIDE = ["../other/model.safetensors", "/etc/passwd", "~/model.safetensors", "a/b.safetensors", "..", ""]
NO_WEIGHTS = ["model.bin", ".hidden.safetensors", "model\0.safetensors", 7, None]


@pytest.mark.parametrize("file", OUTSIDE + NO_WEIGHTS)
def test_reader_refuses_an_index_that_points_elsewhere(tmp_path: Path, file: object) -> None:
    write(tmp_path / "other")
    path = write(tmp_path / "m", max_shard_bytes=1)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"b": file}}))
    with pytest.raises(CheckpointError, match=r"only \.safetensors files beside the index are read"):
        ModelDirectory(path)


def test_reader_refuses_an_index_that_does_not_fit(tmp_path: Path) -> None:
    path = write(tmp_path / "m", max_shard_bytes=50)
    index = path / "model.safetensors.index.json"
    good = json.loads(index.read_text())["weight_map"]
    first = good["b"]
    cases = [
        ({**good, "extra": first}, rf"extra \(index: {first}, found in: None\)"),
        ({name: file for name, file in good.items() if name != "empty"}, r"empty \(index: None, found in: model-"),
        ({**good, "a": first}, rf"a \(index: {first}, found in: model-"),
        ({**good, "a": "gone.safetensors"}, "files that do not exist: gone.safetensors"),
        ({}, "`weight_map` must map"),
        ([], "`weight_map` must map"),
    ]
    for weight_map, message in cases:
        index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=message):
            ModelDirectory(path)
    tables = {"model.layers.0.self_attn.rotary_emb.inv_freq": first}  # read by nobody
    index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": {**good, **tables}}))
    assert ModelDirectory(path).tensors.keys() == TENSORS.keys()


def test_reader_refuses_a_tensor_in_two_files(tmp_path: Path) -> None:
    path = write(tmp_path / "m", max_shard_bytes=1)
    names = sorted(file.name for file in path.glob("*.safetensors"))
    (path / names[1]).write_bytes((path / names[0]).read_bytes())
    with pytest.raises(CheckpointError, match=f"{names[1]}: tensor 'b' is also in {names[0]}"):
        ModelDirectory(path)


def test_reader_refuses_ambiguous_weights(tmp_path: Path) -> None:
    path = write(tmp_path / "m", max_shard_bytes=1)
    save_file(TENSORS, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"holds both model\.safetensors and"):
        ModelDirectory(path)


def test_reader_reads_a_single_file_with_an_index_of_its_own(tmp_path: Path) -> None:
    path = write(tmp_path / "m")
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(TENSORS, "model.safetensors")}))
    assert ModelDirectory(path).tensors.keys() == TENSORS.keys()
    index.write_text(json.dumps({"weight_map": dict.fromkeys([*TENSORS, "more"], "model.safetensors")}))
    with pytest.raises(CheckpointError, match=r"more \(index: model\.safetensors, found in: None\)"):
        ModelDirectory(path)


def test_reader_refuses_a_directory_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere is not a directory"):
        ModelDirectory(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        ModelDirectory(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor .* found: config\.json"):
        ModelDirectory(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": 1, "a": 2}', "\xff", "[" * 100_000, '{"a": NaN'])
def test_read_config_refuses_bad_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"not valid JSON|must hold a JSON object"):
        hf.read_config(tmp_path)


def test_read_config_refuses_code_however_it_is_nested(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"auto_map": ' + "[" * 900 + "]" * 900 + "}")
    with pytest.raises(CheckpointError, match="which never runs here"):
        hf.read_config(tmp_path)


def test_reader_reads_a_scalar(tmp_path: Path) -> None:
    scalar = torch.tensor(1.5, dtype=torch.float64)
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": scalar}, tmp_path / "model.safetensors")
    assert torch.equal(ModelDirectory(tmp_path).read("a"), scalar)


def test_message_with_half_a_surrogate_pair_can_be_printed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a\\ud800": 1, "a\\ud800": 2}')
    with pytest.raises(CheckpointError, match=r"field 'a\\ud800' occurs twice") as caught:
        hf.read_config(tmp_path)
    assert str(caught.value).encode()


def test_read_config_refuses_a_huge_file_unread(tmp_path: Path) -> None:
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match="more than the"):
        hf.read_config(tmp_path)


def test_read_config_refuses_a_fifo(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        hf.read_config(tmp_path)


@pytest.mark.parametrize("cut", ["-1", "half", "0", "+1"])
def test_reader_refuses_a_truncated_or_grown_file(tmp_path: Path, cut: str) -> None:
    path = write(tmp_path / "m")
    file = path / "model.safetensors"
    raw = file.read_bytes()
    file.write_bytes({"-1": raw[:-1], "half": raw[: len(raw) // 2], "0": b"", "+1": raw + b"\0"}[cut])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: "):
        ModelDirectory(path)


def test_writers_of_one_directory_do_not_mix(tmp_path: Path) -> None:
    path, barrier, errors = tmp_path / "m", threading.Barrier(2), []

    def run() -> None:
        try:
            with ModelWriter(path, SPECS, {}) as writer:
                for name, tensor in TENSORS.items():
                    writer.write(name, tensor)
                barrier.wait()
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 1  # the second rename finds the name taken
    assert ModelDirectory(path).tensors.keys() == TENSORS.keys()
    assert [file.name for file in tmp_path.iterdir()] == ["m"]


def test_writer_that_failed_in_a_tensor_takes_no_more(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "m"
    with pytest.raises(CheckpointError, match=r"tensor b of .* was written in part"), ModelWriter(path, SPECS, {}) as w:
        monkeypatch.setattr("fastpref.checkpoint.hf.encode_header", lambda shard: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            w.write("b", TENSORS["b"])
        monkeypatch.undo()
        w.write("b", TENSORS["b"])
    assert list(tmp_path.iterdir()) == []


def test_writer_entered_again_after_an_error_begins_again(tmp_path: Path) -> None:
    writer = ModelWriter(tmp_path / "m", SPECS, {})
    for end in (KeyboardInterrupt, None):
        with contextlib.suppress(KeyboardInterrupt), writer:
            for name, tensor in TENSORS.items():
                writer.write(name, tensor)
            if end:
                raise end
    assert ModelDirectory(tmp_path / "m").tensors.keys() == TENSORS.keys()
