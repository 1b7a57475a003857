"""Run at the start of every interpreter that has this folder on its path: Transformer Engine then computes on the CPU.

The folder goes into `PYTHONPATH`, beside one that holds the Python code of Transformer Engine (`make test-te`).
"""

import te_on_cpu

te_on_cpu.install()
