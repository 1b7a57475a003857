"""Mistakes that `mypy --strict` must find: each line with a comment at its end, by the code in it, and no other."""

import torch

import fastpref
from fastpref import linear_logp  # attr-defined
from fastpref.data import DataConfig, PreferenceCollator, load_dataset, plan_row  # attr-defined
from fastpref.losses import DPOConfig, PairLogps, Tensor, preference_loss  # attr-defined
from fastpref.trainer import DPOTrainer, TrainingArguments, load_run_config

hidden, weight, labels = torch.zeros(2, 3, 4), torch.zeros(9, 4), torch.zeros(2, 3, dtype=torch.int64)
scores = fastpref.linear_logps(hidden, weight, labels.tolist())  # arg-type
fastpref.linear_logps(hidden, weight, labels, soft_cap=30.0)  # call-arg
fastpref.linear_logps(hidden, weight, labels, backward=True)  # arg-type
fastpref.linear_logp(hidden, weight, labels)  # attr-defined
scores.logp.sum()  # attr-defined
scores.entropy.sum()  # union-attr
scores.logps = hidden  # misc
DPOConfig(beta="0.1")  # arg-type
DPOConfig(0.1)  # call-arg
preference_loss(DPOConfig(), scores.logps)  # arg-type
PairLogps.from_sequences(scores.logps)  # call-arg
DataConfig(max_len=3)  # call-arg
load_dataset("pairs.jsonl", None)  # call-arg
number: str = len(load_dataset("pairs.jsonl", None, DataConfig()))  # assignment
PreferenceCollator(pad_token_id="<pad>")  # arg-type
TrainingArguments(learning_rate="1e-6")  # arg-type
TrainingArguments(lr=1e-6)  # call-arg
DPOTrainer.from_config("run.yaml")  # arg-type
load_run_config("run.yaml").training.learning_rates  # attr-defined
