"""Tensors that are not what their shape says: refused with the remedy, or seen through."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._functional_collectives import all_gather_tensor
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

from fastpref import linear_logps

HIDDEN_SLH, WEIGHT_VH, BIAS_V = torch.randn(2, 3, 4), torch.randn(7, 4), torch.randn(7)
LABELS_SL = torch.tensor([[1, 2, -100], [-100, 0, 6]])
GIVEN = {"hidden": HIDDEN_SLH, "weight": WEIGHT_VH, "labels": LABELS_SL, "bias": BIAS_V}
BACKENDS = ("torch", "reference")


class Packed(Tensor):
    """As torchao's: a shape and a dtype outside, codes and scales inside."""

    @staticmethod
    def __new__(cls, codes: Tensor) -> "Packed":
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes: Tensor) -> None:
        self.codes = codes

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes)
        raise AssertionError(f"{func} reached the wrapper")


def quantized(tensor: Tensor) -> Tensor:
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


# argument, how it comes, error, what the message must say
KINDS = {
    "wrapped weight": ("weight", Packed, TypeError, r"got a Packed, .*dequantize\(\) of a quantised weight"),
    "wrapped parameter": ("weight", lambda t: torch.nn.Parameter(Packed(t)), TypeError, "got a Packed"),
    "wrapped hidden": ("hidden", Packed, TypeError, "hidden must be a plain tensor, got a Packed"),
    "wrapped bias": ("bias", Packed, TypeError, "bias must be a plain tensor, got a Packed"),
    "quantised weight": ("weight", quantized, TypeError, "torch.qint8 and torch.float32.*dequantize weight first"),
    "int8 weight": ("weight", lambda t: t.to(torch.int8), TypeError, "torch.int8 and .*dequantize weight first"),
    "fp8 weight": ("weight", lambda t: t.to(torch.float8_e5m2), TypeError, "float8_e5m2 and .*dequantize weight first"),
    "complex weight": (
        "weight",
        lambda t: t.to(torch.complex64),
        TypeError,
        "must have one dtype, got torch.complex64",
    ),
    "sparse weight": ("weight", Tensor.to_sparse, TypeError, r"got layout torch.sparse_coo; pass weight.to_dense\(\)"),
    "sparse rows": ("weight", Tensor.to_sparse_csr, TypeError, "got layout torch.sparse_csr"),
    "sparse hidden": ("hidden", Tensor.to_sparse, TypeError, "hidden must be a dense tensor"),
    "sparse labels": ("labels", Tensor.to_sparse, TypeError, "labels must be a dense tensor"),
    "mkldnn weight": ("weight", Tensor.to_mkldnn, TypeError, "got layout torch._mkldnn"),
    "nested hidden": ("hidden", lambda t: torch.nested.nested_tensor(list(t)), TypeError, r"nested one; .*offsets\(\)"),
    "jagged hidden": (
        "hidden",
        lambda t: torch.nested.nested_tensor(list(t), layout=torch.jagged),
        TypeError,
        r"hidden must be a plain tensor, got a nested one; pass its values\(\) flat, and its offsets\(\) as cu_seqlens",
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_linear_logps_refuses_a_kind_of_tensor(kind: str, backend: str) -> None:
    name, change, error, message = KINDS[kind]
    with pytest.raises(error, match=message):
        linear_logps(**GIVEN | {name: change(GIVEN[name])}, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_logps_on_meta(backend: str) -> None:
    """The op looks for labelled rows, which shapes do not tell."""
    with pytest.raises(ValueError, match=r"hidden is on the meta device, .*no numbers; move the model"):
        linear_logps(**{name: tensor.to("meta") for name, tensor in GIVEN.items()}, backend=backend)


class Plain(Tensor):
    """A subclass by name only, as `nn.Parameter` is."""


@pytest.mark.parametrize("wrap", [torch.nn.Parameter, torch.nn.Buffer, lambda t: t.as_subclass(Plain)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_logps_takes_subclasses_with_their_own_elements(wrap: type, backend: str) -> None:
    expected = linear_logps(**GIVEN, backend=backend).logps
    found = linear_logps(**GIVEN | {"weight": wrap(WEIGHT_VH.clone())}, backend=backend).logps
    assert torch.equal(found.as_subclass(Tensor), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_logps_of_fake_tensors(backend: str) -> None:
    """Shapes without numbers, where a tool asks for them."""
    rows = {"rows": torch.tensor([0, 1, 4]), "cu_rows": torch.tensor([0, 2, 3])}
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(tensor) for name, tensor in (GIVEN | rows).items()}
        result = linear_logps(**fake, backend=backend, stats=("token_logps",))
    assert result.logps.shape == (2,) and result.token_logps.shape == (3,) and result.logps.dtype == torch.float32


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("placement", [Shard(0), Replicate()], ids=["shard", "replicate"])
def test_linear_logps_refuses_a_dtensor(placement: object, backend: str) -> None:
    """Its local part was taken for all of the vocabulary."""
    weight = torch.nn.Parameter(distribute_tensor(WEIGHT_VH, init_device_mesh("cpu", (1,)), [placement]))
    with pytest.raises(TypeError, match=r"got a DTensor, .*full_tensor\(\) .*to_local\(\) .* with tp_group"):
        linear_logps(**GIVEN | {"weight": weight}, backend=backend)
    found = linear_logps(**GIVEN | {"weight": weight.full_tensor()}, backend=backend).logps
    assert torch.equal(found, linear_logps(**GIVEN, backend=backend).logps)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_logps_waits_for_a_collective(backend: str) -> None:
    hidden = all_gather_tensor(HIDDEN_SLH, 0, dist.group.WORLD)
    assert type(hidden) is not Tensor
    found = linear_logps(**GIVEN | {"hidden": hidden}, backend=backend).logps
    torch.testing.assert_close(found, linear_logps(**GIVEN, backend=backend).logps, rtol=0, atol=0)
