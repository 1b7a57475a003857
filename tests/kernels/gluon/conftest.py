"""The emulator, and the problems and oracle of the Triton engine's tests."""

import importlib.util
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent / "triton" / "interpreted")]

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]
