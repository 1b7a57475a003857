"""Preference tuning of large-vocabulary language models without ever holding the logits.

`import fastpref` needs PyTorch alone. The op is `linear_logps`; the losses are in `fastpref.losses`; the
Megatron-Core trainer is in `fastpref.trainer` (extra `megatron`).
"""

from fastpref.kernels import SequenceLogps, linear_logps

__all__ = ["SequenceLogps", "__version__", "linear_logps"]

__version__ = "0.1.0"
