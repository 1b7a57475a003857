"""Inputs of the head on a GPU, in the shapes of real models.

    llama3.1-8b-r8192              8192 response rows; activations drawn as `workloads.draw_head` says
    llama3.1-8b-r8192-f25          the same, of which every fourth position is a response
    v65536-h2048-r4096             any vocabulary and hidden size
    gemma3-270m-real               real activations (`workloads.build`), where the model is at hand

Sequences are as long as each other, so that packed and padded rows are one and the same memory and no implementation
pays for padding. How much of each is response comes from real pairs.

Dims: see `workloads`.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace

import torch

from bench import activity
from bench.workloads import MODELS, ROOT, Case, build, draw_head, with_reference

REAL_PAIRS = ROOT / "examples" / "data_real" / "long_pairs.jsonl"
SHAPES = {
    "llama3.1-8b": (4096, 128_256),
    "qwen3-8b": (4096, 151_936),
    "gemma3-4b": (2560, 262_144),
    "gemma3-270m": (640, 262_144),
    "smollm2-135m": (576, 49_152),
}
"""Hidden size and vocabulary. The head of the last three is their embedding, which changes nothing for it alone."""
ROWS_PER_PAIR = 1024


def build_on(name: str, device: torch.device, dtype: torch.dtype, backend: str = "auto") -> Case:
    """Make a case.

    Args:
        name: see above.
        device: where it is made.
        dtype: of hidden states and weight.
        backend: what `linear_logps` is to run on.

    Raises:
        ValueError: no such name.
        FileNotFoundError: a real model is not at hand; the message says how to get it.
    """
    if name.removesuffix("-real") in MODELS and name.endswith("-real"):
        return replace(build(name.removesuffix("-real")).to(device, dtype), name=name, backend=backend)
    hidden, vocab, rows, shares = sizes_of(name)
    length, responses = layout(rows, shares)
    weight_VH, hidden_SLH, labels_SL = draw_head(vocab, hidden, length, responses, device)
    case = Case(name, hidden_SLH, weight_VH, labels_SL, torch.zeros(len(responses), dtype=torch.float32), backend)
    return with_reference(case).to(device, dtype)


def sizes_of(name: str) -> tuple[int, int, int, float | None]:
    """Return H, V, R and the share of response (None = those of real pairs) of a workload that is drawn.

    Raises:
        ValueError: no such name.
    """
    model, shape = re.fullmatch(r"(.+)-r(\d+)(?:-f(\d+))?", name), re.fullmatch(r"v(\d+)-h(\d+)-r(\d+)", name)
    if shape:
        vocab, hidden, rows = map(int, shape.groups())
        return hidden, vocab, rows, None
    if model and model[1] in SHAPES:
        return *SHAPES[model[1]], int(model[2]), None if model[3] is None else int(model[3]) / 100
    names = ", ".join(f"{model}-r<R>[-f<percent>]" for model in SHAPES)
    raise ValueError(f"workload must be one of {names}, v<V>-h<H>-r<R> or <model>-real; got {name!r}")


def layout(num_rows: int, share: float | None = None) -> tuple[int, list[int]]:
    """Cut rows into the responses of sequences of one length.

    Args:
        num_rows: R.
        share: of each sequence that is response; None takes the shares of real pairs.

    Returns:
        (L, response length of each sequence); all chosen ones first, and R together.
    """
    num_pairs = max(num_rows // ROWS_PER_PAIR, 1)
    shares = real_shares() if share is None else [(share, share)]
    pairs = [shares[pair * len(shares) // num_pairs % len(shares)] for pair in range(num_pairs)]
    wanted = [pair[side] for side in (0, 1) for pair in pairs]
    length = round(num_rows / sum(wanted))
    responses = [min(max(round(part * length), 1), length) for part in wanted]
    while sum(responses) != num_rows:
        # Rounding left a few rows over or out: one each to the shortest, or off the longest.
        step = 1 if sum(responses) < num_rows else -1
        at = responses.index(min(responses) if step > 0 else max(responses))
        responses[at] += step
    return max(length, *responses), responses


def real_shares() -> list[tuple[float, float]]:
    """Response over prompt and response in characters, of both sides of real pairs, by rising share."""
    shares = []
    for line in REAL_PAIRS.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        prompt = sum(len(message["content"]) for message in record["prompt"])
        sides = (sum(len(message["content"]) for message in record[side]) for side in ("chosen", "rejected"))
        shares.append(tuple(size / (prompt + size) for size in sides))
    return sorted(shares)


def compare_activity(
    model: str, num_rows: int, device: torch.device, dtype: torch.dtype, backend: str = "auto"
) -> dict:
    """Compare how many columns are active in drawn activations with what was measured on real ones.

    Args:
        model: one of `SHAPES` that has been measured.
        num_rows: on how many rows.
        device: where to draw.
        dtype: of the activations.
        backend: what the op runs on.

    Returns:
        A row; "wrong" where the drawn ones are not alike.
    """
    row = activity.compare(build_on(f"{model}-r{num_rows}", device, dtype, backend))
    return {"rows": num_rows} | row | ({"status": "wrong"} if "reason" in row else {})
