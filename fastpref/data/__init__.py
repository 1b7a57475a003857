"""Preference data: files -> pairs -> tokens -> micro-batches.

`load_dataset` reads and tokenises, `PairSampler` says which pairs a step uses, `PreferenceCollator` builds tensors;
`plan_rows` and `PackedCollator` do so for packed rows, which `Segments` describes.
Importing this package needs PyTorch alone; the extra `hf` brings tokenizers, chat templates and Parquet.
"""

from fastpref.data.collate import PreferenceCollator
from fastpref.data.collate_packed import PackedCollator
from fastpref.data.config import DataConfig
from fastpref.data.dataset import PreferenceDataset, load_dataset
from fastpref.data.packing import pair_cost, plan_rows, rows_of_rank
from fastpref.data.readers import read_pairs
from fastpref.data.report import DataReport, LengthStats
from fastpref.data.sampler import PairSampler
from fastpref.data.schema import FILLER_ID, IGNORE_INDEX, Message, PreferencePair, TokenizedPair
from fastpref.data.segments import Segment, Segments
from fastpref.data.tokenize import tokenize_pairs
from fastpref.data.tokenizer import check_token_ids, load_tokenizer, resolve_pad_token_id

__all__ = [
    "FILLER_ID",
    "IGNORE_INDEX",
    "DataConfig",
    "DataReport",
    "LengthStats",
    "Message",
    "PackedCollator",
    "PairSampler",
    "PreferenceCollator",
    "PreferenceDataset",
    "PreferencePair",
    "Segment",
    "Segments",
    "TokenizedPair",
    "check_token_ids",
    "load_dataset",
    "load_tokenizer",
    "pair_cost",
    "plan_rows",
    "read_pairs",
    "resolve_pad_token_id",
    "rows_of_rank",
    "tokenize_pairs",
]
