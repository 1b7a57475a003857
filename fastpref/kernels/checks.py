"""Argument checks of `linear_logps`: everything that shapes, types and option names can tell before any work starts."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.distributed import ProcessGroup
from torch.distributed._functional_collectives import AsyncCollectiveTensor

from fastpref.kernels.outputs import STATISTICS

ACTIVITY_STATS = ("active_fraction", "cold_mass")
STATS = ("token_logps", *STATISTICS, *ACTIVITY_STATS)
BACKENDS = ("auto", "reference", "torch", "triton")
AUTOCAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOAT_DTYPES = (*AUTOCAST_DTYPES, torch.float64)
# Subclasses that operators see through: those of tracing, and a tensor that a collective is still on its way to.
TRANSPARENT_TENSORS = (FakeTensor, FunctionalTensor, AsyncCollectiveTensor)


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Check a name among names.

    Raises:
        ValueError: another one; the nearest is suggested.
    """
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}{hint}")


def check_stats(stats: Sequence[str]) -> None:
    """Check the names of the requested statistics.

    Raises:
        TypeError: a single string.
        ValueError: an unknown name.
    """
    if isinstance(stats, str):
        raise TypeError(f"stats must be a sequence of names, got the string {stats!r}; write stats=({stats!r},)")
    for name in stats:
        check_choice("stats", name, STATS)


def check_scalars(logit_scale: float, softcap: float | None, ignore_index: int) -> None:
    """Check the numbers among the arguments.

    Raises:
        TypeError: a tensor or another type, whose gradient would be lost.
        ValueError: not finite, or a softcap that is not positive.
    """
    for name, number in (("logit_scale", logit_scale), ("softcap", softcap)):
        if number is None and name == "softcap":
            continue
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise TypeError(
                f"{name} must be a Python number (it gets no gradient), got {type(number).__name__}; pass a float, "
                "or fold a learned factor into `hidden`"
            )
        # Not `isfinite`, which the compiler does not know of numbers that it leaves open.
        if not -math.inf < number < math.inf:
            raise ValueError(f"{name} must be finite, got {number}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be > 0 (Gemma-2 uses 30.0), got {softcap}; pass None for no cap")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {ignore_index!r}")


def require_tensor(name: str, value: object) -> None:
    """Check that there is a tensor, and that its elements are where its shape says.

    Raises:
        TypeError: no tensor, or one that keeps its numbers elsewhere.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if torch.compiler.is_compiling():
        return
    if value.is_nested:
        raise TypeError(
            f"{name} must be a plain tensor, got a nested one; pass its values() flat, and its offsets() as cu_seqlens"
        )
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}; pass {name}.to_dense()")
    is_wrapper = type(value).__torch_dispatch__ is not Tensor.__torch_dispatch__
    if is_wrapper and not isinstance(value, TRANSPARENT_TENSORS):
        raise TypeError(
            f"{name} must be a plain tensor, got a {type(value).__name__}, which keeps its numbers elsewhere; pass "
            "full_tensor() of a DTensor (or to_local() of a sharded vocabulary, with tp_group), dequantize() of a "
            "quantised weight"
        )


def _require_like(name: str, tensor: Tensor, hidden: Tensor) -> None:
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{name} and hidden must have one dtype, got {tensor.dtype} and {hidden.dtype}; the codes of a quantised "
            f"tensor are no numbers, dequantize {name} first"
        )
    if tensor.dtype != hidden.dtype:
        raise TypeError(
            f"{name} and hidden must have one dtype, got {tensor.dtype} and {hidden.dtype}; cast one of them, "
            f"e.g. {name}.to(hidden.dtype)"
        )
    require_device(name, tensor, hidden)


def require_device(name: str, tensor: Tensor, hidden: Tensor) -> None:
    """Check that a tensor is where `hidden` is.

    Raises:
        ValueError: it is elsewhere.
    """
    if tensor.device != hidden.device:
        raise ValueError(f"{name} must be on the device of hidden, {hidden.device}, got {tensor.device}; move it there")


def check_model_tensors(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Check types, shapes and devices of the differentiable inputs.

    Raises:
        TypeError: no plain dense tensor, no floating dtype, or unequal dtypes.
        ValueError: shapes or devices that do not fit, or no numbers at all.
    """
    require_tensor("hidden", hidden)
    require_tensor("weight", weight)
    if hidden.dtype not in FLOAT_DTYPES:
        raise TypeError(f"hidden must be float32, bfloat16, float16 or float64, got {hidden.dtype}")
    if hidden.is_meta and not isinstance(hidden, FakeTensor):
        raise ValueError("hidden is on the meta device, which has shapes and no numbers; move the model and its inputs")
    if hidden.dim() not in (2, 3):
        raise ValueError(f"hidden must be [T, H] or [S, L, H], got shape {tuple(hidden.shape)}")
    _require_like("weight", weight, hidden)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight must be [V, H] with H = {hidden.shape[-1]} as in hidden, got shape {tuple(weight.shape)}; "
            "pass the projection as nn.Linear stores it, not its transpose"
        )
    if bias is not None:
        require_tensor("bias", bias)
        _require_like("bias", bias, hidden)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must be [V] with V = {weight.shape[0]} as in weight, got shape {tuple(bias.shape)}")


def check_main_grad(main_grad: Tensor | None, hidden: Tensor, weight: Tensor, backend: str) -> None:
    """Check the buffer that takes the weight's gradient.

    Raises:
        TypeError: no tensor.
        ValueError: shape, dtype or device that do not fit, or nothing that would fill it.
    """
    if main_grad is None:
        return
    require_tensor("main_grad", main_grad)
    if backend == "reference":
        raise ValueError(
            "main_grad is filled by the fused backward pass, which backend='reference' has not; leave it out"
        )
    if main_grad.dtype != torch.promote_types(hidden.dtype, torch.float32) or main_grad.shape != weight.shape:
        raise ValueError(
            f"main_grad must have the shape of weight, {tuple(weight.shape)}, in fp32 (fp64 for fp64 inputs), got "
            f"{tuple(main_grad.shape)} in {main_grad.dtype}"
        )
    require_device("main_grad", main_grad, hidden)
    if not weight.requires_grad:
        raise ValueError("main_grad takes the gradient of weight, which has requires_grad=False; leave it out")


def check_labels(name: str, labels: Tensor | None, hidden: Tensor, num_slices: int) -> None:
    """Check one label tensor against the token axes of `hidden`, which is one of `num_slices` equal slices.

    Raises:
        TypeError: no int64 tensor (a tensor that requires grad is never int64).
        ValueError: shape or device that does not fit.
    """
    require_tensor(name, labels)
    assert labels is not None
    if labels.dtype != torch.int64:
        raise TypeError(f"{name} must be int64 token ids without grad, got {labels.dtype}; use {name}.long()")
    shape = (hidden.shape[0] * num_slices, *hidden.shape[1:-1])
    if tuple(labels.shape) != shape:
        raise ValueError(
            f"{name} must have one label per token, shape {shape}, got {tuple(labels.shape)}; labels are already "
            "shifted, and sequence parallelism cuts only hidden, in equal slices (pad the tokens to fit)"
        )
    require_device(name, labels, hidden)


def check_ids(name: str, ids: Tensor | None, num_ids: int, ignore_index: int) -> None:
    """Check every label of a tensor against the vocabulary; waits for the device.

    Raises:
        IndexError: a label is no id, nor `ignore_index`.
    """
    if ids is None:
        return
    outside = ((ids < 0) | (ids >= num_ids)) & (ids != ignore_index)
    if outside.any():
        place = outside.nonzero()[0].tolist()
        raise IndexError(
            f"{name}{place} is {int(ids[tuple(place)])}; a label must be in [0, {num_ids}), or ignore_index="
            f"{ignore_index} ({int(outside.sum())} labels are not); use the tokenizer that belongs to the model"
        )


def check_parallel(
    hidden: Tensor,
    weight: Tensor,
    tp_group: ProcessGroup | None,
    vocab_start: int | None,
    sequence_parallel: bool,
    backend: str,
) -> ProcessGroup | None:
    """Check the parallel options; return the group, None where it is this rank alone.

    Raises:
        TypeError: `vocab_start` is no int.
        ValueError: options that need a group without one, an empty vocabulary, or a backend that knows no groups.
    """
    if vocab_start is not None and (isinstance(vocab_start, bool) or not isinstance(vocab_start, int)):
        raise TypeError(f"vocab_start must be an int, got {vocab_start!r}")
    if tp_group is None:
        for name, given in (("vocab_start", vocab_start is not None), ("sequence_parallel", sequence_parallel)):
            if given:
                raise ValueError(f"{name} describes this rank's part and needs tp_group, got tp_group=None; pass both")
        if not weight.shape[0]:
            raise ValueError("weight must have at least one row (an empty shard is possible with tp_group), got V = 0")
        return None
    if vocab_start is not None and vocab_start < 0:
        raise ValueError(f"vocab_start must be >= 0, got {vocab_start}")
    if backend == "reference":
        raise ValueError("backend='reference' computes on one rank; use backend='torch' with tp_group")
    return tp_group if tp_group.size() > 1 else None


def check_layout(
    hidden: Tensor, cu_seqlens: Tensor | None, rows: Tensor | None, cu_rows: Tensor | None, sequence_parallel: bool
) -> None:
    """Check that exactly one description of the sequences is there, and its types.

    Raises:
        TypeError: an index tensor of another dtype.
        ValueError: none, too many, or a half description; an index tensor that is not 1-D; sequence parallelism with
            padded input.
    """
    if (rows is None) != (cu_rows is None):
        given, missing = ("rows", "cu_rows") if cu_rows is None else ("cu_rows", "rows")
        raise ValueError(f"rows and cu_rows come together, got {given} without {missing}; pass both or neither")
    if cu_seqlens is not None and rows is not None:
        raise ValueError(
            "cu_seqlens and rows both describe the sequences; pass rows and cu_rows, or cu_seqlens, not both"
        )
    if hidden.dim() == 3 and cu_seqlens is not None:
        raise ValueError("cu_seqlens is for packed hidden [T, H], got padded [S, L, H]; leave cu_seqlens out")
    if hidden.dim() == 2 and cu_seqlens is None and rows is None:
        raise ValueError("flat hidden [T, H] needs the sequence bounds; pass cu_seqlens [S+1], or rows and cu_rows")
    if hidden.dim() == 3 and sequence_parallel:
        raise ValueError(
            "sequence_parallel=True takes this rank's slice of the flat token axis, [T/P, H], got a 3-D hidden; "
            "flatten it and pass rows and cu_rows"
        )
    for name, tensor, dtypes in (
        ("cu_seqlens", cu_seqlens, (torch.int32, torch.int64)),
        ("rows", rows, (torch.int64,)),
        ("cu_rows", cu_rows, (torch.int32, torch.int64)),
    ):
        if tensor is None:
            continue
        require_tensor(name, tensor)
        if tensor.dtype not in dtypes:
            raise TypeError(f"{name} must be {' or '.join(str(d) for d in dtypes)}, got {tensor.dtype}")
        if tensor.dim() != 1 or (name != "rows" and not tensor.numel()):
            shape = "[R]" if name == "rows" else "[S+1], at least [0]"
            raise ValueError(f"{name} must be {shape}, got shape {tuple(tensor.shape)}")
