"""`bench` is not installed: it is imported from the root of the project, wherever pytest was started."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))
