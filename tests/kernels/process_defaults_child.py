"""Runs the op under defaults of the process that others set; `test_process_defaults.py` starts it and reads its lines.

Prints one line of JSON per setting: {"setting": [names of the cases whose bits it changed]}.
"""

import contextlib
import json
from collections.abc import Callable, Iterator

import torch
from head_oracle import flatten, run, tiles
from torch import Tensor

from fastpref import linear_logps
from fastpref.kernels.engines import HAS_TRITON
from fastpref.testing.adversarial import IGNORE, HeadInputs, ragged_inputs

Results = dict[str, Tensor]


def second_mask(inputs: HeadInputs) -> HeadInputs:
    nll_labels_SL = inputs.labels_SL.clone()
    nll_labels_SL[:, ::2] = IGNORE
    bias_V = torch.linspace(-1.0, 1.0, inputs.weight_VH.shape[0], dtype=torch.float32)
    return inputs._replace(nll_labels_SL=nll_labels_SL, bias_V=bias_V, logit_scale=0.7)


# A vocabulary wide enough for cold columns; labels of few rows.
INPUTS = second_mask(ragged_inputs(2, 6, 16, 600))


def packed() -> Results:
    bounds = torch.tensor([0, 5, 12], dtype=torch.int32, device="cpu")
    labels_T = INPUTS.labels_SL.flatten()
    options = {"cu_seqlens": bounds, "backward": "active", "stats": ("active_fraction", "cold_mass"), "debug": True}
    weight_VH = INPUTS.weight_VH.clone().requires_grad_()
    result = linear_logps(INPUTS.hidden_SLH.flatten(0, 1), weight_VH, labels_T, **options)
    (d_weight_VH,) = torch.autograd.grad(result.logps.sum(), weight_VH)
    named = {name: getattr(result, name) for name in ("logps", "active_fraction", "cold_mass", "rows", "cu_rows")}
    return named | {"d_weight": d_weight_VH}


def main_grad() -> Results:
    weight_VH = INPUTS.weight_VH.bfloat16().requires_grad_()
    total_VH = torch.zeros(weight_VH.shape, dtype=torch.float32, device="cpu")
    linear_logps(INPUTS.hidden_SLH.bfloat16(), weight_VH, INPUTS.labels_SL, main_grad=total_VH).logps.sum().backward()
    return {"main_grad": total_VH}


def on_tiles() -> Iterator[tuple[str, Callable[[], Results]]]:
    """The plans and engines, in fp32 and 16 bits, with and without a softcap."""
    for dtype in (torch.float32, torch.bfloat16):
        for softcap in (None, 5.0):
            inputs = INPUTS.cast(dtype)._replace(softcap=softcap)
            for plan in ("recompute", "active", "cached"):
                if plan != "cached" or softcap is None:
                    yield f"{plan} {dtype} {softcap}", lambda i=inputs, p=plan: flatten(*run(i, "torch", p))
    yield "reference", lambda: flatten(*run(INPUTS, "reference", "exact"))


def in_pytorch(case: Callable[[], Results]) -> Results:
    with tiles():
        return case()


CASES = {"packed": packed, "main_grad": main_grad, **dict(on_tiles())}
CASES |= {f"{name} in PyTorch": lambda case=case: in_pytorch(case) for name, case in CASES.items()}
if HAS_TRITON:
    small = second_mask(ragged_inputs(2, 3, 16, 70)).cast(torch.bfloat16)
    CASES["triton"] = lambda: flatten(*run(small, "triton", "active"))


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(torch.float32)


SETTINGS = {str(dtype): lambda d=dtype: default_dtype(d) for dtype in (torch.bfloat16, torch.float64)}
SETTINGS["meta"] = lambda: torch.device("meta")


def same_bits(found: Results, expected: Results) -> bool:
    return all(
        values.dtype == expected[name].dtype and torch.equal(values.nan_to_num(), expected[name].nan_to_num())
        for name, values in found.items()
    )


def main() -> None:
    expected = {name: case() for name, case in CASES.items()}
    for setting, enter in SETTINGS.items():
        changed = []
        for name, case in CASES.items():
            # Triton's interpreter makes tensors of its own on the default device.
            if name == "triton" and setting == "meta":
                continue
            with enter():
                found = case()
            if not same_bits(found, expected[name]):
                changed.append(name)
        print(json.dumps({setting: changed}), flush=True)


if __name__ == "__main__":
    main()
