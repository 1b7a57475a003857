"""The same preference training in TRL and here: same tokens, same optimizer, every metric of every step compared.

Design decisions:
- Each trainer runs through its own front door (TRL's trainer classes; `RunConfig` and `DPOTrainer.from_config`) and
  reads the same JSONL file, so tokenisation, batching and logging are compared together with the arithmetic.
- Nothing is trained before the tokens of all pairs are found equal.
- fp32 on a CPU, one process, pairs in file order, constant learning rate, no dropout.
- TRL averages the token means of microbatches; here a token weighs the same wherever it lands. Where such a mean is
  part of the loss (ORPO) or compared (`token_stats`), TRL gets all pairs of a step as one microbatch, for which both
  definitions are one. This library always accumulates.
"""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastpref.data import IGNORE_INDEX, DataConfig, TokenizedPair, load_dataset, load_tokenizer
from fastpref.errors import ConfigError, DataError
from fastpref.losses import DPOConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fastpref.trainer import RunConfig

LIMIT = 1e-3
"""Largest relative difference that counts as parity, for every metric at every step."""
FP32_EPSILON = torch.finfo(torch.float32).eps

_SHARED_METRICS = (
    *("loss", "grad_norm", "learning_rate", "logps/chosen", "logps/rejected"),
    *("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
)
_ORPO_METRICS = ("nll_loss", "log_odds_chosen", "log_odds_ratio")
_TOKEN_METRICS = ("entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected")


@dataclass(frozen=True, kw_only=True)
class ParityRun:
    """A training run for both trainers."""

    model_dir: Path
    """Hugging Face model directory with a tokenizer: policy, and reference where the loss reads one."""
    data_file: Path
    """JSONL preference pairs, at least `steps * batch_pairs * accumulation`, used in this order."""
    work_dir: Path
    """Directory for what the trainers write."""
    loss: DPOConfig
    """The loss under its name in both libraries, with beta, label_smoothing and loss_weights; or orpo."""
    steps: int = 4
    """Optimizer steps."""
    batch_pairs: int = 2
    """Pairs in a microbatch."""
    accumulation: int = 2
    """Microbatches in a step."""
    max_length: int = 256
    """Tokens of prompt and completion together; longer pairs lose the end of the completion."""
    learning_rate: float = 1e-5
    """Constant."""
    weight_decay: float = 0.01
    """AdamW's decay; norms and biases are exempt on both sides."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: float = 1.0
    """Global norm to clip to."""
    token_stats: bool = False
    """Also compare entropy, token accuracy and mean logits."""

    @property
    def data(self) -> DataConfig:
        """The pairs and their truncation, for this library."""
        return DataConfig(train=str(self.data_file), max_length=self.max_length)

    @property
    def is_orpo(self) -> bool:
        """Whether the loss is ORPO, which TRL trains with another class."""
        return self.loss.loss_names == ("orpo",)

    @property
    def trl_layout(self) -> tuple[int, int]:
        """TRL's pairs in a microbatch and microbatches in a step."""
        if self.loss.needs_mean_nll_count or self.token_stats:
            return self.batch_pairs * self.accumulation, 1
        return self.batch_pairs, self.accumulation

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metrics that both trainers log with one meaning; `logps/*` are per token under ORPO, as in TRL."""
        extra = _ORPO_METRICS if self.is_orpo else _TOKEN_METRICS if self.token_stats else ()
        return _SHARED_METRICS + extra


@dataclass(frozen=True, kw_only=True)
class TrainerRecord:
    """What one trainer did: its tokens, one dict of metrics per step, and the seconds it trained."""

    pairs: list[TokenizedPair]
    steps: list[dict[str, float]]
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """One metric at one step (from 1)."""

    metric: str
    step: int
    trl: float
    fastpref: float
    resolution: float = 0.0
    """What the metric changes by when the fp32 numbers it is the difference of change in their last bit; else 0."""

    @property
    def relative_difference(self) -> float:
        """|a - b| / max(|a|, |b|); 0 where both are equal, NaN where one is."""
        if self.trl == self.fastpref:
            return 0.0
        return abs(self.trl - self.fastpref) / max(abs(self.trl), abs(self.fastpref))

    @property
    def agrees(self) -> bool:
        """Whether the values are within `LIMIT` of each other, or one bit of the log-probs apart; False for NaN."""
        return self.relative_difference <= LIMIT or abs(self.trl - self.fastpref) <= self.resolution


def compare(run: ParityRun, trl: TrainerRecord, fastpref: TrainerRecord) -> list[Comparison]:
    """Every metric of `run` at every step, metric by metric.

    Raises:
        DataError: the trainers did not see the same tokens, or did another number of steps.
    """
    check_tokens(trl.pairs, fastpref.pairs)
    return compare_steps(run, trl.steps, fastpref.steps)


def compare_steps(
    run: ParityRun, trl: Sequence[Mapping[str, float]], fastpref: Sequence[Mapping[str, float]]
) -> list[Comparison]:
    """Every metric of `run` at every step, metric by metric, where the tokens are known to be equal.

    Raises:
        DataError: the trainers did another number of steps.
    """
    if not len(trl) == len(fastpref) == run.steps:
        raise DataError(f"asked for {run.steps} steps, TRL did {len(trl)} and fastpref {len(fastpref)}")
    return [
        Comparison(metric, index + 1, theirs[metric], ours[metric], _resolution(run, metric, theirs))
        for metric in run.metrics
        for index, (theirs, ours) in enumerate(zip(trl, fastpref, strict=True))
    ]


def _resolution(run: ParityRun, metric: str, step: Mapping[str, float]) -> float:
    """Last bit of the mean log-probs, in the units of metrics that are differences of log-probs."""
    last_bit = FP32_EPSILON * max(abs(step["logps/chosen"]), abs(step["logps/rejected"]))
    if metric.startswith("rewards/") and metric != "rewards/accuracies":
        return run.loss.beta * last_bit
    return last_bit if metric == "log_odds_chosen" else 0.0


def check_tokens(trl: Sequence[TokenizedPair], fastpref: Sequence[TokenizedPair]) -> int:
    """Require the same pairs, token by token and label by label.

    Returns:
        Tokens compared; a prompt counts on both sides.

    Raises:
        DataError: names the first pair, side and position that differ.
    """
    if len(trl) != len(fastpref):
        raise DataError(f"TRL keeps {len(trl)} pairs and fastpref {len(fastpref)}")
    num_tokens = 0
    for index, (theirs, ours) in enumerate(zip(trl, fastpref, strict=True)):
        for field in ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels"):
            left, right = getattr(theirs, field), getattr(ours, field)
            if left != right:
                position = next((at for at, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), None)
                where = f"position {position}" if position is not None else f"length {len(left)} and {len(right)}"
                raise DataError(f"pair {index}: {field} of TRL and fastpref differ at {where}")
        num_tokens += len(ours.chosen_input_ids) + len(ours.rejected_input_ids)
    return num_tokens


def write_text_form(pairs_file: Path, tokenizer: Any, out_file: Path) -> Path:
    """Write conversational pairs as strings: the prompt rendered with its generation prompt, the completions bare.

    TRL's ORPO trainer adds an end-of-sequence token to every chat completion whose template writes something after
    its own (here a newline), its DPO trainer does not. Strings end in exactly one such token in both and here.
    """
    with out_file.open("w", encoding="utf-8") as file:
        for line in pairs_file.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            prompt = tokenizer.apply_chat_template(record["prompt"], tokenize=False, add_generation_prompt=True)
            sides = {side: record[side][0]["content"] for side in ("chosen", "rejected")}
            file.write(json.dumps({"prompt": prompt, **sides}, ensure_ascii=False) + "\n")
    return out_file


def fastpref_config(run: ParityRun) -> RunConfig:
    """The run file of `run`: padded rows, the reference in memory."""
    from fastpref.trainer import ModelConfig, RunConfig, TrainingArguments

    return RunConfig(
        model=ModelConfig(path=str(run.model_dir)),
        data=run.data,
        loss=run.loss,
        training=TrainingArguments(
            output_dir=str(run.work_dir / "fastpref"),
            max_steps=run.steps,
            per_device_train_batch_size=run.batch_pairs,
            gradient_accumulation_steps=run.accumulation,
            shuffle=False,
            learning_rate=run.learning_rate,
            min_lr=run.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=run.weight_decay,
            adam_epsilon=run.adam_epsilon,
            max_grad_norm=run.max_grad_norm,
            logging_steps=1,
            log_token_stats=run.token_stats,
            save_on_end=False,
            report_to=(),
            disable_progress=True,
        ),
    )


def run_fastpref(run: ParityRun, config: RunConfig | None = None) -> TrainerRecord:
    """Trains with `DPOTrainer.from_config`; creates and closes its own process group.

    Args:
        run: the run.
        config: its settings where they differ from `fastpref_config(run)`.
    """
    from fastpref.trainer import DPOTrainer
    from fastpref.trainer.ranks.platform import destroy

    try:
        trainer = DPOTrainer.from_config(config or fastpref_config(run))
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        steps = [_in_trl_terms(run, record) for record in trainer.log_history]
        return TrainerRecord(pairs=list(trainer.feed.train_dataset), steps=steps, seconds=seconds)
    finally:
        destroy()


def _in_trl_terms(run: ParityRun, record: dict[str, float]) -> dict[str, float]:
    """A logged step under TRL's names and units."""
    renamed = {**record, "learning_rate": record["lr"]}
    if run.is_orpo:
        # TRL's ORPO logs log-probs per token; the rewards are beta times those, the SFT loss is minus the chosen one.
        renamed["logps/chosen"] = -record["sft_loss"]
        renamed["logps/rejected"] = record["rewards/rejected"] / run.loss.beta
    return renamed


def run_trl(run: ParityRun, settings: Mapping[str, Any] | None = None) -> TrainerRecord:
    """Trains with TRL's `DPOTrainer` or `ORPOTrainer`.

    Args:
        run: the run.
        settings: fields of TRL's configuration in place of those that `run` asks for.

    Raises:
        ConfigError: TRL takes another value than the one asked for.
        DataError: its tokens are not those of `load_dataset`; nothing was trained.
    """
    from datasets import Dataset  # type: ignore[import-untyped]
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback

    model = AutoModelForCausalLM.from_pretrained(run.model_dir, dtype=torch.float32)
    # transformers keeps the gradient of the input embedding from the padding token's row. Where that token also ends
    # every chat turn, a real token is left untrained; without this, each side would train another model.
    model.get_input_embeddings().padding_idx = None
    tokenizer = AutoTokenizer.from_pretrained(run.model_dir)
    records = [json.loads(line) for line in run.data_file.read_text(encoding="utf-8").splitlines()]
    build = _orpo_trainer if run.is_orpo else _dpo_trainer
    trainer = build(run, _trl_settings(run) | dict(settings or {}), model, tokenizer, Dataset.from_list(records))
    for name, wanted in (settings or {}).items():
        if getattr(trainer, name, wanted) != wanted:
            raise ConfigError(f"TRL was asked for {name}={wanted} and takes {getattr(trainer, name)}; leave it out")
    trainer.remove_callback(PrinterCallback)
    pairs = [_trl_pair(run, trainer, index) for index in range(len(trainer.train_dataset))]
    check_tokens(pairs, load_dataset(run.data.train_paths, load_tokenizer(run.model_dir), run.data))
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    # The last record is a summary of the run.
    steps = [record for record in trainer.state.log_history if "grad_norm" in record]
    # Trainer and model refer to each other: without this both would stay in memory beside the other side's.
    del trainer, model
    gc.collect()
    return TrainerRecord(pairs=pairs, steps=steps, seconds=seconds)


def _trl_settings(run: ParityRun) -> dict[str, Any]:
    pairs, accumulation = run.trl_layout
    return {
        "output_dir": str(run.work_dir / "trl"),
        "max_steps": run.steps,
        "per_device_train_batch_size": pairs,
        "gradient_accumulation_steps": accumulation,
        "train_sampling_strategy": "sequential",
        "learning_rate": run.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": run.weight_decay,
        "adam_epsilon": run.adam_epsilon,
        "max_grad_norm": run.max_grad_norm,
        "optim": "adamw_torch",
        "max_length": run.max_length,
        "beta": run.loss.beta,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        # Recomputing activations changes no number, only the time.
        "gradient_checkpointing": False,
    }


def _dpo_trainer(
    run: ParityRun, settings: Mapping[str, Any], model: PreTrainedModel, tokenizer: Any, dataset: Any
) -> Any:
    import trl

    args = trl.DPOConfig(
        loss_type=list(run.loss.loss_names),
        loss_weights=None if run.loss.loss_weights is None else list(run.loss.loss_weights),
        label_smoothing=run.loss.label_smoothing,
        **settings,
    )
    return trl.DPOTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer)


def _orpo_trainer(
    run: ParityRun, settings: Mapping[str, Any], model: PreTrainedModel, tokenizer: Any, dataset: Any
) -> Any:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    args = ORPOConfig(remove_unused_columns=False, **settings)
    return ORPOTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer)


def _trl_pair(run: ParityRun, trainer: Any, index: int) -> TokenizedPair:
    """A pair as it reaches TRL's model, truncation included."""
    example = trainer.train_dataset[index]
    if run.is_orpo:
        sides = {side: (example[f"{side}_input_ids"], example[f"{side}_labels"]) for side in ("chosen", "rejected")}
    else:
        batch, sides = trainer.data_collator([example]), {}
        for row, side in enumerate(("chosen", "rejected")):
            real = batch["attention_mask"][row].bool()
            ids, scored = batch["input_ids"][row][real], batch["completion_mask"][row][real].bool()
            sides[side] = (ids.tolist(), ids.where(scored, IGNORE_INDEX).tolist())
    return TokenizedPair(
        pair_id=index,
        chosen_input_ids=sides["chosen"][0],
        chosen_labels=sides["chosen"][1],
        rejected_input_ids=sides["rejected"][0],
        rejected_labels=sides["rejected"][1],
    )


def worst(comparisons: Sequence[Comparison]) -> Comparison:
    """The comparison with the largest difference, NaN above all."""
    return max(comparisons, key=lambda row: math.inf if math.isnan(row.trl + row.fastpref) else row.relative_difference)
