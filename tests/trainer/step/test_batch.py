"""The rows that a microbatch asks the head for, against their definition, one token at a time."""

import random

import pytest
import torch

from fastpref.data import FILLER_ID, PackedCollator, PreferenceCollator, TokenizedPair
from fastpref.trainer.step.batch import Microbatch

MASKS = (None, "response", "prompt_and_response", "shared")
FORMS = ("padded", "packed", "shared")
CHANGES = ("none", "fewer labels", "other bounds", "fewer bounds", "other order", "repeated", "outside", "other kind")


def random_pairs(rng: random.Random) -> list[TokenizedPair]:
    def tokens(most: int) -> list[int]:
        return [rng.randrange(64) for _ in range(rng.randint(1, most))]

    pairs = []
    for pair_id in range(rng.randint(1, 4)):
        prompt, chosen, rejected = tokens(7), tokens(9), tokens(9)
        other_prompt = tokens(7) if rng.random() < 0.3 else prompt
        pairs.append(
            TokenizedPair(
                pair_id=rng.choice([pair_id, pair_id, FILLER_ID]),
                chosen_input_ids=prompt + chosen,
                rejected_input_ids=other_prompt + rejected,
                num_prompts=(len(prompt), len(other_prompt)),
            )
        )
    return pairs


def collator(form: str, mask: str | None) -> PreferenceCollator | PackedCollator:
    padding = PreferenceCollator(0, pad_to_multiple_of=4, nll_mask=mask)
    return padding if form == "padded" else PackedCollator(padding, prefix_sharing=form == "shared")


def owner_of(batch: dict, num_pairs: int, row: int, position: int) -> int | None:
    """The sequence that a label at this position of this row counts for."""
    if "segment_bounds" not in batch:
        return row
    for pair, (start, _, rejected, stop) in enumerate(batch["segment_bounds"].tolist()):
        if start <= position < stop:
            return pair if position < rejected else num_pairs + pair
    return None


def zigzag(length: int, ranks: int, rank: int) -> list[int]:
    chunk = length // (2 * ranks)
    return [place for part in (rank, 2 * ranks - 1 - rank) for place in range(part * chunk, (part + 1) * chunk)]


def expected_rows(batch: dict, num_pairs: int, length: int, held: list[int]) -> list[list[int]]:
    """For each sequence, the tokens with a label of either kind, in Megatron's order of the held positions."""
    kinds = [batch[key].tolist() for key in ("labels", "nll_labels") if key in batch]
    num_rows, filled = len(kinds[0]), len(kinds[0][0])
    assert filled <= length
    return [
        [
            place * num_rows + row
            for row in range(num_rows)
            for place, position in enumerate(held)
            if position < filled
            and any(labels[row][position] != -100 for labels in kinds)
            and owner_of(batch, num_pairs, row, position) == sequence
        ]
        for sequence in range(2 * num_pairs)
    ]


def assert_rows(batch: dict, num_pairs: int, extra: int = 0) -> None:
    microbatch = Microbatch.from_dict(batch)
    microbatch = microbatch.padded_to(microbatch.seq_length + extra)
    length = microbatch.seq_length
    for ranks in (1, 2):
        for rank in range(ranks):
            held = zigzag(length, ranks, rank) if ranks > 1 else list(range(length))
            request = microbatch.head_request(torch.tensor(held) if ranks > 1 else slice(None))
            rows = expected_rows(batch, num_pairs, length, held)
            assert request.rows_R.tolist() == [row for of_sequence in rows for row in of_sequence]
            assert request.cu_rows.diff().tolist() == [len(of_sequence) for of_sequence in rows]
            assert request.cu_rows[0] == 0
            assert request.rows_R.dtype == request.cu_rows.dtype == torch.int64
    for key, counts in {"labels": "counts_S", "nll_labels": "nll_counts_S"}.items():
        if key in batch:
            one_kind = {"labels": batch[key]} | {name: batch[name] for name in ("segment_bounds",) if name in batch}
            rows = expected_rows(one_kind, num_pairs, length, list(range(length)))
            assert getattr(microbatch, counts).tolist() == [float(len(of_sequence)) for of_sequence in rows]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("form", FORMS)
def test_head_request_asks_for_every_label_once_by_sequence(form: str, mask: str | None) -> None:
    rng = random.Random(f"{form} {mask}")
    for extra in (0, 4, 12) * 6:
        pairs = random_pairs(rng)
        batch = collator(form, mask)(pairs)
        # what the collator made is what is used
        assert Microbatch.from_dict(batch).cu_rows is batch["cu_rows"]
        assert_rows(batch, len(pairs), extra)


def changed(batch: dict, change: str) -> dict:
    rows, cu_rows = batch["rows"], batch["cu_rows"]
    if change == "none":
        return {key: value for key, value in batch.items() if key not in ("rows", "cu_rows")}
    labels = batch["labels"].clone()
    labels.view(-1)[rows[cu_rows[1] - 1]] = -100
    first = cu_rows.clone()
    first[1] -= 1
    changes = {
        "fewer labels": {"labels": labels},
        "other bounds": {"cu_rows": first},
        "fewer bounds": {"cu_rows": cu_rows[:-1]},
        "other order": {"rows": rows.flip(0)},
        "repeated": {"rows": rows[:1].repeat(len(rows))},
        "outside": {"rows": rows + 1000},
        "other kind": {"rows": torch.tensor([3.5]), "cu_rows": torch.tensor([1])},
    }
    return batch | changes[change]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("change", CHANGES)
def test_head_request_follows_the_labels_whatever_rows_a_batch_brings(form: str, change: str) -> None:
    rng = random.Random(7)
    for mask in (None, "shared"):
        pairs = random_pairs(rng)
        assert_rows(changed(collator(form, mask)(pairs), change), len(pairs))
