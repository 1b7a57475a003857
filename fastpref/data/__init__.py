"""Preference data: files -> pairs -> tokens -> micro-batches.

`load_dataset` reads and tokenises, `PairSampler` says which pairs a step uses, `PreferenceCollator` builds tensors.
Importing this package needs PyTorch alone; the extra `hf` brings tokenizers, chat templates and Parquet.
"""

from fastpref.data.collate import PreferenceCollator
from fastpref.data.config import DataConfig
from fastpref.data.dataset import PreferenceDataset, load_dataset
from fastpref.data.readers import read_pairs
from fastpref.data.report import DataReport, LengthStats
from fastpref.data.sampler import PairSampler
from fastpref.data.schema import FILLER_ID, IGNORE_INDEX, Message, PreferencePair, TokenizedPair
from fastpref.data.tokenize import tokenize_pairs
from fastpref.data.tokenizer import check_token_ids, load_tokenizer, resolve_pad_token_id

__all__ = [
    "FILLER_ID",
    "IGNORE_INDEX",
    "DataConfig",
    "DataReport",
    "LengthStats",
    "Message",
    "PairSampler",
    "PreferenceCollator",
    "PreferenceDataset",
    "PreferencePair",
    "TokenizedPair",
    "check_token_ids",
    "load_dataset",
    "load_tokenizer",
    "read_pairs",
    "resolve_pad_token_id",
    "tokenize_pairs",
]
