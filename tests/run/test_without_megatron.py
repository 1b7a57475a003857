"""Everything about a run that comes before its first weight works where Megatron is not installed."""

import json
import subprocess
import sys
from pathlib import Path

PROBE = """
import importlib.abc, json, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("megatron", "transformer_engine"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())

from fastpref.run.config.run_file import dump_run_config, load_run_config
from fastpref.run.plan import preview
from fastpref.run.plan.identity import describe_reference, reference_identity
from fastpref.run.plan.prepare import prepare
from fastpref.run.plan.row_usage import row_usages
from fastpref.run.record import curves, reporting

config = load_run_config("run.yaml", ["training.tensor_model_parallel_size=2"])
run = prepare(config, 4)
memory = preview.estimate_memory(run)
print(json.dumps({
    "settings": len(dump_run_config(config).splitlines()),
    "steps": run.schedule.total_steps,
    "axes": [axis.size for axis in preview.layout_axes(run)],
    "stages": [load.layers for load in preview.stage_loads(run)],
    "pairs": [view.source for view in preview.pair_views(run)],
    "parameters": memory.model_parameters,
    "bytes": memory.total,
    "rows": [usage.kind for usage in row_usages(run)],
    "reference": describe_reference(run),
    "identity": sorted(reference_identity(run)),
    "loaded": sorted(name for name in sys.modules if name.startswith(("megatron", "fastpref.trainer"))),
}))
"""


def test_run_is_planned_without_megatron(project: Path) -> None:
    result = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["steps"] == 1 * 10 // (2 * 2 * 2) + 1 and found["axes"] == [2, 1, 2, 1] and found["stages"] == [2]
    assert found["pairs"] == ["pairs.jsonl:1", "pairs.jsonl:2"]
    # 2 layers of attention 3/2 * 16 * 16 * 2 and feed-forward 3 * 16 * 24, 5 norms, embedding and head of 32 tokens
    assert found["parameters"] == 2 * (16 * 16 * 3 + 3 * 16 * 24) + 5 * 16 + 2 * 32 * 16
    assert found["bytes"] > 4 * found["parameters"] and found["settings"] > 80
    assert found["rows"] == ["padded", "packed", "packed, prompt shared"]
    assert found["reference"] == "a frozen copy of the policy" and "tokenizer_sha256" in found["identity"]
    assert found["loaded"] == []
