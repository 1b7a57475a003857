"""How far rounding puts the log-probs of one model apart between padded, packed and prefix-sharing rows.

    python -m bench.tie_noise MODEL_DIR --precision fp32 --pairs 6        half a minute; 16 bits take minutes

The numbers behind `fastpref.trainer.step.noise.TOKEN_NOISE`: the difference of a pair's two log-ratios, which is 0 in
exact arithmetic, over the square root of its response tokens, in units of the format's eps.

Dims: B pairs, S = 2B sequences, K score columns.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastpref.data import DataConfig, PackedCollator, PreferenceCollator, TokenizedPair, load_dataset, load_tokenizer
from fastpref.losses import DPOConfig
from fastpref.trainer import ModelOptions, TrainingArguments, initialize_megatron, load_models
from fastpref.trainer.reference.reference import ReferenceModel
from fastpref.trainer.step.batch import Microbatch
from fastpref.trainer.step.noise import TOKEN_NOISE

DATA = Path(__file__).parents[1] / "examples" / "data_real" / "pairs.jsonl"
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PADDED = PreferenceCollator(0)
FORMS = {
    "padded, 1 pair": (PADDED, 1),
    "padded, 3 pairs": (PADDED, 3),
    "packed, 3 pairs": (PackedCollator(PADDED, prefix_sharing=False), 3),
    "prompt shared, 3 pairs": (PackedCollator(PADDED, prefix_sharing=True), 3),
}
"""Collator and pairs of a microbatch; the others are compared with the first."""


def score(
    reference: ReferenceModel, pairs: Sequence[TokenizedPair], collate: PreferenceCollator | PackedCollator, size: int
) -> tuple[Tensor, Tensor]:
    """Response sums and token counts, fp64 [2, B]."""
    chunks = [list(pairs[start : start + size]) for start in range(0, len(pairs), size)]
    batches = [Microbatch.from_dict(collate(chunk)) for chunk in chunks]
    columns = [scores_KS[0].view(2, -1) for scores_KS in reference.score_columns(batches) if scores_KS is not None]
    return torch.cat(columns, 1).double(), torch.cat([batch.counts_S.view(2, -1) for batch in batches], 1).double()


def measure(model: Path, precision: str, num_pairs: int, max_length: int) -> None:
    """Print a line for each form but the first."""
    dtype = PRECISIONS[precision]
    flags = {} if precision == "fp32" else {precision: True}
    args = TrainingArguments(packing=True, prefix_sharing=True, report_to=(), **flags)
    initialize_megatron(args)
    tokenizer = load_tokenizer(model)
    data = load_dataset((str(DATA),), tokenizer, DataConfig(train=str(DATA), max_length=max_length))
    pairs = [data[index] for index in range(num_pairs)]
    reference = ReferenceModel(load_models(model, ModelOptions(params_dtype=dtype)), DPOConfig(), args)
    (first_2B, counts_2B), *others = (score(reference, pairs, *form) for form in FORMS.values())
    print(
        f"{model.name}, {precision}, {num_pairs} pairs, {int(counts_2B.sum())} response tokens, "
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}"
    )
    for name, (sums_2B, _) in zip(list(FORMS)[1:], others, strict=True):
        chosen_B, rejected_B = sums_2B - first_2B
        units_B = (chosen_B - rejected_B) / (torch.finfo(dtype).eps * counts_2B.sum(0).sqrt())
        print(
            f"{name:24} standard deviation {units_B.square().mean().sqrt():6.2f} (assumed {TOKEN_NOISE[dtype]:g}), "
            f"largest {units_B.abs().max():6.2f}; "
            f"{float((sums_2B - first_2B).abs().sum() / counts_2B.sum()):.1e} nat per token"
        )


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--max-length", type=int, default=192)
    options = parser.parse_args()
    with torch.no_grad():
        measure(options.model, options.precision, options.pairs, options.max_length)


if __name__ == "__main__":
    main()
