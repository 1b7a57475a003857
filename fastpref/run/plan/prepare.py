"""Everything about a run that needs no weights: its files, architecture, layout, tokens, batches and schedule.

`prepare` joins no process group and needs no GPU, so that a check sees exactly what a run would.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fastpref.checkpoint.directory import complete_candidate, read_state
from fastpref.checkpoint.headers import refuse_if_pointer
from fastpref.checkpoint.hf import read_config
from fastpref.checkpoint.reference_cache import ReferenceCache
from fastpref.data import (
    PackedCollator,
    PreferenceCollator,
    PreferenceDataset,
    check_token_ids,
    load_dataset,
    load_tokenizer,
    resolve_pad_token_id,
)
from fastpref.data.chat import with_chat_template
from fastpref.data.tokenizer import TOKENIZER_FILES
from fastpref.errors import ConfigError, Problem, raise_if_any
from fastpref.kernels.screened import LEAST_COLUMNS
from fastpref.run.architecture.adapter_files import AdapterFiles
from fastpref.run.architecture.adapters import adapted_linears
from fastpref.run.architecture.architecture import Architecture
from fastpref.run.architecture.model_files import check_model_files
from fastpref.run.config.layout import model_problems, world_problems
from fastpref.run.config.run_config import RunConfig
from fastpref.run.plan.announce import announce
from fastpref.run.plan.fingerprint import (
    LORA_BASE,
    architecture_fingerprint,
    is_of_weights,
    lora_fingerprint,
    require_same,
    settings_fingerprint,
)
from fastpref.run.plan.pair_schedule import PairSchedule
from fastpref.run.plan.pipeline import (
    SAMPLE_PAIRS,
    PipelinePlan,
    expert_stage_problems,
    head_in_layers,
    plan_pipeline,
    row_shape,
)
from fastpref.run.plan.resumption import check_position
from fastpref.run.plan.rows import default_collator, row_capacity
from fastpref.run.plan.surroundings import check_output, path_problems, require_packages, variable_problems


@dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """A validated run: everything but the weights."""

    config: RunConfig
    """The settings."""
    world_size: int
    """Ranks that the run is planned for."""
    architecture: Architecture
    """The model."""
    reference_architecture: Architecture | None
    """The reference, where it has a directory of its own."""
    tokenizer: Any
    """A transformers tokenizer, with the run's chat template."""
    train: PreferenceDataset | None
    """Training pairs; None where only an evaluation was asked for."""
    eval: PreferenceDataset | None
    """Evaluation pairs; None where the file names none."""

    @property
    def datasets(self) -> dict[str, PreferenceDataset]:
        """The data sets that are there, by what they are called in a message."""
        found = {"training pairs": self.train, "evaluation pairs": self.eval}
        return {name: dataset for name, dataset in found.items() if dataset is not None}

    @property
    def data_parallel_size(self) -> int:
        """Copies of the model that work on different pairs."""
        return self.config.training.layout.data_parallel_size(self.world_size)

    @cached_property
    def schedule(self) -> PairSchedule:
        """The training pairs of every optimizer step."""
        num_pairs = 0 if self.train is None else len(self.train)
        return PairSchedule.training(self.config.training, num_pairs, self.data_parallel_size)

    @cached_property
    def head_layers(self) -> float:
        """Cost of the vocabulary head in a step on this data, in layers."""
        dataset = self.eval if self.train is None else self.train
        assert dataset is not None, "a prepared run has data"
        args = self.config.training
        rows = row_shape(dataset[:SAMPLE_PAIRS], self.collator(), args.per_device_train_batch_size)
        has_reference = self.config.loss.use_ref_model and not self.config.precomputes_reference
        return head_in_layers(self.architecture, args, rows, has_reference=has_reference)

    @property
    def pipeline_plan(self) -> PipelinePlan:
        """Layers of every pipeline chunk."""
        args = self.config.training
        head_layers = self.head_layers if args.pipeline_balance == "head_cost" else 0.0
        return plan_pipeline(self.architecture.num_layers, args.layout, head_layers)

    def collator(self) -> PreferenceCollator | PackedCollator:
        """Return what turns pairs into microbatches."""
        config, pad_token_id = self.config, resolve_pad_token_id(self.tokenizer)
        return default_collator(config.loss, config.training, pad_token_id, config.data.pad_to_multiple_of)

    def row_length(self, positions: int) -> int:
        """Return the length of a row that holds so many positions: filled up as the data and then the layout ask."""
        for multiple in (self.config.data.pad_to_multiple_of, self.config.training.layout.row_multiple):
            positions = -(-positions // multiple) * multiple
        return positions

    def row_capacity(self, dataset: PreferenceDataset) -> int | None:
        """Return the most positions of a packed row of `dataset`; None without packing.

        Raises:
            ConfigError: `pack_length` is no multiple of what rows are padded to.
            DataError: a pair does not fit into a row.
        """
        collator = self.collator()
        if not isinstance(collator, PackedCollator):
            return None
        return row_capacity(dataset, collator, self.config.training.pack_length)


def prepare(
    config: RunConfig, world_size: int | None = None, *, for_training: bool = True, saves: bool = True
) -> PreparedRun:
    """Validate a run against its files, and read and tokenise its data.

    Args:
        config: the run.
        world_size: ranks to plan for; None takes those of the process group or the launcher.
        for_training: False is for evaluation alone: training data, schedule and output directory are not looked at.
        saves: whether training saves checkpoints; if not, those of an earlier run may be in the output directory.

    Raises:
        ConfigError: paths, layout, batches, token ids or settings do not fit each other, or environment variables
            do not fit Megatron.
        DataError: a data file is at fault.
        CheckpointError: the files of a model or an adapter do not fit it, another run holds the output directory, or
            the checkpoint to continue from is missing, incomplete or of other settings, or the reference cache is none.
        MissingDependencyError: a package of `report_to` is missing.
    """
    world_size = launched_world_size() if world_size is None else world_size
    train_paths = config.data.train_paths if for_training else ()
    raise_if_any(
        [
            *variable_problems(),
            *path_problems(config, for_training=for_training),
            *_evaluation_problems(config, for_training),
        ]
    )
    if for_training and saves:
        check_output(config)
        require_packages(config.training)
    if config.precomputes_reference and saves and (config.reference_cache.exists() or not for_training):
        ReferenceCache(config.reference_cache)
    wanted = config.training.resume_from_checkpoint
    checkpoint = None if wanted is None else complete_candidate(config.training.checkpoint_root, wanted)
    architecture = Architecture.from_hf(hf_config_of(config))
    reference = None if reference_is_policy(config) else Architecture.of(str(config.reference_path))
    raise_if_any(
        [
            *_layout_problems(config, architecture, world_size),
            *_model_problems(config, architecture),
            *_reference_problems(reference, architecture),
        ]
    )
    _check_files(config, architecture, reference)
    tokenizer = _tokenizer(config)
    run = PreparedRun(
        config=config,
        world_size=world_size,
        architecture=architecture,
        reference_architecture=reference,
        tokenizer=tokenizer,
        train=_read_pairs("training", train_paths, tokenizer, config),
        eval=_read_pairs("evaluation", config.data.eval_paths, tokenizer, config),
    )
    for dataset in (run.train, run.eval):
        if dataset is not None:
            check_token_ids(dataset, architecture.vocab_size, resolve_pad_token_id(tokenizer))
            _check_lengths(dataset, architecture.max_positions)
            run.row_capacity(dataset)
    raise_if_any(problem.under("training") for problem in expert_stage_problems(run.pipeline_plan, architecture))
    if for_training:
        _check_schedule(run)
    if checkpoint is not None:
        # which checkpoint is valid is only found out when it is read
        if for_training and wanted != "latest-valid":
            check_position(checkpoint, run.schedule.total_steps)
        _require_own_checkpoint(run, checkpoint)
    return run


def _tokenizer(config: RunConfig) -> Any:
    """Load the tokenizer and put the run's chat template on it, for whoever renders, compares or saves it."""
    tokenizer = load_tokenizer(config.model.tokenizer_path)
    try:
        return with_chat_template(tokenizer, config.data.chat_template)
    except ConfigError as error:
        raise ConfigError([problem.under("data") for problem in error.problems]) from error


def _read_pairs(what: str, paths: Sequence[str], tokenizer: Any, config: RunConfig) -> PreferenceDataset | None:
    if not paths:
        return None
    announce(config.training, f"Reading {what} pairs from {', '.join(paths)}")
    # the tokenizer has the template by now
    dataset = load_dataset(paths, tokenizer, replace(config.data, chat_template=None))
    announce(config.training, f"Read {what} pairs: {dataset.report.summary()}")
    return dataset


def launched_world_size() -> int:
    """Return the number of ranks of the process group, else of the launcher, else 1."""
    if torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or len(text) > 9 or int(text) < 1:
        raise ConfigError(f"the environment variable WORLD_SIZE must be a number of ranks >= 1, got {text!r}")
    return int(text)


def hf_config_of(config: RunConfig) -> dict[str, Any]:
    """Return the contents of the policy's `config.json`."""
    if config.model.path is not None:
        return read_config(config.model.path)
    assert config.model.config is not None
    return dict(config.model.config)


def reference_is_policy(config: RunConfig) -> bool:
    """Whether the reference has the policy's first weights, adapters aside."""
    path = config.reference_path
    return path is None or (config.model.path is not None and Path(path).samefile(config.model.path))


def _evaluation_problems(config: RunConfig, for_training: bool) -> Iterator[Problem]:
    args = config.training
    if for_training and not config.data.train_paths:
        yield Problem("data.train", "names no file; training needs at least one")
    if not for_training and not config.data.eval_paths:
        yield Problem("data.eval", "names no file; an evaluation needs at least one")
    for name in ("eval_steps", "eval_on_start"):
        if for_training and not config.data.eval_paths and getattr(args, name):
            text = f"({getattr(args, name)}) needs data.eval, which names no file; name one or leave {name} out"
            yield Problem(f"training.{name}", text, ("data.eval",))


def _layout_problems(config: RunConfig, arch: Architecture, world_size: int) -> Iterator[Problem]:
    layout = config.training.layout
    for problem in (*world_problems(layout, world_size), *model_problems(layout, arch)):
        yield problem.under("training")


def _model_problems(config: RunConfig, arch: Architecture) -> Iterator[Problem]:
    coefficient = config.training.moe_aux_loss_coeff
    if arch.experts is None and coefficient:
        text = f"({coefficient}) balances experts, and {arch.model_type} has none; leave it out"
        yield Problem("training.moe_aux_loss_coeff", text)
    tp, is_screened = config.training.tensor_model_parallel_size, config.training.head_forward == "screened"
    columns = -(-arch.vocab_size // tp)
    if is_screened and columns < LEAST_COLUMNS:
        text = (
            f"screened needs {LEAST_COLUMNS} columns of the vocabulary on a rank, got {arch.vocab_size} on {tp}: the "
            f"exact pass would take its place; set exact{', or lower tensor_model_parallel_size' if tp > 1 else ''}"
        )
        yield Problem("training.head_forward", text, ("training.tensor_model_parallel_size",))


def _reference_problems(other: Architecture | None, arch: Architecture) -> Iterator[Problem]:
    if other is None:
        return
    for field in fields(Architecture):
        ours, theirs = getattr(arch, field.name), getattr(other, field.name)
        # neither changes what the weights compute
        if ours != theirs and field.name not in ("init_std", "max_positions"):
            yield Problem("reference.path", f": {field.name} must be the policy's, {ours!r}, got {theirs!r}")


def _check_files(config: RunConfig, arch: Architecture, reference: Architecture | None) -> None:
    """Compare the headers of every weight that the run will load with what it is loaded into."""
    for name in TOKENIZER_FILES:
        file = Path(config.model.tokenizer_path) / name
        if file.is_file():
            refuse_if_pointer(file)
    if config.lora is not None:
        adapted_linears(arch, config.lora)
    if config.model.path is not None:
        check_model_files(config.model.path, arch)
    if reference is not None:
        check_model_files(str(config.reference_path), reference)
    if config.lora is not None and config.lora.path is not None:
        AdapterFiles(config.lora.path, arch, config.lora)


def _require_own_checkpoint(run: PreparedRun, checkpoint: Path) -> None:
    """Compare the settings that a checkpoint records with those of the run; an evaluation reads its weights alone."""
    config, args, experts = run.config, run.config.training, run.architecture.experts
    now = architecture_fingerprint(run.architecture)
    if config.lora is not None:
        now |= lora_fingerprint(config.lora)
    if run.train is not None:
        given = args.moe_aux_loss_coeff
        coefficient = 0.0 if experts is None else experts.router_aux_loss_coef if given is None else given
        now |= settings_fingerprint(args, config.loss, run.schedule, run.train, coefficient)
    saved = read_state(checkpoint).get("fingerprint", {})
    # the checksum of the weights beside adapters is known once they are loaded
    saved = {
        name: value
        for name, value in saved.items()
        if name != LORA_BASE and (run.train is not None or is_of_weights(name))
    }
    require_same(checkpoint, saved, now, args.resume_allow_changes if run.train is not None else ())


def _check_lengths(dataset: PreferenceDataset, max_positions: int) -> None:
    report = dataset.report
    # cheap and nearly always enough: no row is longer than the longest prompt and the longest completion together
    if report.prompt_tokens.max + max(report.chosen_tokens.max, report.rejected_tokens.max) <= max_positions + 1:
        return
    for pair in dataset:
        if pair.num_tokens - 1 > max_positions:  # the last token is only a label
            raise ConfigError(
                f"{pair.source}: {pair.num_tokens} tokens, but the model's max_position_embeddings is {max_positions}; "
                f"set data.max_length to at most {max_positions}"
            )


def _check_schedule(run: PreparedRun) -> None:
    total_steps = run.schedule.total_steps
    warmup_steps = run.config.training.warmup_steps_of(total_steps)
    if warmup_steps >= total_steps:
        raise ConfigError(
            f"warm-up takes {warmup_steps} of {total_steps} steps; lower training.warmup_steps or "
            "training.warmup_ratio, or train longer"
        )
