"""Preference data: files -> pairs -> tokens -> micro-batches.

`load_dataset` reads and tokenises, `PairSampler` says which pairs a step uses, `PreferenceCollator` builds tensors.
Importing this package needs PyTorch alone; the extra `hf` brings tokenizers, chat templates and Parquet.
"""

from fastpref.data.collate import PreferenceCollator
from fastpref.data.sampler import PairSampler
from fastpref.data.schema import FILLER_ID, IGNORE_INDEX, Message, PreferencePair, TokenizedPair

__all__ = [
    "FILLER_ID",
    "IGNORE_INDEX",
    "Message",
    "PairSampler",
    "PreferenceCollator",
    "PreferencePair",
    "TokenizedPair",
]
