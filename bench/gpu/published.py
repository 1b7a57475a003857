"""Times of peers that others have published, for what is not measured here. None of them was reproduced.

Sources are pull requests of linkedin/Liger-Kernel, which time its kernels and quack's side by side, in bf16; where
several worked on one kernel, the first is named.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Published:
    """One figure of one peer."""

    peer: str
    """Its name in the registry."""
    device: str
    rows: int
    vocab: int
    figure: float
    unit: str = "ms"
    """Or "TFLOP/s", of 2 RHV operations forward."""
    kind: str = "forward + backward"
    hidden: int = 4096
    source: str


_H200, _H100 = "Liger-Kernel, pull request 1356", "Liger-Kernel, pull request 1334 and after"
BEST = Published(peer="liger-ce-sm90", device="H200", rows=8192, vocab=128_256, figure=34.4, source=_H200)
"""The mean over rows, gradients made from stored logits: three products."""
PER_ROW = Published(peer="liger-ce-scaled", device="H100", rows=8192, vocab=131_072, figure=50.4, source=_H100)
"""With a free gradient to each row, as DPO needs: logits twice, four products."""
FORWARD = Published(
    peer="liger-ce-scaled",
    device="H100",
    rows=8192,
    vocab=131_072,
    figure=727.0,
    unit="TFLOP/s",
    kind="forward",
    source=_H100,
)
PUBLISHED = (
    Published(peer="quack", device="H200", rows=2048, vocab=128_256, figure=7.96, source=_H200),
    Published(peer="liger-ce-sm90", device="H200", rows=4096, vocab=128_256, figure=16.7, source=_H200),
    BEST,
    PER_ROW,
    FORWARD,
)


def scaled_ms(published: Published, vocab: int) -> float:
    """What a published time would be at another vocabulary, if the products are all that counts."""
    assert published.unit == "ms"
    return published.figure * vocab / published.vocab


def published_table(titles: dict[str, str], measured: Collection[str]) -> str:
    """Markdown of the figures of peers that are not in `measured`, by titles of the registry; empty without any."""
    lines = [
        f"| {titles[each.peer]} | {each.device} | {each.rows} | {each.hidden} | {each.vocab} | {each.kind} "
        f"| {each.figure:g} {each.unit} | {each.source} |"
        for each in PUBLISHED
        if each.peer not in measured
    ]
    if not lines:
        return ""
    header = "| implementation | device | R | H | V | pass | published | source |\n|---|---|---|---|---|---|---|---|"
    return "\n".join(["## Published by others, in bf16, for what has no row here", "", header, *lines])
