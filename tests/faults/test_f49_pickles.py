"""Fault 49: pickles as weights, as data or inside a checkpoint are refused, and what they carry never runs."""

import pickle
import time
from pathlib import Path

import pytest

from fastpref.checkpoint.hf import ModelDirectory
from fastpref.errors import CheckpointError


class Payload:
    """What a pickle can do when it is loaded: here, to make a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return (Path.touch, (self.proof,))


@pytest.fixture
def payload(tmp_path: Path):
    """The bytes; afterwards nothing may have loaded them."""
    proof = tmp_path / "executed"
    content = pickle.dumps(Payload(proof))
    yield content
    assert not proof.exists()
    pickle.loads(content)
    assert proof.exists()  # it would have worked


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "weights.pkl"])
def test_reader_refuses_pickled_weights(tmp_path: Path, payload: bytes, name: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / name).write_bytes(payload)
    with pytest.raises(CheckpointError, match=rf"pickles \({name}\), which can run any code .* convert"):
        ModelDirectory(tmp_path / "model")


def test_reader_refuses_a_pickle_that_is_called_safetensors(tmp_path: Path, payload: bytes) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(payload)
    with pytest.raises(CheckpointError, match=r"a header of .* bytes does not fit"):
        ModelDirectory(tmp_path / "model")


@pytest.mark.parametrize("name", ["pairs.npy", "pairs.pt", "pairs.pkl", "pairs.jsonl"])
def test_command_refuses_pickled_data(project: Path, run_cli, payload: bytes, name: str) -> None:
    numpy_header = b"\x93NUMPY\x01\x00\x36\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,)}\n"
    (project / name).write_bytes(numpy_header + payload if name.endswith("npy") else payload)
    result = run_cli("check", "run.yaml", f"data.train={name}")
    assert result.exit_code == 3, result.output
    assert name in result.stderr


@pytest.mark.parametrize("name", [".metadata", "common.pt"])
def test_resume_refuses_a_pickle_that_the_manifest_does_not_vouch_for(
    project: Path, run_cli, payload: bytes, name: str
) -> None:
    """Both files are pickles that Megatron loads: what was put in their place is never opened by it."""
    assert run_cli("train", "run.yaml", "training.max_steps=1").exit_code == 0
    file = project / "out" / "checkpoints" / "step-1" / name
    size = file.stat().st_size
    file.write_bytes(payload + b"\0" * (size - len(payload)))  # what follows a pickle is not looked at
    assert file.stat().st_size == size
    started = time.process_time()
    result = run_cli("train", "run.yaml", "training.max_steps=1", "training.resume_from_checkpoint=latest")
    assert result.exit_code == 4 and f"{name} has SHA-256" in " ".join(result.stderr.split()), result.output
    assert time.process_time() - started < 20
