"""Every peer is called as its library wants it, gives the right result, and is caught where it falls back."""

import inspect
import os
import warnings
from dataclasses import replace

import peer_fakes
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import oracle, peer_calls, workloads
from bench.implementations import IMPLEMENTATIONS, names_on
from bench.peers import PEERS
from bench.registry import Implementation, WrongPathError, call, require_path

CPU = torch.device("cpu")
FAKED = (*("liger-ce-scaled", "liger-ce-tp", "liger-ce", "liger-ce-sm90", "quack", "cce-kernel", "megatron-linear"),)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    peer_fakes.install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setenv("LIGER_SCALED_CE_SM90_VALIDATE_TARGETS", "1")
    peer_calls._configure_liger_tp.cache_clear()
    peer_fakes.configured.clear()
    return monkeypatch


def case() -> workloads.Case:
    return workloads.build("dry")


def assert_right(implementation: Implementation) -> None:
    """Log-probs and both gradients are those of the closed form in fp64, under the loss of the entry."""
    head = replace(case(), tp_group=object())  # type: ignore[arg-type]
    result = call(implementation, head, head.hidden_SLH, head.weight_VH)
    found = oracle.errors(result, oracle.solve(head, implementation.loss))
    assert max(error["relative_l2"] for error in found.values()) < 1e-5, found


@pytest.mark.parametrize("name", FAKED)
def test_call_gives_the_right_result_over_a_stand_in(fakes, name: str) -> None:
    implementation = IMPLEMENTATIONS[name]
    if name == "cce-kernel":
        fakes.setattr(Tensor, "is_cuda", True)
    assert_right(implementation)


def test_scaled_cross_entropy_of_liger_does_not_wait_for_its_targets(fakes) -> None:
    assert_right(IMPLEMENTATIONS["liger-ce-scaled"])
    assert os.environ["LIGER_SCALED_CE_SM90_VALIDATE_TARGETS"] == "0"


def test_tensor_parallel_form_of_liger_is_configured_once_for_its_sizes(fakes) -> None:
    head = replace(case(), tp_group=object())  # type: ignore[arg-type]
    for _ in range(2):
        call(IMPLEMENTATIONS["liger-ce-tp"], head, head.hidden_SLH, head.weight_VH)
    (given,) = peer_fakes.configured
    assert given.sizes == (96, 64, 512) and given.group == "tensor"
    fakes.setitem(peer_fakes.FAKES[peer_fakes.CONFIGURE], "configure", lambda **_: False)
    peer_fakes.install(fakes)
    peer_calls._configure_liger_tp.cache_clear()
    with pytest.raises(RuntimeError, match="did not set itself up"):
        call(IMPLEMENTATIONS["liger-ce-tp"], head, head.hidden_SLH, head.weight_VH)


def test_liger_that_falls_back_is_caught(fakes) -> None:
    fakes.setattr(peer_fakes.ScaledFunction, "is_hopper", False)
    with pytest.raises(WrongPathError, match=r"SM90Function did not run; .*_FusedLinearPPOFallbackFunction"):
        assert_right(IMPLEMENTATIONS["liger-ce-scaled"])


def test_mean_loss_by_another_function_is_caught(fakes) -> None:
    with pytest.raises(WrongPathError, match=r"other did not run; .*LigerFusedLinearCrossEntropyFunction"):
        assert_right(replace(IMPLEMENTATIONS["liger-ce"], path=("other",), run=None))


def test_the_real_liger_falls_back_on_a_cpu_and_is_caught() -> None:
    pytest.importorskip("liger_kernel")
    entry = IMPLEMENTATIONS["liger-ce-scaled"]
    with pytest.raises(WrongPathError, match="_FusedLinearPPOFallbackFunction"):
        assert_right(entry)
    assert_right(replace(entry, path=(), run=None))


def test_quack_asks_for_its_hopper_pipeline_on_hopper_alone(fakes) -> None:
    asked = []
    chunked = peer_fakes.quack_chunked

    def spy(*tensors, **options):
        asked.append(options["use_scaled_exp"])
        return chunked(*tensors, **options)

    fakes.setitem(peer_fakes.FAKES[peer_fakes.QUACK], "chunked_linear_cross_entropy", spy)
    peer_fakes.install(fakes)
    assert_right(IMPLEMENTATIONS["quack"])
    fakes.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 0))
    assert_right(IMPLEMENTATIONS["quack"])
    assert asked == [True, None]


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="torch before 2.13")
class TestTorch:
    def test_is_right_under_dpo_and_warns_of_nothing(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert_right(IMPLEMENTATIONS["torch-lce"])

    def test_runs_in_chunks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(peer_calls.TORCH_CHUNK_ROWS, "cpu", 7)  # 96 rows are 14 chunks, the last of 5 rows
        assert_right(IMPLEMENTATIONS["torch-lce"])

    def test_all_logits_instead_of_chunks_are_caught(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = F.linear_cross_entropy
        monkeypatch.setattr(F, "linear_cross_entropy", lambda *t, options, **rest: real(*t, **rest))
        with pytest.raises(WrongPathError, match=r"behind its output are .*NllLossBackward"):
            assert_right(IMPLEMENTATIONS["torch-lce"])

    def test_options_that_it_ignores_are_caught(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = F.linear_cross_entropy
        monkeypatch.setattr(F, "linear_cross_entropy", lambda *t, **rest: real(*t, label_smoothing=1e-30, **rest))
        with pytest.warns(UserWarning, match="options"), pytest.raises(WrongPathError):
            assert_right(IMPLEMENTATIONS["torch-lce"])


def test_trl_takes_its_chunks() -> None:
    pytest.importorskip("trl")
    assert_right(IMPLEMENTATIONS["trl"])
    with pytest.raises(WrongPathError, match=r"another did not run; .*ChunkedLogProbFunction"):
        assert_right(replace(IMPLEMENTATIONS["trl"], path=("another",), run=None))


def test_require_path_finds_a_function_behind_others() -> None:
    x = torch.ones(3, 4, requires_grad=True)
    output = peer_fakes.per_row("package.module", "Fast")(
        x, torch.ones(5, 4, requires_grad=True), torch.zeros(3).long()
    )
    require_path((2 * output).sum(), ("package.module.Fast",))
    require_path((2 * output).sum(), ("SumBackward0",))
    require_path(output.detach(), ("package.module.Slow",))
    with pytest.raises(WrongPathError, match=r"package\.module\.Slow did not run; .*package\.module\.Fast"):
        require_path((2 * output).sum(), ("package.module.Slow",))


def test_unavailable_says_what_is_missing_or_which_device_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Implementation(
        title="peer", logps=lambda *_: torch.ones(1), modules=("torch", "no_such.part"), install="how"
    )
    assert entry.unavailable(CPU) == "no_such.part not installed: how"
    entry = replace(entry, modules=("torch",), capabilities=(9, 10))
    assert entry.unavailable(CPU) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
    wanted = "made for compute capability 9.x or 10.x; this device has 8.6"
    assert entry.unavailable(torch.device("cuda")) == wanted


def test_every_peer_of_a_gpu_is_there_under_its_name() -> None:
    assert {"liger-ce-scaled", "liger-ce-tp", "quack", "torch-lce", "cce-kernel", "megatron-fused", "trl"} <= set(
        names_on("cuda")
    )
    assert {"torch-lce", "cce", "trl", "liger"} <= set(names_on("cpu"))


@pytest.mark.parametrize(("module", "name"), peer_fakes.SIGNATURES, ids=str)
def test_stand_in_has_the_parameters_of_the_library(module: str, name: str) -> None:
    source = peer_fakes.source_of(module)
    if source is None:
        pytest.skip(f"{module} is not installed")
    real = peer_fakes.defined(source, name)
    assert real is not None, f"{module} has no {name}"
    fake = [each for each in inspect.signature(peer_fakes.SIGNATURES[module, name]).parameters if each != "self"]
    assert fake == peer_fakes.parameters(real)


@pytest.mark.parametrize("path", [path for peer in PEERS.values() for path in peer.path if "." in path])
def test_function_that_a_pass_is_known_by_is_in_the_library(path: str) -> None:
    module, name = path.rsplit(".", 1)
    source = peer_fakes.source_of(module)
    if source is None:
        pytest.skip(f"{module} is not installed")
    real = peer_fakes.defined(source, name)
    assert real is not None and "Function" in ast_bases(real)


def ast_bases(node: object) -> str:
    return " ".join(peer_fakes.ast.unparse(base) for base in node.bases)  # type: ignore[attr-defined]
