"""How far the weights of two model directories are apart, over parts of the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open
from torch import Tensor


def distance(first: Path, second: Path, seen_ids: Sequence[int]) -> dict[str, float]:
    """L2 distances between two model directories, over parts of the weights.

    Args:
        first: one directory.
        second: the other, of equal shapes.
        seen_ids: rows of the head that are a part of their own.

    Returns:
        The distance over `all` weights, the `seen` and the `unseen` rows of the head, and all `others`. Embeddings that
        are the head as well count as the head.
    """
    one, other = _files(first), _files(second)
    head = "lm_head.weight" if "lm_head.weight" in one else "model.embed_tokens.weight"
    squares = {"seen": 0.0, "unseen": 0.0, "others": 0.0}
    for name in one:
        square = (_tensor(one[name], name) - _tensor(other[name], name)).square()
        if name == head:
            squares["seen"] = float(square[[*seen_ids]].sum())
            squares["unseen"] = float(square.sum()) - squares["seen"]
        else:
            squares["others"] += float(square.sum())
    return {name: square**0.5 for name, square in {"all": sum(squares.values()), **squares}.items()}


def _files(folder: Path) -> dict[str, Path]:
    """The file of every weight of a model directory."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= dict.fromkeys(opened.keys(), file)
    return found


def _tensor(file: Path, name: str) -> Tensor:
    with safe_open(file, "pt") as opened:
        tensor: Tensor = opened.get_tensor(name)
    return tensor.double()
