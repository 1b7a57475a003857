"""Fixtures of the numbered faults: the engines of the op, and runs from `tiny_project` and `tiny_runs`."""

import os
from collections.abc import Iterator

import pytest
from head_oracle import tiles
from tiny_project import project, run_cli, tokenizer_dir
from tiny_runs import one_rank, quiet_args

from fastpref.kernels import native

__all__ = ["engine", "one_rank", "project", "quiet_args", "run_cli", "tokenizer_dir"]

# In the interpreter only the Triton kernels are of interest; `test_kernel_faults_interpreted.py` runs the files again.
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(params=["triton"] if IS_INTERPRETED else ["native", "tiles"])
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backend to name; "tiles" also makes PyTorch's engine work in tiny tiles."""
    if request.param == "triton":
        yield "triton"
    elif request.param == "tiles":
        with tiles():
            yield "torch"
    elif not native.is_available():
        pytest.skip(str(native.unavailable_reason()))
    else:
        yield "torch"
