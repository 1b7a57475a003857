"""What was refused is as it was: a second call finds no half of the first."""

from pathlib import Path

import pytest
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention

from checks.tiny import stock_model, tiny_pairs
from fastpref.data import PackedCollator, PreferenceCollator
from fastpref.errors import ConfigError, FastprefError, MissingDependencyError
from fastpref.run.record import reporting
from fastpref.trainer import DPOConfig, DPOTrainer
from fastpref.trainer.model.attention import SDPACoreAttention
from fastpref.trainer.model.head import HeadOptions, install_heads
from fastpref.trainer.model.packing import VarlenRows, install_packing
from fastpref.trainer.ranks import cpu_platform

PAIRS = tiny_pairs(8, seed=2)


def cores(chunk: torch.nn.Module) -> list[torch.nn.Module]:
    return [module.core_attention for module in chunk.modules() if isinstance(module, SelfAttention)]


def test_first_step_is_refused_before_any_update(quiet_args, monkeypatch) -> None:
    trainer = DPOTrainer(stock_model(0), DPOConfig(), None, quiet_args(), train_dataset=PAIRS)
    before = [parameter.clone() for parameter in trainer.model[0].parameters()]
    attach = trainer.engine.reference.attach

    def spoiled(batches, dataset):
        batches = attach(batches, dataset)
        for batch in batches:
            batch.ref_logps_S[0] += 1.0
        return batches

    monkeypatch.setattr(trainer.engine.reference, "attach", spoiled)
    for _ in range(2):
        with pytest.raises(FastprefError, match="policy and reference start equal, so the first loss must be"):
            trainer.train()
        assert all(torch.equal(a, b) for a, b in zip(before, trainer.model[0].parameters(), strict=True))
    monkeypatch.undo()
    assert trainer.train().global_step == 2


def test_run_after_an_update_does_not_start_at_the_reference(quiet_args) -> None:
    trainer = DPOTrainer(stock_model(0), DPOConfig(), None, quiet_args(), train_dataset=PAIRS)
    trainer.train()
    again = trainer.train()  # goes on with the weights as they are, and with a new optimizer
    assert again.global_step == 2
    assert trainer.log_history[2]["loss"] != pytest.approx(0.6931472, abs=1e-4)


def test_refused_schedule_leaves_optimizer_and_schedule_alone(quiet_args) -> None:
    trainer = DPOTrainer(stock_model(0), DPOConfig(), None, quiet_args(warmup_steps=3), train_dataset=PAIRS)
    for _ in range(2):
        with pytest.raises(ConfigError, match="warm-up takes 3 of 2 steps"):
            trainer.lr_scheduler  # noqa: B018  (a property that makes both)
    trainer.create_optimizer_and_scheduler(10)
    made = trainer.optimizer, trainer.lr_scheduler, trainer.model[0].config.grad_scale_func
    with pytest.raises(ConfigError, match="warm-up takes 3 of 3 steps"):
        trainer.create_optimizer_and_scheduler(3)
    assert made == (trainer.optimizer, trainer.lr_scheduler, trainer.model[0].config.grad_scale_func)


def test_passes_without_gradients_put_modes_back(quiet_args) -> None:
    trainer = DPOTrainer(stock_model(0), DPOConfig(), None, quiet_args(), train_dataset=PAIRS, eval_dataset=PAIRS)
    trainer.model[0].decoder.layers[0].eval()
    before = [module.training for module in trainer.models_wrapped[0].modules()]
    assert len(set(before)) == 2
    trainer.evaluate()
    batch = PreferenceCollator(0)(PAIRS[:2])
    with pytest.raises(ConfigError, match="packed batch needs"):
        trainer.evaluate(_Packed())
    trainer.compute_reference_log_probs(trainer.models_wrapped, [batch], batch["input_ids"].size(1), 2)
    assert before == [module.training for module in trainer.models_wrapped[0].modules()]


class _Packed:
    """Pairs that the trainer's collator turns into a batch that its model cannot take."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> object:
        raise ConfigError("a packed batch needs")


def test_refused_trainer_leaves_the_model_as_it_was(quiet_args) -> None:
    models = stock_model(0)
    collate = PackedCollator(PreferenceCollator(0), prefix_sharing=True)
    with pytest.raises(ConfigError, match="packing is False, but data_collator"):
        DPOTrainer(models, DPOConfig(), None, quiet_args(), train_dataset=PAIRS, data_collator=collate)
    assert type(models[0].output_layer) is ColumnParallelLinear
    assert not hasattr(next(models[0].parameters()), "main_grad")


def test_install_heads_changes_no_chunk_or_all(one_rank) -> None:
    first, second = stock_model(0)[0], stock_model(0)[0]
    second.config.mtp_num_layers = 1
    with pytest.raises(ConfigError, match="mtp_num_layers"):
        install_heads([first, second], HeadOptions())
    assert type(first.output_layer) is ColumnParallelLinear


def test_install_packing_changes_no_layer_or_all(one_rank) -> None:
    chunk = stock_model(0)[0]
    chunk.decoder.layers[1].self_attention.core_attention = torch.nn.Identity()
    with pytest.raises(ConfigError, match="got Identity; set packing: false"):
        install_packing([chunk], prefix_sharing=True)
    assert isinstance(cores(chunk)[0], DotProductAttention)
    assert not hasattr(chunk.rotary_pos_emb, "row_positions_l")


def test_install_packing_again_with_prefix_sharing_leaves_the_engine(one_rank, monkeypatch) -> None:
    """Rows without prefixes may stay with Transformer Engine, here a stand-in; its kernels know no shared ones."""
    monkeypatch.setattr("fastpref.trainer.model.packing.TE_ATTENTION", (DotProductAttention,))
    chunk = stock_model(0)[0]
    chunk.config.params_dtype = torch.bfloat16  # which they are made for
    for _ in range(2):
        install_packing([chunk], prefix_sharing=False)
        assert all(isinstance(core, VarlenRows) for core in cores(chunk))
    install_packing([chunk], prefix_sharing=True)
    assert all(isinstance(core, SDPACoreAttention) for core in cores(chunk))


def test_cpu_platform_is_in_place_only_when_all_of_it_is(monkeypatch) -> None:
    """A second call after an error must not take half of it for the whole."""

    def broken() -> None:
        raise AttributeError("Megatron has no such name")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cpu_platform, "_replace_device_queries", lambda: None)
    with monkeypatch.context() as patch:
        patch.setattr(cpu_platform, "_replace_random_state", broken)
        for _ in range(2):
            with pytest.raises(AttributeError):
                cpu_platform.install_cpu_platform()
    assert cpu_platform.install_cpu_platform()
    assert torch.cuda.current_device is cpu_platform._current_device


def test_reporter_without_its_package_keeps_the_records_of_an_earlier_run(quiet_args, tmp_path, monkeypatch) -> None:
    def missing(directory: Path) -> None:
        raise MissingDependencyError('report_to "wandb" needs that package: pip install wandb')

    monkeypatch.setattr(reporting, "_WandbWriter", missing)
    args = quiet_args(output_dir=str(tmp_path), report_to=("wandb",))
    (tmp_path / reporting.METRICS_FILE).write_text('{"step": 1}\n')
    with pytest.raises(MissingDependencyError):
        reporting.RunReporter(args, 0, 2, 0)
    assert (tmp_path / reporting.METRICS_FILE).read_text() == '{"step": 1}\n'
