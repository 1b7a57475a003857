"""The readers of files that nobody vouches for, and what each must do with any bytes at all.

A target gives a valid value, whose form is checked here, or its own error with a message that names the file: never
another exception, never more time or memory than `watching` allows, and no other file is opened.
"""

from __future__ import annotations

import json
import os
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet
import safetensors.torch
import torch
from opened_files import opened_files

from fastpref.checkpoint import directory, manifest
from fastpref.checkpoint.headers import TensorSpec, encode_header, read_header
from fastpref.checkpoint.hf import ModelDirectory
from fastpref.data import PreferencePair, read_pairs
from fastpref.data.records import MAX_WEIGHT, MIN_WEIGHT
from fastpref.errors import CheckpointError, ConfigError, DataError, FastprefError

CPU_SECONDS = 5.0
"""For one input of some kilobytes, on a machine that is busy with other things."""
PEAK_BYTES = 64 * 2**20
"""Of Python objects, and of Arrow's buffers."""


class Document(NamedTuple):
    """A file of a target's folder, valid as it stands; its `kind` says how it can be damaged."""

    name: str
    kind: str
    content: bytes


@dataclass(frozen=True)
class Target:
    """Something that reads a folder of files.

    Attributes:
        read: takes a folder and the name of the file that was tampered with; checks what it returns.
        error: the only exception that `read` may end with, beside AssertionError for a wrong value.
        documents: the files that are tampered with, one at a time.
    """

    name: str
    read: Callable[[Path, str], object]
    error: type[FastprefError]
    documents: tuple[Document, ...]

    def write(self, folder: Path) -> None:
        """Fill `folder` with all documents as they should be."""
        for document in self.documents:
            path = folder / document.name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(document.content)

    def survives(self, folder: Path, document: Document, content: bytes) -> bool:
        """Put `content` in the document's place and read the folder, which must hold the other documents.

        Returns:
            Whether it was accepted.

        Raises:
            AssertionError: the reader did what it must not do; any other exception that is not its own, likewise.
        """
        path = folder / document.name
        path.write_bytes(content)
        try:
            with watching(folder):
                self.read(folder, document.name)
        except self.error as error:
            message = str(error)
            message.encode()  # a terminal or a log must be able to show it
            assert str(folder) in message or "override" in message, f"which file? {message}"
            assert len(message) < 5000 + len(content), f"a message of {len(message)} characters"
            return False
        finally:
            path.write_bytes(document.content)
        return True


@contextmanager
def tracing_memory() -> Iterator[None]:
    """Let `watching` see Python's memory, which slows everything down."""
    tracemalloc.start()
    try:
        yield
    finally:
        time.sleep(0.2)  # a thread of Arrow may still let go of a buffer; CPython crashes if tracing ends meanwhile
        tracemalloc.stop()


@contextmanager
def watching(folder: Path) -> Iterator[None]:
    """Fail where the block, also one that raises, uses too much or opens a file outside of `folder`."""
    start, is_tracing, before = time.process_time(), tracemalloc.is_tracing(), 0
    if is_tracing:
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
    try:
        with opened_files() as opened:
            yield
    finally:
        seconds, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1] - before
        # a module that is imported late is not an input
        outside = [path for path, _ in opened if folder not in path.parents and path.suffix not in (".py", ".pyc")]
        assert not outside, f"opened {outside}"
        assert seconds < CPU_SECONDS, f"took {seconds:.1f} s"
        assert peak < PEAK_BYTES, f"took {peak >> 20} MiB"
        assert pa.default_memory_pool().max_memory() < PEAK_BYTES, "Arrow's buffers grew too large"


def _read_data(folder: Path, name: str) -> None:
    path = folder / name
    pairs = list(read_pairs(path.parent if path.name == "state.json" else path))
    for pair in pairs:
        _check_text(pair.prompt)
        assert type(pair.prompt) is type(pair.chosen) is type(pair.rejected)
        _check_text(pair.chosen)
        _check_text(pair.rejected)
        assert type(pair.weight) is float and MIN_WEIGHT <= pair.weight <= MAX_WEIGHT
        assert pair.line >= 1 and pair.path.startswith(str(folder))
    if path.suffix in (".json", ".jsonl") and path.name != "state.json":
        again = folder / "again.jsonl"
        again.write_text("".join(json.dumps(_record(pair)) + "\n" for pair in pairs))
        assert list(map(_record, read_pairs(again))) == list(map(_record, pairs))


def _record(pair: PreferencePair) -> dict[str, Any]:
    return {key: value for key, value in asdict(pair).items() if key not in ("path", "line")}


def _check_text(text: Any) -> None:
    if isinstance(text, str):
        text.encode()
        return
    for message in text:
        assert isinstance(message["role"], str) and message["role"]
        assert isinstance(message["content"], str)
        json.dumps(message, ensure_ascii=False, default=str).encode()


def _read_config(folder: Path, name: str) -> None:
    # the other targets need not wait for Megatron
    from fastpref.run.config.run_file import dump_run_config, load_run_config

    if name == "override.txt":
        # as the operating system hands over an argument that is not valid UTF-8
        override = (folder / name).read_bytes().decode("utf-8", "surrogateescape")
        config = load_run_config(folder / "run.yaml", [override])
    else:
        config = load_run_config(folder / name)
    again = folder / "again.yaml"
    again.write_text(dump_run_config(config), encoding="utf-8")
    assert load_run_config(again) == config


def _read_manifest(folder: Path, name: str) -> None:
    if name == directory.STATE_FILE:
        assert isinstance(directory.read_state(folder), dict)
        return
    records = manifest.read_manifest(folder)
    for file, record in records.items():
        assert file == os.path.basename(file) and file not in ("", ".", ".."), file
        assert record.size >= 0 and len(bytes.fromhex(record.sha256)) == 32
    manifest.verify(folder)
    for file, record in records.items():
        content = (folder / file).read_bytes()
        assert (record.size, record.sha256) == (len(content), sha256(content).hexdigest()), file


def _read_model(folder: Path, name: str) -> None:
    model = ModelDirectory(folder / Path(name).parent)
    stored: dict[str, torch.Tensor] = {}
    for path in {info.path for info in model.tensors.values()}:
        stored |= safetensors.torch.load(path.read_bytes())
        specs = [TensorSpec(name, info.dtype, info.shape) for name, info in read_header(path).items()]
        again = path.with_suffix(".again")
        again.write_bytes(encode_header(specs) + bytes(sum(spec.num_bytes for spec in specs)))
        assert {key: info[1:] for key, info in read_header(again).items()} == {key: (d, s) for key, d, s in specs}
    assert set(stored) == set(model.tensors)
    for key, info in model.tensors.items():
        tensor = model.read(key)
        assert (tensor.dtype, tuple(tensor.shape)) == (info.dtype, info.shape)
        assert _raw(tensor) == _raw(stored[key])


def _raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _data_documents() -> Iterator[Document]:
    user, good, bad = (
        {"role": role, "content": text} for role, text in (("user", "Hi"), ("assistant", "A"), ("x", "B"))
    )
    plain = {"prompt": "2+2=", "chosen": "4", "rejected": "5", "weight": 2}
    chat = {"prompt": [user], "chosen": [good], "rejected": bad, "tools": [{"name": "add", "n": 1}]}
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "add"}}], "content": None}
    turns = {"conversations": [{"from": "human", "value": "a"}], "system": "S", "chosen": good, "rejected": bad}
    whole = {"prompt": "Hi", "chosen": [user, good], "rejected": [user, call], "tools": '[{"a": 1}]'}
    records = [plain, chat, turns, whole, {"chosen": "Q: a", "rejected": "Q: b"}]
    lines = [json.dumps(record).encode() + b"\n" for record in records]
    yield Document("pairs.jsonl", "jsonl", b"".join(lines))
    yield Document("pairs.json", "json", b"[" + b",".join(lines) + b"]")
    table = pa.Table.from_pylist([{**plain, "note": [user]}, {**plain, "prompt": "x" * 200}] * 3)
    chats = pa.Table.from_pylist([{key: chat[key] for key in ("prompt", "chosen")} | {"rejected": [bad]}] * 3)
    tool = pa.array(['{"name": "f", "x": [null, 1]}'] * 3)
    tools = pa.ListArray.from_arrays([0, 1, 2, 3], pa.ExtensionArray.from_storage(pa.json_(), tool))
    labels = {"feature": {"names": ["user", "assistant"], "_type": "ClassLabel"}, "_type": "List"}
    features = {"tools": {"feature": {"_type": "Json"}, "_type": "List"}, "more": labels}
    typed = chats.append_column("tools", tools).append_column("more", pa.array([[0], [1], None]))
    typed = typed.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    for name, rows in (("pairs", table), ("chats", chats), ("typed", typed)):
        sink = pa.BufferOutputStream()
        pyarrow.parquet.write_table(rows, sink)
        yield Document(f"{name}.parquet", "columns", sink.getvalue().to_pybytes())
    for name, opener, rows in (
        ("stream.arrow", pa.ipc.new_stream, chats),
        ("file.arrow", pa.ipc.new_file, table),
        ("saved/a.arrow", pa.ipc.new_stream, table),
    ):
        sink = pa.BufferOutputStream()
        with opener(sink, rows.schema) as writer:
            writer.write_table(rows)
        yield Document(name, "columns", sink.getvalue().to_pybytes())
    yield Document(
        "saved/state.json", "json", b'{"_data_files": [{"filename": "a.arrow"}], "_indices_data_files": null}'
    )


def _config_documents() -> Iterator[Document]:
    text = """# a run
model:
  tokenizer: tok
  config: {model_type: llama, vocab_size: 448, rope_theta: 10000.0, name: "a\\u00e9", more: [1, null, {a: true}]}
data:
  train: [a.jsonl, &e b.jsonl]
  eval: *e
  max_length: 64
  chat_template_kwargs:
    date: '2001-01-01'
loss:
  pref_loss: [sigmoid, sft]
  loss_weights: [1.0, 1]
  beta: 1e-1
training:
  output_dir: runs/x
  per_device_train_batch_size: 0x10
  learning_rate: 1.0e-3
  save_steps: null
  report_to: []
  bf16: true
"""
    yield Document("run.yaml", "yaml", text.encode())
    sections = {
        "model": {"path": "policy"},
        "data": {"train": "a.jsonl"},
        "lora": {"r": 8},
        "loss": {"pref_loss": "orpo"},
        "training": {"max_steps": 3, "learning_rate": 1e-3},
    }
    yield Document("json.yaml", "json", json.dumps(sections).encode())
    yield Document("override.txt", "yaml", b"training.learning_rate: 1e-4".replace(b": ", b"="))


def _manifest_documents() -> Iterator[Document]:
    files = {
        "weights.bin": b"\x00\x01" * 50,
        "state.json": b'{"step": 3, "fingerprint": {"seed": 1}}',
        ".metadata": b"",
    }
    records = {name: {"size": len(data), "sha256": sha256(data).hexdigest()} for name, data in files.items()}
    yield Document(manifest.MANIFEST_FILE, "json", json.dumps({"schema": 1, "files": records}).encode())
    for name, data in files.items():
        yield Document(name, "json" if name.endswith(".json") else "bytes", data)


def _model_documents() -> Iterator[Document]:
    tensors = {
        "embed": torch.arange(12.0).view(3, 4),
        "norm": torch.ones(4, dtype=torch.bfloat16),
        "none": torch.empty(0, 4, dtype=torch.float16),
        "scalar": torch.tensor(1.5, dtype=torch.float64),
    }
    yield Document("one/config.json", "json", b'{"model_type": "llama", "vocab_size": 3, "auto_map": null}')
    yield Document("one/model.safetensors", "safetensors", safetensors.torch.save(tensors, {"format": "pt"}))
    shards = {f"model-0000{number}-of-00004.safetensors": name for number, name in enumerate(tensors, start=1)}
    index = {"metadata": {"total_size": 64}, "weight_map": {name: shard for shard, name in shards.items()}}
    yield Document("many/config.json", "json", b"{}")
    yield Document("many/model.safetensors.index.json", "json", json.dumps(index).encode())
    for shard, name in shards.items():
        yield Document(f"many/{shard}", "safetensors", safetensors.torch.save({name: tensors[name]}))


TARGETS = {
    target.name: target
    for target in (
        Target("data", _read_data, DataError, tuple(_data_documents())),
        Target("config", _read_config, ConfigError, tuple(_config_documents())),
        Target("manifest", _read_manifest, CheckpointError, tuple(_manifest_documents())),
        Target("model", _read_model, CheckpointError, tuple(_model_documents())),
    )
}
