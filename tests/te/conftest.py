"""These tests run on the Python code of Transformer Engine over the stand-in for its extension: `make test-te`."""

import pytest
from tiny_runs import one_rank, quiet_args

from fastpref.trainer.ranks import transformer_engine

__all__ = ["one_rank", "quiet_args"]


@pytest.fixture(autouse=True)
def _on_transformer_engine() -> None:
    if not transformer_engine.computes_here():
        reason = transformer_engine.import_failure or "it is not on the path, or its extension needs a GPU"
        pytest.skip(f"needs Transformer Engine's Python code over tests/te_stub, as `make test-te` has it: {reason}")
