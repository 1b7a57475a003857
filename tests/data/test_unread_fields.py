"""Fields that are not read: what belongs to the prompt is not dropped in silence, and the rest is reported."""

import json
from typing import Any

import pytest

from fastpref.data import DataConfig, load_dataset, read_pairs
from fastpref.errors import ConfigError, DataError

USER = {"role": "user", "content": "Name a colour."}
GOOD = {"role": "assistant", "content": "The colour is red."}
BAD = {"role": "assistant", "content": "The colour is Tuesday."}
PLAIN = {"prompt": "Name a colour.", "chosen": " Red.", "rejected": " Tuesday."}
CHAT = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
IMPLICIT = {"chosen": "The colour is red.", "rejected": "The colour is Tuesday."}
TURNS = {"conversations": [{"from": "human", "value": "Name a colour."}], "chosen": GOOD, "rejected": BAD}


def read(write, record: dict, **options: Any) -> Any:
    (pair,) = read_pairs(write(json.dumps(record)), DataConfig(**options))
    return pair


# Column names of published preference data beside `chosen` and `rejected`, with a value of their form.
PARTS = {
    "instruction": "Do it.",
    "input": "0, 1, 2",
    "inputs": "0",
    "question": "Which?",
    "query": "Which?",
    "context": ["once", "twice"],
    "passage": "Once upon",
    "document": "Once upon",
    "problem": "2 + 2",
    "task": "sum up",
    "history": [["hello", "good day"]],
    "system": "Be kind.",
    "system_prompt": "Be kind.",
    "System Prompt": "Be kind.",
    "systemMessage": "Be kind.",
    "chat-history": "A: hello",
    "messages": [{"role": "user", "content": "Bye"}, {"role": "assistant", "content": "Bye"}],
    "conversation": [{"input": "Bye", "output": None}],
    "dialogue": "A: hello",
    "human": "Hello",
    "user": "Hello",
    "post": "TIFU",
    "previous_turns": [["hello", "good day"]],
    "sourceText": "Once upon",
    "question_1": "Which?",
}


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("record", [PLAIN, CHAT, TURNS, IMPLICIT, {"chosen": [USER, GOOD], "rejected": [USER, BAD]}])
def test_part_of_a_prompt_that_is_not_read_is_refused(write, record: dict, name: str) -> None:
    if name == "system" and record not in (PLAIN, IMPLICIT):  # it is read
        return
    with pytest.raises(DataError, match=rf":1: field '{name}' is not read.*`ignored_fields: \[{name}\]`") as caught:
        read(write, record | {name: PARTS[name]})
    is_missing = "prompt" not in record and record is not TURNS and not name.lower().startswith("system")
    assert (f"`prompt_field: {name}`" in str(caught.value)) == is_missing
    assert read(write, record | {name: PARTS[name]}, ignored_fields=[name]) == read(write, record)


@pytest.mark.parametrize("record", [CHAT, TURNS, {"chosen": [USER, GOOD], "rejected": [USER, BAD]}])
def test_system_prompt_of_messages_is_their_first_turn(write, record: dict) -> None:
    system = {"role": "system", "content": "Be kind."}
    expected = [system, USER]
    assert read(write, record | {"system": "Be kind."}).prompt == expected
    assert read(write, CHAT | {"prompt": expected, "system": "Be kind. "}).prompt == expected
    assert read(write, record | {"system": " "}) == read(write, record)
    assert read(write, record | {"system": "Be kind."}, ignored_fields=["system"]) == read(write, record)
    joined = {"role": "user", "content": "Be kind.\n\nName a colour."}
    assert read(write, CHAT | {"prompt": [joined], "system": "Be kind."}).prompt == [joined]
    with pytest.raises(DataError, match="begins with another system turn than field 'system'"):
        read(write, CHAT | {"prompt": expected, "system": "Be rude."})
    strings = PLAIN | {"system": "Be kind."}
    with pytest.raises(DataError, match="make it part of the prompt, or write the prompt as messages, or, if"):
        read(write, strings)
    assert read(write, strings | {"prompt": [USER]}).prompt == expected


@pytest.mark.parametrize("name", ["turns", "history", "conversation", "messages"])
def test_number_of_turns_is_no_part_of_the_prompt(write, name: str) -> None:
    for record in (PLAIN, CHAT, IMPLICIT):
        assert read(write, record | {name: 2}) == read(write, record)


@pytest.mark.parametrize("name", ["input_id", "prompt_length", "context_type", "system_name", "question_url", "turn"])
def test_names_about_a_prompt_are_no_parts_of_it(write, name: str) -> None:
    assert read(write, PLAIN | {name: "some text"}) == read(write, PLAIN)


def test_part_of_another_kind_is_refused(write, tmp_path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.Table.from_pylist([PLAIN | {"context": b"Once upon"}]), tmp_path / "pairs.parquet")
    with pytest.raises(DataError, match="'context' is not read"):
        list(read_pairs(tmp_path / "pairs.parquet"))


def test_field_that_is_the_prompt_is_named_before_others(write) -> None:
    """The columns of UltraInteract_pair."""
    trajectory = [{"from": "user", "value": USER["content"]}]
    record = {"task": "Coding", "trajectory": trajectory, "chosen": "Red.", "rejected": "Tuesday."}
    with pytest.raises(DataError, match="`prompt_field: trajectory`"):
        read(write, record)
    assert read(write, record, prompt_field="trajectory").prompt == [USER]
    record["task"] = "Sum up."
    with pytest.raises(DataError, match="`prompt_field: trajectory`"):
        read(write, record)
    with pytest.raises(DataError, match=r"`ignored_fields: \[task\]`"):
        read(write, record, prompt_field="trajectory")


@pytest.mark.parametrize(("name", "value"), [("task", "Coding"), ("task", "math_qa"), ("user", "u_1723"), ("human", 7)])
def test_kinds_and_identifiers_are_no_parts_of_the_prompt(write, name: str, value: Any) -> None:
    assert read(write, PLAIN | {name: value}) == read(write, PLAIN)


@pytest.mark.parametrize("empty", [None, "", " \n", [], [[]], {}, [{"role": "user", "content": ""}], True])
def test_empty_part_is_none(write, empty: Any) -> None:
    for record in (PLAIN, CHAT, IMPLICIT):
        assert read(write, record | {"input": empty}) == read(write, record)


@pytest.mark.parametrize(
    ("record", "name", "value"),
    [
        (PLAIN, "question", "Name a colour."),
        (PLAIN, "instruction", " Name\na  colour. "),
        (CHAT, "question", "Name a colour."),
        # the chosen conversation, as in ultrafeedback_binarized
        ({"prompt": USER["content"], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "messages", [USER, GOOD]),
        (CHAT, "conversation", [{"from": "human", "value": USER["content"]}, {"from": "gpt", "value": BAD["content"]}]),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, "question", USER["content"]),
        # by turns, as in distilabel-capybara
        (
            {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
            "conversation",
            [{"input": USER["content"], "output": GOOD["content"]}],
        ),
        (
            {"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, BAD]},
            "messages",
            [USER, GOOD, USER, GOOD],
        ),
        (
            {"prompt": [{"role": "system", "content": "Be kind."}, USER], "chosen": [GOOD], "rejected": [BAD]},
            "system",
            "Be kind.",
        ),
    ],
)
def test_part_that_the_pair_contains_is_fine(write, record: dict, name: str, value: Any) -> None:
    assert read(write, record | {name: value}) == read(write, record)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("question", "Red."),  # an answer is no prompt
        ("question", "Name"),  # stands in it
        ("input", "am"),  # within a word
        ("input", 7),
        ("messages", [USER, {"role": "assistant", "content": "Blue."}]),
    ],
)
def test_containment_is_of_words_in_the_prompt(write, name: str, value: Any) -> None:
    if value == "Name":
        read(write, PLAIN | {name: value})
        return
    with pytest.raises(DataError, match=f"field '{name}' is not read"):
        read(write, PLAIN | {name: value})


def test_words_without_spaces(write) -> None:
    record = {"prompt": "请回答问题你好吗", "chosen": "a", "rejected": "b", "question": "你好"}
    assert read(write, record).prompt == record["prompt"]


def test_prompt_is_named_before_the_system_prompt(write) -> None:
    """The columns of orca_dpo_pairs."""
    record = {"system": "Be kind.", "question": "Name a colour.", "chosen": "Red.", "rejected": "Tuesday."}
    with pytest.raises(DataError, match="`prompt_field: question`"):
        read(write, record)
    with pytest.raises(DataError, match=r"'system' is not read.*make it part of the prompt, or"):
        read(write, record, prompt_field="question")
    record |= {"prompt": [USER], "system_prompt": record["system"], "system": None}
    with pytest.raises(DataError, match=r"'system_prompt' is not read.*make it the first message of the prompt or"):
        read(write, record, ignored_fields=["question"])


def test_tools_of_another_name_are_named(write) -> None:
    for record in (PLAIN, IMPLICIT):
        with pytest.raises(DataError, match=r"'functions' is not read.*call it 'tools'"):
            read(write, record | {"functions": [{"name": "f"}]})


def test_remedies_are_true(write) -> None:
    record = {"question": "Name a colour.", "chosen": "Red.", "rejected": "Tuesday."}
    with pytest.raises(DataError, match="`prompt_field: question`"):
        read(write, record)
    assert read(write, record, prompt_field="question").prompt == "Name a colour."
    both = PLAIN | {"conversations": [{"from": "human", "value": "Hello"}], "chosen": GOOD, "rejected": BAD}
    with pytest.raises(DataError, match="'conversations' and 'prompt' are both there; name the one"):
        read(write, both)
    assert read(write, both, ignored_fields=["prompt"]).prompt == [{"role": "user", "content": "Hello"}]
    assert read(write, both, ignored_fields=["conversations"]).prompt == [USER]


@pytest.mark.parametrize(
    ("options", "record"),
    [
        ({"prompt_field": "promt"}, PLAIN),
        ({"prompt_field": "promt"}, IMPLICIT),
        ({"weight_field": "wieght"}, PLAIN | {"weight": 2.0}),
        ({"conversations_field": "turns"}, TURNS),
        ({"conversations_field": "turns"}, PLAIN),
        ({"conversations_field": "turns", "prompt_field": "question"}, PLAIN),
    ],
)
def test_named_field_must_be_there(write, options: dict, record: dict) -> None:
    name = next(iter(options))
    with pytest.raises(DataError, match=rf":1: field '{options[name]}', which `{name}` names, is missing; the record"):
        read(write, record, **options)


def test_named_fields_of_two_forms(write) -> None:
    options = {"prompt_field": "question", "conversations_field": "dialog"}
    text = {"question": "q", "chosen": "a", "rejected": "b"}
    turns = {"dialog": TURNS["conversations"], "chosen": GOOD, "rejected": BAD}
    path = write("\n".join(map(json.dumps, (text, turns))))
    assert [pair.prompt for pair in read_pairs(path, DataConfig(**options))] == ["q", [USER]]


def test_other_fields_are_reported(write, byte_tokenizer, tmp_path) -> None:
    records = [PLAIN | {"id": 3, "source": "web", "chosen_score": 1.0}, PLAIN | {"id": 4, "margin": None}]
    path = write("\n".join(map(json.dumps, records)))
    report = load_dataset(path, byte_tokenizer, DataConfig()).report
    assert report.unread == {"id": 2, "source": 1, "chosen_score": 1}
    assert "fields not read: chosen_score, id, source" in report.summary()
    pq = pytest.importorskip("pyarrow.parquet")
    pa = pytest.importorskip("pyarrow")
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "pairs.parquet")
    assert load_dataset(tmp_path / "pairs.parquet", byte_tokenizer, DataConfig()).report.unread == report.unread


def test_form_of_ms_swift_is_named(write) -> None:
    record = {"messages": [USER, GOOD], "rejected_response": BAD["content"]}
    with pytest.raises(DataError, match=r"form of ms-swift; write a record with 'prompt', the messages without"):
        read(write, record)
    converted = {"prompt": [USER], "chosen": GOOD, "rejected": BAD["content"]}
    assert read(write, converted) == read(write, CHAT)


def test_ignored_field_that_is_to_be_read_is_refused(write) -> None:
    with pytest.raises(ConfigError, match="ignored_fields must not name fields that are to be read; got chosen"):
        DataConfig(ignored_fields=["chosen", "input"])
    with pytest.raises(ConfigError, match="ignored_fields must not name fields that are to be read; got question"):
        DataConfig(ignored_fields=["question"], prompt_field="question")
    with pytest.raises(
        ConfigError, match=r"ignored_fields must be a list of field names, got 'input'; write \['input'\]"
    ):
        DataConfig(ignored_fields="input")
    pair = read(write, PLAIN | {"weight": 2.0, "tools": [{"name": "f"}]}, ignored_fields=["weight", "tools"])
    assert (pair.weight, pair.tools) == (1.0, None)
