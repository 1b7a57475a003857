import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastpref.data import (
    FILLER_ID,
    DataConfig,
    PairSampler,
    PreferenceCollator,
    PreferenceDataset,
    TokenizedPair,
    load_dataset,
)
from fastpref.errors import DataError


def make_pair(pair_id: int, prompt: list[int], chosen: list[int], rejected: list[int], weight: float) -> TokenizedPair:
    return TokenizedPair(
        pair_id=pair_id,
        chosen_input_ids=prompt + chosen,
        rejected_input_ids=prompt + rejected,
        num_prompts=(len(prompt), len(prompt)),
        weight=weight,
        source=f"pairs.jsonl:{pair_id + 1}",
    )


ids = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=6)
pair_lists = st.lists(st.tuples(ids, ids, ids, st.floats(1e-6, 1e6)), min_size=1, max_size=8)


@given(parts=pair_lists)
def test_dataset_gives_back_the_pairs_it_stored(parts: list) -> None:
    pairs = [make_pair(index, *part) for index, part in enumerate(parts)]
    dataset = PreferenceDataset(pairs)
    assert list(dataset) == pairs == dataset[:]
    assert dataset[-1] == pairs[-1]
    with pytest.raises(IndexError):
        dataset[len(pairs)]
    largest, position = dataset.largest_token_id()
    per_pair = [max(pair.chosen_input_ids + pair.rejected_input_ids) for pair in pairs]
    assert (largest, position) == (max(per_pair), per_pair.index(max(per_pair)))


@given(parts=pair_lists, data=st.data())
def test_dataset_sha256_changes_with_any_change(parts: list, data: st.DataObject) -> None:
    pairs = [make_pair(index, *part) for index, part in enumerate(parts)]
    before = PreferenceDataset(pairs).sha256
    assert PreferenceDataset(pairs).sha256 == before
    index = data.draw(st.integers(0, len(parts) - 1))
    part = data.draw(st.integers(0, 3))
    changed = [list(fields) for fields in parts]
    if part == 3:
        changed[index][3] *= 1.5
    else:
        changed[index][part] = [*changed[index][part], 0]
    assert PreferenceDataset([make_pair(i, *fields) for i, fields in enumerate(changed)]).sha256 != before


def test_dataset_sha256_is_the_one_that_caches_and_checkpoints_hold() -> None:
    pairs = [make_pair(0, [1, 2], [3], [4, 5], 0.5), make_pair(1, [7], [70000], [8], 1.0)]
    known = "0c092ca3e4d81c545dbd243d40419e1f913a413daf34ccf5553ccc5669d0d24b"
    assert PreferenceDataset(pairs).sha256 == known


def test_dataset_sha256_sees_a_moved_boundary() -> None:
    moved = [make_pair(0, [1, 2], [3], [4], 1.0)], [make_pair(0, [1], [2, 3], [4], 1.0)]
    assert PreferenceDataset(moved[0]).sha256 != PreferenceDataset(moved[1]).sha256


def test_dataset_two_sides_with_other_prompts_are_refused() -> None:
    for rejected, num_prompt in ([9, 2], 1), ([1, 1, 2], 2):
        pair = TokenizedPair(
            pair_id=0,
            chosen_input_ids=[1, 2],
            rejected_input_ids=rejected,
            num_prompts=(1, num_prompt),
            source="pairs.jsonl:1",
        )
        with pytest.raises(
            ValueError, match=r"pair 0 \(pairs\.jsonl:1\): both sides must begin with the same prompt tokens"
        ):
            PreferenceDataset([pair])


def record(index: int, **fields) -> str:
    return json.dumps({"prompt": f"{index}+1=", "chosen": str(index + 1), "rejected": "no", **fields}) + "\n"


def test_load_dataset_joins_files_in_order(write, byte_tokenizer) -> None:
    first = write(record(0) + record(1, weight=3), "a.jsonl")
    second = write(f"[{record(2)}]", "b.json")
    dataset = load_dataset([first, second], byte_tokenizer, DataConfig())
    assert [pair.source for pair in dataset] == [f"{first}:1", f"{first}:2", f"{second}:1"]
    assert [pair.pair_id for pair in dataset] == [0, 1, 2]
    assert [pair.weight for pair in dataset] == [1.0, 3.0, 1.0]
    assert dataset.report.kept == 3
    assert dataset.report.prompt_tokens.max == len("<0+1=")


def test_load_dataset_sha256_is_of_the_content_not_the_name(write, byte_tokenizer) -> None:
    text = record(0) + record(1)
    hashes = {
        load_dataset(write(text, "a.jsonl"), byte_tokenizer, DataConfig()).sha256,
        load_dataset(write(text.replace("\n", "\r\n"), "b.jsonl"), byte_tokenizer, DataConfig()).sha256,
        load_dataset([write(record(0), "c.jsonl"), write(record(1), "d.jsonl")], byte_tokenizer, DataConfig()).sha256,
    }
    assert len(hashes) == 1
    other = load_dataset(write(text, "a.jsonl"), byte_tokenizer, DataConfig(append_eos=False))
    assert other.sha256 not in hashes


def test_load_dataset_gathers_bad_records_of_every_stage(write, byte_tokenizer) -> None:
    path = write(record(0) + "{\n" + record(2, chosen=None) + record(3, chosen="no") + record(4))
    with pytest.raises(DataError) as caught:
        load_dataset(path, byte_tokenizer, DataConfig())
    lines = str(caught.value).splitlines()
    assert lines[0] == "3 bad records:"
    assert [line.split(": ")[0] for line in lines[1:]] == [f"{path}:{number}" for number in (2, 3, 4)]


def test_load_dataset_drop_never_covers_damaged_records(write, byte_tokenizer) -> None:
    """`on_bad_pair: drop` is about pairs that cannot be learned from, not about files that are broken."""
    config = DataConfig(on_bad_pair="drop")
    kept = load_dataset(write(record(0) + record(1, chosen="no")), byte_tokenizer, config)
    assert (len(kept), kept.report.dropped) == (1, {"identical": 1})
    with pytest.raises(DataError, match="field 'chosen' is missing"):
        load_dataset(write(record(0) + record(1, chosen=None)), byte_tokenizer, config)


def test_load_dataset_with_no_pair_left_is_an_error(write, byte_tokenizer) -> None:
    path = write(record(0, chosen="no"))
    with pytest.raises(DataError, match=r"no pair is left to train on: 0 of 1 pairs kept; dropped: 1 identical"):
        load_dataset(path, byte_tokenizer, DataConfig(on_bad_pair="drop"))
    with pytest.raises(DataError, match="no data file was named"):
        load_dataset([], byte_tokenizer, DataConfig())


def test_dataset_sampler_and_collator_cover_an_epoch(write, byte_tokenizer) -> None:
    """The three parts together, as a loop of one's own uses them: two ranks, a last batch with fillers."""
    dataset = load_dataset(write("".join(record(i) for i in range(11))), byte_tokenizer, DataConfig())
    sampler = PairSampler(len(dataset), 8, seed=1)
    collate = PreferenceCollator(byte_tokenizer.pad_token_id, nll_mask="response")
    seen: list[int] = []
    total_weight = 0.0
    for step in range(sampler.steps_per_epoch):
        for rank in range(2):
            for indices in sampler.shard(step, rank, dp_size=2, micro_batch=2, num_micro=2):
                filler = replace(dataset[0], pair_id=FILLER_ID, weight=0.0)
                batch = collate([filler if index is None else dataset[index] for index in indices])
                assert batch["input_ids"].shape[0] == 4
                seen += batch["pair_ids"].tolist()
                total_weight += batch["pair_weights"].sum().item()
    assert sorted(seen) == [FILLER_ID] * 5 + list(range(11))
    assert total_weight == 11.0
