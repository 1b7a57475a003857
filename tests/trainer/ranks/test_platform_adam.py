"""The Adam of machines without Transformer Engine: torch's numbers in FusedAdam's layout."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from megatron.core import optimizer as optimizer_module
from megatron.core.optimizer import distrib_optimizer

from fastpref.trainer.ranks import platform, transformer_engine
from fastpref.trainer.ranks.adam import FusedLayoutAdam, install_fused_layout

needs_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is emulated")
# Megatron without Transformer Engine and Apex, as it imports itself.
STAND_INS = {
    optimizer_module: {"Adam": torch.optim.AdamW, "USING_PYTORCH_OPTIMIZER": True},
    distrib_optimizer: {"Adam": torch.optim.Adam, "HAVE_APEX_OR_TE": False, "USING_TE_OPTIMIZER": False},
}
SETTINGS = {"lr": 3e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 5), (7,), (2, 2))]


def step(optimizer: torch.optim.Optimizer, number: int) -> None:
    """Step on gradients that depend on the step; the last parameter sits out every other step."""
    generator = torch.Generator().manual_seed(number)
    all_parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, parameter in enumerate(all_parameters):
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = None if index == len(all_parameters) - 1 and number % 2 else gradient
    optimizer.step()


@pytest.mark.parametrize(("adam_w_mode", "theirs"), [(True, torch.optim.AdamW), (False, torch.optim.Adam)])
def test_step_equals_torch_bit_for_bit(adam_w_mode: bool, theirs: type) -> None:
    ours, expected = parameters(), parameters()
    groups = [{"params": ours[:1], "lr": 0.1}, {"params": ours[1:2], "weight_decay": 0.0}]
    expected_groups = [{"params": expected[:1], "lr": 0.1}, {"params": expected[1:2], "weight_decay": 0.0}]
    optimizer, reference = (
        FusedLayoutAdam(groups, **SETTINGS, adam_w_mode=adam_w_mode),
        theirs(expected_groups, **SETTINGS, fused=True),
    )
    for number in range(6):
        for one in (optimizer, reference):
            one.param_groups[0]["lr"] = 0.1 / (number + 1)
            for group in one.param_groups:
                for index, parameter in enumerate(group["params"]):
                    generator = torch.Generator().manual_seed(10 * number + index)
                    parameter.grad = torch.randn(parameter.shape, generator=generator)
            one.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    for a, b in zip(ours[:2], expected[:2], strict=True):
        assert torch.equal(optimizer.state[a]["exp_avg"], reference.state[b]["exp_avg"])
        assert torch.equal(optimizer.state[a]["exp_avg_sq"], reference.state[b]["exp_avg_sq"])


def test_state_has_the_layout_of_fused_adam() -> None:
    ours = parameters()
    optimizer = FusedLayoutAdam([{"params": ours[:2]}, {"params": []}], **SETTINGS)
    for number in range(3):
        step(optimizer, number)
    assert [group.get("step") for group in optimizer.param_groups] == [3, None]
    assert set(optimizer.state[ours[0]]) == {"exp_avg", "exp_avg_sq"}


def test_state_dict_resumes_bit_for_bit() -> None:
    ours = parameters()
    optimizer = FusedLayoutAdam(ours, **SETTINGS)
    for number in range(3):
        step(optimizer, number)
    saved, weights = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in ours]
    again = [torch.nn.Parameter(weight) for weight in weights]
    resumed = FusedLayoutAdam(again, lr=1.0)
    resumed.load_state_dict(saved)
    for number in range(3, 6):
        step(optimizer, number)
        step(resumed, number)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


def test_step_calls_the_closure_with_gradients() -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = FusedLayoutAdam([parameter], lr=0.5)

    def closure() -> float:
        optimizer.zero_grad()
        loss = (parameter**2).sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 1.0
    assert parameter.item() == pytest.approx(0.5)


@pytest.mark.parametrize(
    "setting",
    [
        {"lr": -1.0},
        {"eps": -1.0},
        {"weight_decay": -0.1},
        {"lr": float("nan")},
        {"betas": (0.9, 1.0)},
        {"capturable": True},
    ],
)
def test_constructor_refuses_settings_out_of_range(setting: dict) -> None:
    with pytest.raises(ValueError, match="must"):
        FusedLayoutAdam(parameters(), **setting)


GPU_PROBE = """
import json, torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from fastpref.trainer.ranks.adam import FusedLayoutAdam

class Devices(TorchDispatchMode):
    seen = []
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "_fused_adam" in str(function):
            tensors = [tensor for items in args if isinstance(items, list) for tensor in items]
            self.seen.append([str(function), sorted({str(tensor.device) for tensor in tensors}), len(args[5])])
            return None
        if "_foreach_add_" in str(function):
            self.seen.append(["steps", sorted({str(tensor.device) for tensor in args[0]}), len(args[0])])
        return function(*args, **(kwargs or {}))

with FakeTensorMode():
    parameters = [torch.nn.Parameter(torch.empty(3, device="cuda")) for _ in range(2)]
    optimizer = FusedLayoutAdam(parameters, lr=0.1)
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    with Devices():
        optimizer.step()
print(json.dumps(Devices.seen))
"""


@needs_cpu
def test_kernel_of_a_gpu_gets_its_steps_on_the_gpu() -> None:
    """Shown on tensors without memory: `torch._fused_adamw_` on CUDA reads step counts where the parameters are."""
    result = subprocess.run([sys.executable, "-c", GPU_PROBE], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert json.loads(result.stdout.splitlines()[-1]) == [
        ["steps", ["cuda:0"], 2],
        ["aten._fused_adamw_.default", ["cuda:0"], 2],
    ]


def test_steps_do_not_share_memory() -> None:
    """The kernel adds one to each of them."""
    ours, expected = parameters(), parameters()
    for optimizer in (FusedLayoutAdam(ours, **SETTINGS), torch.optim.AdamW(expected, **SETTINGS, fused=True)):
        for number in range(0, 8, 2):
            step(optimizer, number)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@needs_cpu
@pytest.mark.skipif(transformer_engine.computes_here(), reason="Transformer Engine brings an Adam of its own")
def test_machines_with_a_gpu_and_no_adam_of_megatrons_get_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its distributed optimizer cannot read back what PyTorch's AdamW writes; nothing else of the GPU is emulated."""
    for module, names in STAND_INS.items():
        for name, value in names.items():
            monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    platform.initialize_distributed()
    assert optimizer_module.Adam is distrib_optimizer.Adam is FusedLayoutAdam
    assert not optimizer_module.USING_PYTORCH_OPTIMIZER
    assert distrib_optimizer.HAVE_APEX_OR_TE and distrib_optimizer.USING_TE_OPTIMIZER


def test_an_adam_of_megatrons_own_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = type("FusedAdam", (), {})
    monkeypatch.setattr(optimizer_module, "USING_PYTORCH_OPTIMIZER", False)
    monkeypatch.setattr(optimizer_module, "Adam", theirs)
    install_fused_layout()
    assert optimizer_module.Adam is theirs
