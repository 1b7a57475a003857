"""`TrainingArguments`: every value that cannot work is refused at construction, all at once."""

import pytest

from fastpref.errors import ConfigError
from fastpref.trainer import TrainingArguments


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be a whole number >= 1, got 0"),
        ({"gradient_accumulation_steps": 1.5}, "must be a whole number >= 1, got 1.5"),
        ({"learning_rate": -1.0}, r"learning_rate must be in \[0, 10\]"),
        ({"learning_rate": float("nan")}, r"learning_rate must be in \[0, 10\], got nan"),
        ({"learning_rate": "1e-5"}, r"learning_rate must be a number in \[0, 10\], got '1e-5'"),
        ({"max_steps": True}, "max_steps must be a whole number >= 1, got True"),
        ({"adam_beta2": 1.0}, r"adam_beta2 must be in \[0, 1\)"),
        ({"adam_epsilon": 0.0}, "adam_epsilon must be a finite number > 0"),
        ({"min_lr": 1.0}, "min_lr .* must not exceed learning_rate"),
        ({"lr_scheduler_type": "cosin"}, "must be one of constant, linear, cosine"),
        ({"bf16": True, "fp16": True}, "bf16 and fp16 exclude each other"),
        ({"warmup_steps": 3, "warmup_ratio": 0.1}, "exclude each other"),
        ({"sequence_parallel": True}, "tensor_model_parallel_size >= 2"),
        (
            {"virtual_pipeline_model_parallel_size": 1},
            "must be a whole number >= 2, got 1; leave it out for one chunk per stage",
        ),
        ({"virtual_pipeline_model_parallel_size": 2}, "needs pipeline_model_parallel_size >= 2, got 1"),
        (
            {
                "pipeline_model_parallel_size": 4,
                "virtual_pipeline_model_parallel_size": 2,
                "gradient_accumulation_steps": 6,
            },
            "gradient_accumulation_steps must be a multiple of pipeline_model_parallel_size 4 .*valid: 4 or 8",
        ),
        ({"pipeline_balance": "odd"}, "pipeline_balance must be one of even, head_cost; got 'odd'"),
        ({"pipeline_balance": "head_cost"}, "head_cost needs pipeline_model_parallel_size >= 2, got 1"),
        ({"overlap_param_gather": True}, "needs use_distributed_optimizer and overlap_grad_reduce"),
        ({"save_total_limit": 1}, "save_total_limit must be a whole number >= 2, got 1; one good checkpoint"),
        ({"async_save": True}, "async_save is used by saves between steps only, got save_steps None"),
        (
            {"report_to": ("tensorbord",)},
            "must name only tensorboard, wandb; got 'tensorbord'; did you mean tensorboard",
        ),
        ({"report_to": "wandb"}, r"report_to must be a list of names, got 'wandb'; write \['wandb'\]$"),
        (
            {"resume_allow_changes": "loss"},
            r"resume_allow_changes must be a list of names, got 'loss'; write \['loss'\]$",
        ),
        ({"shuffle": "no"}, "shuffle must be true or false, got 'no'"),
        ({"output_dir": None}, "output_dir must be a string, got None"),
        (
            {"head_backward": "actve"},
            "one of auto, active, exact, recompute, cached; got 'actve'; did you mean active?",
        ),
        ({"active_eps": 1e-3}, "active_eps .* active backward pass only, got head_backward 'auto'; set head_backward"),
        ({"active_eps": 1.0, "bf16": True}, r"active_eps must be in \(0, 1\), got 1.0"),
        (
            {"head_forward": "screen"},
            "head_forward must be one of exact, screened; got 'screen'; did you mean screened?",
        ),
        (
            {"head_forward": "screened", "head_backward": "exact", "active_eps": 1e-3},
            r"TrainingArguments: head_forward screened has .* got head_backward 'exact', which .* set head_backward to "
            "active or auto, or head_forward to exact$",
        ),
        ({"recompute_granularity": "half"}, "recompute_granularity must be one of full, selective; got 'half'"),
    ],
)
def test_arguments_refuse(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainingArguments(**change)


@pytest.mark.parametrize("head_backward", ["auto", "active"])
def test_screened_head_has_a_tolerance(head_backward: str) -> None:
    screened = {"head_forward": "screened", "head_backward": head_backward}
    assert TrainingArguments(**screened).screened_eps == 2**-8
    assert TrainingArguments(**screened, active_eps=1e-3).screened_eps == 1e-3
    assert TrainingArguments(head_backward="active", active_eps=1e-3).screened_eps == 0.0


def test_arguments_list_all_problems_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        TrainingArguments(learning_rate=-1.0, max_steps=0, save_total_limit=0)
    assert all(name in str(caught.value) for name in ("learning_rate", "max_steps", "save_total_limit"))


@pytest.mark.parametrize(("ratio", "total", "steps"), [(0.1, 100, 10), (0.1, 15, 2), (0.0, 9, 0)])
def test_warmup_steps_of_rounds_up(ratio: float, total: int, steps: int) -> None:
    assert TrainingArguments(warmup_ratio=ratio).warmup_steps_of(total) == steps
