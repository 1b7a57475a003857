"""The workload and device of the suite."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --workload."""
    parser.addoption(
        "--workload",
        default="v130-h32-r16",
        help="A name of bench/gpu/inputs.py, drawn on the GPU if there is one; the default is too small to say much.",
    )
