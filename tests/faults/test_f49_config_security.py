"""Fault 49: a run file cannot run code, name a type, or make the reader spend time and memory."""

import time
import tracemalloc
from pathlib import Path

import pytest

from fastpref.errors import ConfigError
from fastpref.run.config.run_file import load_run_config

MINIMAL = "model: {path: policy}\ndata: {train: pairs.jsonl}\n"


@pytest.mark.parametrize(
    "payload",
    [
        "!!python/object/apply:os.system ['touch SENTINEL']",
        "!!python/object/apply:os.system [touch SENTINEL]",
        "!!python/name:os.system x",
        "!!python/object/new:os.system ['touch SENTINEL']",
        "!!python/module:antigravity x",
        "!<tag:yaml.org,2002:python/object/apply:os.system> ['touch SENTINEL']",
        "!custom {a: 1}",
        "!!set {a, b}",
        "!!binary aGVsbG8=",
    ],
)
@pytest.mark.parametrize("as_override", [False, True])
def test_load_refuses_tags_and_runs_nothing(tmp_path: Path, monkeypatch, payload: str, as_override: bool) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL + ("" if as_override else f"training: {{output_dir: {payload}}}\n"))
    with pytest.raises(ConfigError, match=r"training\.output_dir must be a plain value, got the YAML tag") as caught:
        load_run_config(path, [f"training.output_dir={payload}"] if as_override else [])
    assert ("override" if as_override else f"{path}:3") in str(caught.value)
    assert not (tmp_path / "SENTINEL").exists()


def alias_bomb(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    "text",
    [
        alias_bomb(12),
        "model: {config: &x {a: *x}}\n",
        "model: {config: " + "[" * 25 + "]" * 25 + "}\n",
        "model: {config: " + "[" * 60_000,
        "".join(f"{' ' * level}a:\n" for level in range(300)),
        f"model: {{config: &a [{'1, ' * 200}]}}\ndata: [{'*a, ' * 60}]\n",
    ],
    ids=["aliases of aliases", "an alias of itself", "deep", "deeper than the stack", "deep by indentation", "wide"],
)
def test_load_bounds_what_a_file_can_cost(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    seconds = []
    for _ in range(3):  # the other processes of the machine share its caches
        start = time.process_time()
        with pytest.raises(ConfigError, match=r"holds at most 10000 values, 20 levels deep") as caught:
            load_run_config(path)
        seconds.append(time.process_time() - start)
    assert str(caught.value).count("run.yaml") == 1 and "not valid" not in str(caught.value)
    tracemalloc.start()  # which makes it three times slower
    with pytest.raises(ConfigError):
        load_run_config(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100 * 2**20
    assert min(seconds) < 1.0


def test_load_keeps_small_aliases(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: {path: &p policy}\ndata: {train: x}\nreference: {path: *p}\n")
    assert load_run_config(path).reference.path == "policy"
