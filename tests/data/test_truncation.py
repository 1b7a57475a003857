import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastpref.data import DataConfig
from fastpref.data.problems import BadPairError
from fastpref.data.truncation import DroppedPair, truncate

P, C, R = list(range(10)), list(range(100, 106)), list(range(200, 203))


def limit(**options) -> tuple[list[int], list[int], list[int]]:
    return truncate((P, C, R), DataConfig(**{"max_length": None} | options), "pairs.jsonl", 4)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (P, C, R)),
        ({"max_length": 16}, (P, C, R)),
        ({"max_length": 15}, (P, C[:5], R)),
        ({"max_length": 12}, (P, C[:2], R[:2])),
        ({"max_length": 15, "truncation": "keep_end"}, (P[1:], C, R)),
        ({"max_length": 7, "truncation": "keep_end"}, (P[-1:], C, R)),
        ({"max_prompt_length": 4}, (P[:4], C, R)),
        ({"max_prompt_length": 4, "truncation": "keep_end"}, (P[-4:], C, R)),
        ({"max_completion_length": 2}, (P, C[:2], R[:2])),
        # the start of a completion is kept in every mode
        ({"max_completion_length": 2, "truncation": "keep_end"}, (P, C[:2], R[:2])),
        ({"max_length": 9, "max_prompt_length": 4}, (P[:4], C[:5], R)),
        ({"max_length": 9, "max_prompt_length": 4, "truncation": "keep_end"}, (P[-3:], C, R)),
        (
            {"max_length": 5, "max_prompt_length": 4, "max_completion_length": 2, "truncation": "keep_end"},
            (P[-3:], C[:2], R[:2]),
        ),
    ],
)
def test_truncate_cuts_exactly(options: dict, expected: tuple) -> None:
    assert limit(**options) == expected


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"max_length": 15}, "max_length"),
        ({"max_prompt_length": 9}, "max_prompt_length"),
        ({"max_completion_length": 5}, "max_completion_length"),
    ],
)
def test_truncate_drop_names_the_limit(options: dict, cause: str) -> None:
    with pytest.raises(DroppedPair, match=f"^{cause}$"):
        limit(truncation="drop", **options)
    assert limit(truncation="drop", max_length=16, max_prompt_length=10, max_completion_length=6) == (P, C, R)


@pytest.mark.parametrize(
    ("options", "reason", "match"),
    [
        (
            {"max_length": 10},
            "prompt_too_long",
            "prompt has 10 tokens and leaves no room for a completion in max_length=10",
        ),
        (
            {"max_length": 6, "truncation": "keep_end"},
            "completion_too_long",
            "completion has 6 tokens and leaves no room",
        ),
    ],
)
def test_truncate_never_leaves_a_part_empty(options: dict, reason: str, match: str) -> None:
    with pytest.raises(BadPairError, match=match) as caught:
        limit(**options)
    assert caught.value.reason == reason
    assert str(caught.value).startswith("pairs.jsonl:4: ")


@pytest.mark.parametrize(
    ("options", "limits"),
    [
        ({"max_completion_length": 2}, "max_completion_length"),
        ({"max_length": 3}, "max_length"),
        ({"max_completion_length": 2, "truncation": "keep_end"}, "max_completion_length"),
        ({"max_completion_length": 3, "max_length": 3}, "max_completion_length and max_length"),
    ],
)
def test_truncate_to_equal_completions_names_the_limits_that_cut(options: dict, limits: str) -> None:
    sides = [1], [2, 3, 4, 8], [2, 3, 5, 9]
    with pytest.raises(BadPairError, match=f"same tokens within the limits; raise {limits}, or set") as caught:
        truncate(sides, DataConfig(**options), "pairs.jsonl", 1)
    assert caught.value.reason == "identical_tokens"
    raised = {name: 9 for name in limits.split(" and ")}
    assert truncate(sides, DataConfig(**options | raised), "pairs.jsonl", 1)


def test_truncate_does_not_blame_a_limit_for_equal_tokens() -> None:
    with pytest.raises(BadPairError, match="gives chosen and rejected the same tokens, though their texts") as caught:
        truncate(([1], [2, 3], [2, 3]), DataConfig(max_completion_length=1), "pairs.jsonl", 1)
    assert "raise" not in str(caught.value)


lengths = st.one_of(st.none(), st.integers(2, 12))


@given(
    prompt=st.integers(1, 14),
    chosen=st.integers(1, 14),
    rejected=st.integers(1, 14),
    max_length=lengths,
    max_prompt=st.one_of(st.none(), st.integers(1, 12)),
    max_completion=st.one_of(st.none(), st.integers(1, 12)),
    truncation=st.sampled_from(["keep_start", "keep_end", "drop"]),
)
def test_truncate_result_is_within_every_limit(
    prompt: int,
    chosen: int,
    rejected: int,
    max_length: int | None,
    max_prompt: int | None,
    max_completion: int | None,
    truncation: str,
) -> None:
    if max_length is not None and max_prompt is not None and max_prompt >= max_length:
        max_prompt = max_length - 1
    config = DataConfig(
        max_length=max_length,
        max_prompt_length=max_prompt,
        max_completion_length=max_completion,
        truncation=truncation,
    )
    whole = list(range(prompt)), list(range(100, 100 + chosen)), list(range(200, 200 + rejected))
    try:
        kept = truncate(whole, config, "pairs.jsonl", 1)
    except (DroppedPair, BadPairError):
        return
    assert all(kept)
    assert len(kept[0]) + max(len(kept[1]), len(kept[2])) <= (max_length or 99)
    assert len(kept[0]) <= (max_prompt or 99)
    assert max(len(kept[1]), len(kept[2])) <= (max_completion or 99)
    for part, full in zip(kept[1:], whole[1:], strict=True):
        assert part == full[: len(part)]
    assert kept[0] in (whole[0][: len(kept[0])], whole[0][-len(kept[0]) :])
    if truncation == "drop":
        assert kept == whole
