"""The contract of `linear_logps`, word by word, for every backend and every output."""

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from head_oracle import OUTPUTS, STATS, oracle, tiles
from torch import Tensor

from fastpref import SequenceLogps, linear_logps
from fastpref.kernels import native, torch_tiles
from fastpref.kernels.engine import ForwardRows
from fastpref.kernels.outputs import STATISTICS, fields_of
from fastpref.testing.adversarial import IGNORE, HeadInputs, ragged_inputs

ENGINES = ("native", "tiles", "reference")
DIFFERENTIABLE = ("logps", "nll", "token_logps")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def two_masks() -> HeadInputs:
    """Tokens with one label, the other, both or none; a sequence without any; a token of the first has both."""
    inputs = ragged_inputs(3, 5, 6, 29)
    inputs.labels_SL[:] = torch.tensor([[4, 7, IGNORE, 0, IGNORE], [IGNORE] * 5, [28, IGNORE, 2, 3, 5]])
    nll_labels_SL = torch.tensor([[4, IGNORE, 9, IGNORE, IGNORE], [IGNORE] * 5, [28, 11, IGNORE, 3, IGNORE]])
    return inputs._replace(nll_labels_SL=nll_labels_SL, bias_V=torch.linspace(-1.0, 1.0, 29))


INPUTS = two_masks()


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of the backend; "torch" with and without its native passes."""
    with tiles() if request.param == "tiles" else contextlib.nullcontext():
        yield "reference" if request.param == "reference" else "torch"


def score(inputs: HeadInputs, backend: str, **options: object) -> SequenceLogps:
    given = {"nll_labels": inputs.nll_labels_SL, "bias": inputs.bias_V, "stats": STATS} | options
    hidden, labels = given.pop("hidden", inputs.hidden_SLH), given.pop("labels", inputs.labels_SL)
    return linear_logps(hidden, given.pop("weight", inputs.weight_VH), labels, backend=backend, **given)


def same(found: SequenceLogps, expected: SequenceLogps, names: tuple[str, ...] = (*OUTPUTS, "counts")) -> None:
    for name in names:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_in_fp32_or_fp64(engine: str, dtype: torch.dtype) -> None:
    result = score(INPUTS.cast(dtype), engine)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert {getattr(result, name).dtype for name in OUTPUTS} == {wanted}
    integers = (result.counts, result.nll_counts, result.rows, result.cu_rows)
    assert {values.dtype for values in integers} == {torch.int64}
    expected = oracle(INPUTS.cast(dtype))
    for name in (*OUTPUTS, "counts", "nll_counts"):
        rtol = 1e-12 if dtype == torch.float64 else 2e-5 if dtype == torch.float32 or engine != "reference" else 5e-2
        found = getattr(result, name).double()
        torch.testing.assert_close(found, torch.tensor(expected[name], dtype=torch.float64), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("sequence", [0, 2])
@pytest.mark.parametrize("output", DIFFERENTIABLE)
def test_a_bad_label_spoils_its_token_and_sequence_only(engine: str, output: str, sequence: int) -> None:
    """NaN for the token and the sums over it, no gradient for it, bit for bit nothing else."""
    names, at = ("labels_SL", "nll_labels_SL"), (sequence, 3 if output != "nll" else 1 if sequence else 2)
    name = names[output == "nll"]
    labels = getattr(INPUTS, name).clone()
    labels[at] = 29
    spoiled = INPUTS._replace(**{name: labels})
    if sequence == 2 and output != "nll":  # its label is there twice
        spoiled.nll_labels_SL[at] = IGNORE
    clean = spoiled._replace(**{name: torch.where(labels == 29, IGNORE, labels)})
    leaves = [leaf.clone().requires_grad_() for leaf in (INPUTS.hidden_SLH, INPUTS.weight_VH, INPUTS.bias_V)]
    given = dict(zip(("hidden", "weight", "bias"), leaves, strict=True))
    found, expected = score(spoiled, engine, **given), score(clean, engine, **given)
    others = torch.arange(3) != sequence
    sums = getattr(found, "nll" if output == "nll" else "logps")
    assert sums.isnan().tolist() == [s == sequence for s in range(3)]
    for field in ("logps", "nll", "counts", "nll_counts", *STATISTICS):
        assert torch.equal(getattr(found, field)[others], getattr(expected, field)[others]), field
    is_bad_R = found.rows == sequence * 5 + at[1]
    assert torch.equal(found.token_logps.isnan(), is_bad_R if output != "nll" else torch.zeros_like(is_bad_R))
    assert found.hits[sequence] == expected.hits[sequence]
    gradients = torch.autograd.grad(getattr(found, output).sum(), leaves)
    wanted = torch.autograd.grad(getattr(expected, output).sum(), leaves)
    for gradient, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-6, atol=1e-6)


def test_labels_that_disagree(engine: str) -> None:
    """The token has two labels and no log-probability: NaN in both sums of its sequence."""
    nll_labels_SL = INPUTS.nll_labels_SL.clone()
    nll_labels_SL[0, 0] = 5
    hidden_SLH = INPUTS.hidden_SLH.clone().requires_grad_()
    result = score(INPUTS._replace(nll_labels_SL=nll_labels_SL), engine, hidden=hidden_SLH)
    assert result.logps.isnan().tolist() == result.nll.isnan().tolist() == [True, False, False]
    assert result.token_logps.isnan().tolist() == (result.rows == 0).tolist()
    assert torch.equal(result.counts, score(INPUTS, engine).counts)
    (gradient,) = torch.autograd.grad(result.token_logps.sum(), hidden_SLH)
    assert gradient.isfinite().all() and not gradient[0, 0].any() and gradient[0, 1].any()


def test_a_sequence_without_labels(engine: str) -> None:
    hidden_SLH = INPUTS.hidden_SLH.clone().requires_grad_()
    result = score(INPUTS, engine, hidden=hidden_SLH)
    assert all(getattr(result, name)[1] == 0 for name in ("logps", "nll", "counts", "nll_counts", *STATISTICS))
    for name in DIFFERENTIABLE:
        (gradient,) = torch.autograd.grad(getattr(result, name).sum(), hidden_SLH, retain_graph=True)
        assert not gradient[1].any() and gradient.any()


def test_which_outputs_are_differentiable(engine: str) -> None:
    result = score(INPUTS, engine, weight=INPUTS.weight_VH.clone().requires_grad_())
    assert all(getattr(result, name).requires_grad for name in DIFFERENTIABLE)
    assert not any(getattr(result, name).requires_grad for name in (*STATISTICS, "counts", "nll_counts"))


@pytest.mark.parametrize("name", STATISTICS)
def test_a_statistic_costs_no_other(name: str, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone it has the bits that it has among all; no engine is asked for a number that it is not made of."""
    everything, asked = score(INPUTS, engine), []
    for module in (native, torch_tiles):

        def seen(*given, real=module.forward_rows, **options) -> ForwardRows:
            asked.append(options["fields"])
            return real(*given, **options)

        monkeypatch.setattr(module, "forward_rows", seen)
    result = score(INPUTS, engine, stats=(name,))
    assert {other for other in STATS if getattr(result, other) is not None} == {name}
    assert asked == ([] if engine == "reference" else [fields_of((name,))])
    same(result, everything, ("logps", "nll", name))


def test_rows_in_any_order_and_twice(engine: str) -> None:
    """Each occurrence is a row; sums and gradients count it as often."""
    rows, cu_rows = torch.tensor([3, 0, 0, 14, 12, 10]), torch.tensor([0, 3, 3, 6])
    single = {
        name: score(INPUTS, engine, rows=rows[i : i + 1], cu_rows=torch.tensor([0, 1]))
        for i, name in enumerate("abcdef")
    }
    result = score(INPUTS, engine, rows=rows, cu_rows=cu_rows)
    assert torch.equal(result.rows, rows) and torch.equal(result.cu_rows, cu_rows)
    exact = {"rtol": 0, "atol": 0} if engine != "reference" else {}
    torch.testing.assert_close(result.token_logps, torch.cat([one.token_logps for one in single.values()]), **exact)
    for name in ("logps", "nll", "counts", "nll_counts", *STATISTICS):
        parts = [getattr(one, name) for one in single.values()]
        wanted = torch.stack([sum(parts[:3]), torch.zeros_like(parts[0]), sum(parts[3:])]).squeeze(1)
        torch.testing.assert_close(getattr(result, name), wanted.to(wanted.dtype))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_bounds_of_either_width(engine: str, dtype: torch.dtype) -> None:
    expected = score(INPUTS, engine)
    flat = {"hidden": INPUTS.hidden_SLH.flatten(0, 1), "labels": INPUTS.labels_SL.flatten()}
    flat |= {"nll_labels": INPUTS.nll_labels_SL.flatten()}
    same(score(INPUTS, engine, **flat, cu_seqlens=torch.tensor([0, 5, 10, 15], dtype=dtype)), expected)
    layout = {"rows": expected.rows, "cu_rows": expected.cu_rows.to(dtype)}
    same(score(INPUTS, engine, **flat, **layout), expected)
    same(score(INPUTS, engine, **layout), expected)


# the inputs with the same numbers and other strides
STRIDES: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "hidden sequence-major": ("hidden", lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)),
    "hidden feature-major": ("hidden", lambda t: t.permute(2, 0, 1).contiguous().permute(1, 2, 0)),
    "weight column-major": ("weight", lambda t: t.t().contiguous().t()),
    "weight with gaps": ("weight", lambda t: torch.cat([t, t], dim=1)[:, : t.shape[1]]),
    "bias with gaps": ("bias", lambda t: torch.stack([t, t], dim=1)[:, 0]),
    "labels transposed": ("labels", lambda t: t.t().contiguous().t()),
    "nll_labels transposed": ("nll_labels", lambda t: t.t().contiguous().t()),
}


@pytest.mark.parametrize("case", STRIDES)
def test_any_strides(engine: str, case: str) -> None:
    name, change = STRIDES[case]
    field = {"hidden": "hidden_SLH", "weight": "weight_VH", "bias": "bias_V"}.get(name, f"{name}_SL")
    expected, given = score(INPUTS, engine), change(getattr(INPUTS, field))
    assert torch.equal(given, getattr(INPUTS, field)) and given.stride() != getattr(INPUTS, field).stride()
    found = score(INPUTS, engine, **{name: given})
    for output in OUTPUTS:
        torch.testing.assert_close(getattr(found, output), getattr(expected, output), rtol=1e-6, atol=1e-6)


def test_stride_zero(engine: str) -> None:
    """One token seen many times, one row of the weight for every id."""
    hidden_SLH, weight_VH = INPUTS.hidden_SLH[:1, :1].expand(3, 5, 6), INPUTS.weight_VH[:1].expand(29, 6)
    given = {"hidden": hidden_SLH, "weight": weight_VH, "bias": INPUTS.bias_V[:1].expand(29)}
    found = score(INPUTS, engine, **given)
    same(found, score(INPUTS, engine, **{name: tensor.clone() for name, tensor in given.items()}))
    torch.testing.assert_close(found.logps, -found.counts * torch.tensor(29.0).log())


@pytest.mark.parametrize("changed", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("output", DIFFERENTIABLE)
def test_an_input_changed_in_place_before_backward(engine: str, output: str, changed: str) -> None:
    leaves = {"hidden": INPUTS.hidden_SLH.clone(), "weight": INPUTS.weight_VH.clone(), "bias": INPUTS.bias_V.clone()}
    for leaf in leaves.values():
        leaf.requires_grad_()
    scalar = getattr(score(INPUTS, engine, softcap=9.0, **leaves), output).sum()
    with torch.no_grad():
        leaves[changed].mul_(2.0)
    if engine == "reference" and changed != "weight":
        scalar.backward()  # it needs neither: the bias is a summand, of the rows it has copies
        return
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        scalar.backward()


@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_activity_where_a_gradient_can_be_asked_for(mode: Callable) -> None:
    """None without a gradient; of another plan it is refused."""
    given = {"backward": "active", "stats": ("active_fraction", "cold_mass"), "nll_labels": None}
    frozen = score(INPUTS, "torch", **given)
    assert frozen.active_fraction is frozen.cold_mass is None
    with mode():
        result = score(INPUTS, "torch", weight=torch.nn.Parameter(INPUTS.weight_VH), **given)
    assert (result.active_fraction is None) == (result.cold_mass is None) == (mode is not contextlib.nullcontext)
    if result.active_fraction is not None:
        assert result.active_fraction.dtype == result.cold_mass.dtype == torch.float64
        assert result.active_fraction.shape == () and not result.active_fraction.requires_grad


def test_debug_names_the_label(engine: str) -> None:
    for name in ("labels", "nll_labels"):
        labels = getattr(INPUTS, f"{name}_SL").clone()
        labels[2, 3] = 29
        with pytest.raises(IndexError, match=rf"{name}\[2, 3\] is 29; a label must be in \[0, 29\)"):
            score(INPUTS, engine, debug=True, **{name: labels})


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_second_run_gives_the_same_bits(engine: str, dtype: torch.dtype) -> None:
    inputs = INPUTS.cast(dtype)
    same(score(inputs, engine), score(inputs, engine))
    leaf = inputs.weight_VH.clone().requires_grad_()
    gradients = [torch.autograd.grad(score(inputs, engine, weight=leaf).logps.sum(), leaf)[0] for _ in range(2)]
    assert torch.equal(*gradients)


def test_no_tokens_at_all(engine: str) -> None:
    """Batches without sequences, sequences without tokens, shards of labels without rows."""
    for shape in ((0, 5), (3, 0), (0, 0)):
        hidden = torch.randn(*shape, 6).requires_grad_()
        empty = torch.zeros(shape, dtype=torch.int64)
        result = score(INPUTS, engine, hidden=hidden, labels=empty, nll_labels=empty)
        assert result.logps.tolist() == result.nll.tolist() == [0.0] * shape[0]
        (gradient,) = torch.autograd.grad(result.logps.sum() + result.nll.sum(), hidden)
        assert gradient.shape == hidden.shape
