"""The CPU's Adam: torch's numbers in FusedAdam's layout."""

import copy

import pytest
import torch

from fastpref.trainer.ranks.cpu_adam import FusedLayoutAdam

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
