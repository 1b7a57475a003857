"""Steps over Transformer Engine's kernels: their gradient norm is a tensor under Megatron-Core 0.17 and newer."""

from __future__ import annotations

import json
from pathlib import Path

from tiny_runs import finish


def test_first_log_is_written(quiet_args, tmp_path: Path) -> None:
    trainer = finish(quiet_args(max_steps=2, log_num_zeros_in_grad=True))
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    norms = [record["grad_norm"] for record in records if "grad_norm" in record]
    assert len(norms) == 2 and all(norm > 0 for norm in norms)
    assert all(isinstance(value, int | float) for record in trainer.log_history for value in record.values())
