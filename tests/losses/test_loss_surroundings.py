"""Every loss under what may surround a call: transforms, compilation, autocast, defaults, layouts, fake tensors."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
from loss_pairs import NAMES, WEIGHTS, B, batch, config_of
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fastpref.losses import (
    LOSSES,
    DPOConfig,
    LossContext,
    PairLogps,
    SequenceStats,
    expected_initial_loss,
    ld_logps,
    log_odds,
    preference_loss,
    preference_metrics,
    update_running_mean,
    weighted_sum,
)
from fastpref.losses.numerics import divergence_score

WITH_FILLER = WEIGHTS * torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0])


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


SURROUNDINGS = {
    "float64 default": lambda: default_dtype(torch.float64),
    "bfloat16 default": lambda: default_dtype(torch.bfloat16),
    "meta default": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


def results(config: DPOConfig, columns: dict[str, Tensor], weights: Tensor) -> dict[str, Tensor]:
    """All that a step reads: losses, their weighted sum, rewards and metrics."""
    refs = {name: columns[name] for name in NAMES[2:4]} if config.use_ref_model else {}
    logps = PairLogps(**{name: columns[name] for name in (*NAMES[:2], *NAMES[4:])}, **refs)
    output = preference_loss(config, logps, LossContext(pair_weights=weights, bco_delta=0.25))
    stats = SequenceStats(entropy=torch.cat([columns[name].detach() for name in NAMES[:2]]))
    metrics = preference_metrics(config, logps, output, weights, stats)
    found = {"sum": weighted_sum(output.losses, weights), "losses": output.losses, "reward": output.chosen_rewards}
    return found | {f"{name} {place}": part for name, pair in metrics.items() for place, part in enumerate(pair)}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == value.dtype, name
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("where", SURROUNDINGS)
@pytest.mark.parametrize("name", LOSSES)
def test_global_state_changes_no_result(name: str, where: str, dtype: torch.dtype) -> None:
    config, columns = config_of(name), batch(dtype)
    want, initial = results(config, columns, WITH_FILLER), expected_initial_loss(config)
    with SURROUNDINGS[where]():
        assert_same(results(config, columns, WITH_FILLER), want)
        assert expected_initial_loss(config) == initial
    in_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    assert want["losses"].dtype == want["reward"].dtype == in_dtype
    assert not want["reward"].requires_grad


@pytest.mark.parametrize("name", LOSSES)
def test_layout_changes_no_result(name: str) -> None:
    config, columns = config_of(name), batch()
    strided = {field: torch.stack([value, value], dim=1)[:, 1] for field, value in columns.items()}
    assert_same(results(config, strided, WITH_FILLER), results(config, columns, WITH_FILLER))
    expanded = {field: value[:1].expand(3) for field, value in columns.items()}
    repeated = {field: value[:1].repeat(3) for field, value in columns.items()}
    assert_same(results(config, expanded, torch.ones(3)), results(config, repeated, torch.ones(3)))


@pytest.mark.parametrize("num_pairs", [0, 1, B])
@pytest.mark.parametrize("name", LOSSES)
def test_meta_and_fake_tensors_give_shapes_and_dtypes(name: str, num_pairs: int) -> None:
    config, columns = config_of(name), {field: value[:num_pairs] for field, value in batch(torch.float16).items()}
    weights = WEIGHTS[:num_pairs]
    want = results(config, columns, weights)
    for mode, convert in ((nullcontext(), lambda value: value.to("meta")), (FakeTensorMode(), None)):
        with mode as fake:
            turn = convert or fake.from_tensor
            got = results(config, {field: turn(value) for field, value in columns.items()}, turn(weights))
        assert {k: (v.shape, v.dtype) for k, v in got.items()} == {k: (v.shape, v.dtype) for k, v in want.items()}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", LOSSES)
def test_transforms_agree_with_autograd(name: str) -> None:
    config, columns = config_of(name), batch()
    rest = {field: columns[field] for field in (NAMES[2:] if config.use_ref_model else NAMES[4:])}
    context = LossContext(pair_weights=WITH_FILLER)

    def losses(sums: Tensor) -> Tensor:
        return preference_loss(config, PairLogps(chosen=sums[0], rejected=sums[1], **rest), context).losses

    def total(sums: Tensor) -> Tensor:
        return weighted_sum(losses(sums), WITH_FILLER)

    sums = torch.stack([columns[field] for field in NAMES[:2]])
    leaf = sums.clone().requires_grad_()
    (slope,) = torch.autograd.grad(total(leaf), leaf, create_graph=True)
    torch.testing.assert_close(torch.func.grad(total)(sums), slope)
    jacobian = torch.autograd.functional.jacobian(losses, sums)
    torch.testing.assert_close(torch.func.jacrev(losses)(sums), jacobian)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(total))(torch.stack([sums, 2 * sums]))[0], slope)
    curved = torch.func.jacrev(torch.func.jacrev(total))(sums)
    if slope.requires_grad:
        torch.testing.assert_close(torch.autograd.functional.jacobian(torch.func.grad(total), sums), curved)
    assert not curved[:, 2].any(), "a pair of weight 0 has no second derivative"
    if name == "aot_unpaired":
        for forward_mode in (torch.func.jacfwd, torch.func.hessian):
            with pytest.raises(NotImplementedError, match=r"no forward-mode derivative .* use reverse mode"):
                forward_mode(total)(sums)
    else:
        torch.testing.assert_close(torch.func.jacfwd(losses)(sums), jacobian)
        torch.testing.assert_close(torch.func.hessian(total)(sums), curved)


# the whole family compiles as well; it takes a minute
@pytest.mark.parametrize(("pref_loss", "backend"), [("aot_unpaired", "eager"), ("orpo", "aot_eager")])
def test_one_compiled_function_takes_any_number_of_pairs_and_any_beta(pref_loss: str, backend: str) -> None:
    config = DPOConfig(pref_loss=pref_loss, label_smoothing=0.0 if pref_loss == "orpo" else 0.1)
    torch._dynamo.reset()
    columns = {field: value for field, value in batch().items() if config.use_ref_model or "ref" not in field}

    def total(config: DPOConfig, columns: dict[str, Tensor], weights: Tensor) -> Tensor:
        context = LossContext(pair_weights=weights, bco_delta=0.25)
        return weighted_sum(preference_loss(config, PairLogps(**columns), context).losses, weights)

    compiled = torch.compile(total, fullgraph=True, backend=backend, dynamic=True)
    for num_pairs, beta in ((B, 0.1), (3, 0.3), (0, 0.3)):
        part, weights = {field: value[:num_pairs].clone() for field, value in columns.items()}, WEIGHTS[:num_pairs]
        sides = [part[field].requires_grad_() for field in NAMES[:2]]
        got, want = (run(replace(config, beta=beta), part, weights) for run in (compiled, total))
        torch.testing.assert_close(got, want)
        for ours, theirs in zip(torch.autograd.grad(got, sides), torch.autograd.grad(want, sides), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_public_helpers_compute_16_bit_values_in_float32(dtype: torch.dtype) -> None:
    values, others = torch.tensor([-0.0, -3.25, -90.5], dtype=dtype), torch.tensor([-1.5, -2.0, -7.0], dtype=dtype)
    wide, wide_others = values.float(), others.float()
    for got, want in (
        (log_odds(values), log_odds(wide)),
        (ld_logps(values, others, 0.3), ld_logps(wide, wide_others, 0.3)),
        (weighted_sum(values, others.abs()), weighted_sum(wide, wide_others.abs())),
        *((divergence_score(values, kind, 0.3), divergence_score(wide, kind, 0.3)) for kind in ("js", "alpha", None)),
    ):
        assert got.dtype == torch.float32
        assert torch.isfinite(got).all()
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", LOSSES)
def test_counts_receive_no_gradient_and_those_of_filler_reach_nothing(name: str) -> None:
    config, columns = config_of(name), batch()
    want = results(config, columns, WITH_FILLER)["losses"]
    for field in NAMES[4:]:
        columns[field] = columns[field].double()
        columns[field][2] = float("nan")
        columns[field].requires_grad_()
    columns["chosen"].requires_grad_()
    losses = results(config, columns, WITH_FILLER)["losses"]
    assert torch.equal(losses, want)
    losses.sum().backward()
    assert all(columns[field].grad is None for field in NAMES[4:])
    assert columns["chosen"].grad.isfinite().all()


def test_running_mean_does_not_move_by_values_without_weight() -> None:
    assert update_running_mean(0.5, 4.0, float("nan"), 0.0) == (0.5, 4.0)
