"""Output layers that spell their product in other ways than `linear(hidden, weight, bias)`, beside their logits.

A layer that was known by one spelling of its product alone failed under PEFT's trainable tokens and under ZeRO-3.
"""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers", reason="the models are Hugging Face's (extra hf)")

from peft import LoraConfig, TrainableTokensConfig, get_peft_model
from test_causal_lm import FIELDS, batch, expected_fields
from torch import Tensor
from torch.nn.functional import linear as linear_of_its_own_name
from trl_runs import tiny_llama, tiny_model

from fastpref.errors import ConfigError
from fastpref.integrations.causal_lm import add_logps_head
from fastpref.integrations.products import own_linear


class Spelled(torch.nn.Linear):
    """A linear layer whose forward is given."""

    def __init__(self, spelling: Callable[[Tensor, Tensor, Tensor], Tensor], old: torch.nn.Linear) -> None:
        super().__init__(old.in_features, old.out_features)
        self.spelling = spelling
        torch.nn.init.normal_(self.weight, std=0.5, generator=torch.Generator().manual_seed(0))
        torch.nn.init.normal_(self.bias, std=0.5, generator=torch.Generator().manual_seed(1))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.spelling(hidden, self.weight, self.bias)


SPELLINGS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "by position": lambda x, w, b: F.linear(x, w, b),
    "by keyword": lambda x, w, b: F.linear(input=x, weight=w, bias=b),
    "by keyword in another order": lambda x, w, b: F.linear(bias=b, weight=w, input=x),
    "by an imported name": lambda x, w, b: linear_of_its_own_name(x, w),
    "the C function": lambda x, w, b: torch._C._nn.linear(x, weight=w, bias=b),
    "@": lambda x, w, b: x @ w.T,
    "matmul": lambda x, w, b: torch.matmul(x, w.t()),
    "matmul by keyword": lambda x, w, b: torch.matmul(input=x, other=w.t()),
    "Tensor.matmul": lambda x, w, b: x.matmul(w.transpose(0, 1)),
    "__matmul__": lambda x, w, b: x.__matmul__(w.mT),
    "mm of flat rows": lambda x, w, b: torch.mm(x.flatten(0, 1), w.t()).view(*x.shape[:2], -1),
    "addmm of flat rows": lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w.t()).unflatten(0, x.shape[:2]),
    "einsum": lambda x, w, b: torch.einsum("slh,vh->slv", x, w),
    "einsum, other order": lambda x, w, b: torch.einsum("hv, ...h -> ...v", w.t(), x),
    "autocast off": lambda x, w, b: _without_autocast(x, w, b),
    "a normalised weight": lambda x, w, b: F.linear(x, F.normalize(w, dim=1) * 3, b),
    "another dtype in the layer": lambda x, w, b: F.linear(x.double(), w.double(), b.double()),
}


def _without_autocast(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return F.linear(hidden.float(), weight, bias)


def assert_scores_like_logits(model: Any, inputs: dict[str, Tensor], prepared: Any = None) -> None:
    """Compare all fields and all gradients with those of the model's own logits."""
    expected = expected_fields(model, inputs)
    upstream = torch.linspace(-1, 1, expected["log_probs"].numel()).view(expected["log_probs"].shape)
    (expected["log_probs"] * upstream).sum().backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    add_logps_head(model if prepared is None else prepared, FIELDS)
    found = model(**inputs, fused_lm_head=True)
    (found.log_probs * upstream).sum().backward()
    expected = {name: values.detach() for name, values in expected.items()}
    torch.testing.assert_close(dict(found), expected, check_dtype=False, rtol=1e-5, atol=1e-5)
    found_gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    torch.testing.assert_close(found_gradients, gradients)
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients.values())


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_product_is_known_however_it_is_spelled(spelling: str) -> None:
    model = tiny_llama(0)
    model.lm_head = Spelled(SPELLINGS[spelling], model.lm_head)
    assert_scores_like_logits(model, batch())


@pytest.fixture
def replaced_linear(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What DeepSpeed's ZeRO-3 puts in the place of `linear`: an autograd function, invisible to function modes."""

    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            ctx.save_for_backward(input, weight, bias)
            product = input.matmul(weight.t())
            return product if bias is None else product + bias

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Any:
            input, weight, bias = ctx.saved_tensors
            d_bias = None if bias is None else gradient.flatten(0, -2).sum(0)
            return gradient @ weight, gradient.flatten(0, -2).t() @ input.flatten(0, -2), d_bias

    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return Linear.apply(input, weight, bias)

    monkeypatch.setattr(F, "linear", linear)
    return linear


@pytest.mark.parametrize("family", ["llama", "phi", "tied"])
def test_a_replaced_linear_is_put_aside_while_the_product_is_waited_for(family: str, replaced_linear: Any) -> None:
    assert_scores_like_logits(tiny_model(family, 0), batch())
    assert F.linear is replaced_linear


def test_a_replaced_linear_is_back_after_threads_and_failures(replaced_linear: Any) -> None:
    def use() -> None:
        for _ in range(50):
            with own_linear():
                assert F.linear is torch._C._nn.linear

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with pytest.raises(KeyError), own_linear():
        raise KeyError
    assert F.linear is replaced_linear


@pytest.mark.parametrize("tied", [True, False])
def test_trainable_tokens_of_peft_are_scored(tied: bool) -> None:
    base = tiny_model("tied" if tied else "llama", 0)
    if tied:
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 5, 9]))
    else:
        config = TrainableTokensConfig(token_indices=[3, 5, 9], target_modules=["lm_head"])
        model = get_peft_model(base, config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "trainable_tokens_delta" in name:
                weight += 0.3
    assert_scores_like_logits(model, batch(), model.get_base_model())


def test_a_layer_of_two_products_is_scored() -> None:
    model = tiny_llama(0)
    torch.manual_seed(0)
    model.lm_head = torch.nn.Sequential(torch.nn.Linear(16, 7), torch.nn.Tanh(), torch.nn.Linear(7, 32))
    assert_scores_like_logits(model, batch())


def test_a_layer_without_a_weight_of_its_own_is_scored() -> None:
    model = tiny_llama(0)
    model.lm_head = torch.nn.Sequential(torch.nn.Identity(), model.lm_head)
    assert_scores_like_logits(model, batch())


def test_an_adapter_that_comes_later_is_refused() -> None:
    """Its product starts at 0: no comparison of numbers can see it before it is trained."""
    model = tiny_llama(0)
    add_logps_head(model)
    model(**batch(), fused_lm_head=True)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"]))
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"must have no adapter, got a second product.*modules_to_save"):
            adapted(**batch(), fused_lm_head=True)


class Opaque(torch.autograd.Function):
    """A product with a backward pass of its own, as quantized layers have."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        return F.linear(hidden, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        raise AssertionError


def test_a_product_inside_an_autograd_function_is_refused() -> None:
    model = tiny_llama(0)
    model.lm_head = Spelled(lambda x, w, b: Opaque.apply(x, w), model.lm_head)
    add_logps_head(model)
    with pytest.raises(ConfigError, match=r"inside an autograd function.*leave the layer out of quantization"):
        model(**batch(), fused_lm_head=True)


def test_quantized_layers_are_refused_by_name() -> None:
    model = tiny_llama(0)
    weight = torch.nn.Parameter(torch.ones(32, 16, dtype=torch.int8), requires_grad=False)
    model.lm_head.weight = weight
    with pytest.raises(ConfigError, match=r"must have floating-point weights, got torch.int8.*out of quantization"):
        add_logps_head(model)
    model = tiny_llama(0)
    model.lm_head = torch.ao.nn.quantized.dynamic.Linear(16, 32)
    with pytest.raises(ConfigError, match="leave it out of quantization"):
        add_logps_head(model)
        model(**batch(), fused_lm_head=True)


def test_layers_that_change_their_product_are_refused() -> None:
    changes: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "scaled": lambda x, w, b: F.linear(x, w) * 2,
        "a bias of its own": lambda x, w, b: F.linear(x, w) + b,
        "cut": lambda x, w, b: F.linear(x, w)[..., :30],
        "masked": lambda x, w, b: F.linear(x, w).index_fill(-1, torch.tensor([4]), -1e9),
    }
    for name, change in changes.items():
        model = tiny_llama(0)
        model.lm_head = Spelled(change, model.lm_head)
        add_logps_head(model)
        for _ in range(2):
            with pytest.raises(ConfigError, match=r"must"):
                model(**batch(), fused_lm_head=True)
                raise AssertionError(name)
