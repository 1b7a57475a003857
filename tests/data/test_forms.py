"""Forms of a pair that published data have beside the plain ones: repeated prompts, strings beside messages, parts."""

import json
from typing import Any

import pytest

from fastpref.data import DataConfig, load_dataset, read_pairs
from fastpref.errors import DataError

SYSTEM = {"role": "system", "content": "Be kind."}
USER = {"role": "user", "content": "Hi"}
GOOD = {"role": "assistant", "content": "Hello."}
BAD = {"role": "assistant", "content": "Go away."}


def read(write, records: list[dict], **options: Any) -> list[tuple]:
    path = write("\n".join(map(json.dumps, records)))
    return [(pair.prompt, pair.chosen, pair.rejected) for pair in read_pairs(path, DataConfig(**options))]


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [
        ("Hi", [GOOD], [BAD]),
        ("Hi", GOOD, BAD),
        ([USER], "Hello.", "Go away."),
        (USER, "Hello.", "Go away."),
        ([USER], GOOD, "Go away."),
        ([USER], [USER, GOOD], [USER, BAD]),
        ("Hi", [USER, GOOD], [USER, BAD]),
        (" Hi\n", [USER, GOOD], [USER, BAD]),
        ([{**USER, "content": "Hi\n", "id": 3}], [USER, GOOD], [{**USER, "id": 4}, BAD]),
        ([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], [GOOD], [BAD]),
        ([{"role": "user", "content": [{"type": "text", "text": "Hi", "image_url": None}]}], [GOOD], [BAD]),
    ],
)
def test_forms_of_one_conversation(write, prompt: Any, chosen: Any, rejected: Any) -> None:
    ((read_prompt, *answers),) = read(write, [{"prompt": prompt, "chosen": chosen, "rejected": rejected}])
    texts = [{"role": turn["role"], "content": turn["content"].strip()} for turn in read_prompt]
    assert (texts, answers) == ([USER], [[GOOD], [BAD]])


@pytest.mark.parametrize(
    ("chosen", "rejected"), [("Hello.", "Go away."), ([USER, GOOD], [USER, BAD]), (GOOD, "Go away.")]
)
def test_sharegpt_answers(write, chosen: Any, rejected: Any) -> None:
    record = {"conversations": [{"from": "human", "value": "Hi"}], "chosen": chosen, "rejected": rejected}
    assert read(write, [record]) == [([USER], [GOOD], [BAD])]


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "match"),
    [
        ([USER], [USER, GOOD], [BAD], "'chosen' begins with turns of the prompt, but not both answers"),
        ([USER], [GOOD], [USER, BAD], "'rejected' begins with turns of the prompt, but not both answers"),
        ([SYSTEM, USER], [USER, GOOD], [USER, BAD], "'chosen' begins with turns of the prompt"),
        ([USER], [SYSTEM, USER, GOOD], [SYSTEM, USER, BAD], "'chosen' begins with turns of the prompt"),
        ("Hi", [USER, GOOD], [BAD], "'prompt' is a string that is no turn"),
        ("Hi", [GOOD], "Go away.", "'chosen' is a list but 'rejected' is a string"),
        ("Hi", "Hello.", [BAD], "'chosen' is a string but 'rejected' is a list"),
        ([{"role": "user", "content": []}], [GOOD], [BAD], r"'prompt\[0\].content' has 0 text parts"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
            *([GOOD], [BAD], r"'prompt\[0\].content' has 2 text parts; join them"),
        ),
        (
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "b"}]}],
            *([GOOD], [BAD], r"has parts of type image; pairs are text only"),
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": "b", "cache": {}}]}],
            *([GOOD], [BAD], r"must have type and text alone"),
        ),
    ],
)
def test_what_has_no_one_meaning_is_refused(write, prompt: Any, chosen: Any, rejected: Any, match: str) -> None:
    with pytest.raises(DataError, match=rf":1: .*{match}"):
        read(write, [{"prompt": prompt, "chosen": chosen, "rejected": rejected}])


OTHER = {"role": "user", "content": "Bye"}


@pytest.mark.parametrize(
    "record",
    [
        {"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, GOOD, OTHER, BAD]},
        {"prompt": [USER], "chosen": [OTHER, GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [SYSTEM, BAD]},
    ],
)
@pytest.mark.parametrize("boundary", ["strict", "common_prefix"])
def test_answer_that_begins_with_another_turn_is_a_bad_pair(write, byte_tokenizer, record: dict, boundary) -> None:
    path = write("\n".join(map(json.dumps, (record, {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}))))
    with pytest.raises(DataError, match=r"begins with a turn of the (user|system) behind the prompt"):
        load_dataset(path, byte_tokenizer, DataConfig(boundary=boundary))
    report = load_dataset(path, byte_tokenizer, DataConfig(boundary=boundary, on_bad_pair="drop")).report
    assert (report.kept, report.dropped) == (1, {"no_answer": 1})


def test_conversations_that_differ_from_the_start_are_named(write, byte_tokenizer) -> None:
    path = write(json.dumps({"chosen": [USER, GOOD], "rejected": [OTHER, BAD]}))
    with pytest.raises(DataError, match="the prompt is empty: chosen and rejected begin with different turns"):
        load_dataset(path, byte_tokenizer, DataConfig())


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("prompt", "Human: Hi"),
        ("prompt", ""),
        ("conversations", [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hm"}]),
    ],
)
def test_prompt_that_conversations_do_not_contain_may_be_ignored(write, name: str, prompt: Any) -> None:
    record = {name: prompt, "chosen": [USER, GOOD], "rejected": [USER, BAD]}
    with pytest.raises(DataError, match=rf"`ignored_fields: \[{name}\]`"):
        read(write, [record])
    assert read(write, [record], ignored_fields=[name]) == [([USER], [GOOD], [BAD])]


def test_form_of_openai_is_named(write) -> None:
    record = {
        "input": {"messages": [USER], "tools": [], "parallel_tool_calls": True},
        "preferred_output": [GOOD],
        "non_preferred_output": [BAD],
    }
    names = {"chosen_field": "preferred_output", "rejected_field": "non_preferred_output"}
    with pytest.raises(DataError, match=r"'input' is an object with 'messages'; make that list the field, and 'tools'"):
        read(write, [record], prompt_field="input", **names)
    assert read(write, [record | {"input": [USER]}], prompt_field="input", **names) == [([USER], [GOOD], [BAD])]


def test_answers_of_which_another_field_says_the_better_are_explained(write) -> None:
    """The columns of PKU-SafeRLHF; a name alone would be no remedy."""
    record = {"prompt": "Q", "response_0": "a", "response_1": "b", "better_response_id": 1}
    with pytest.raises(DataError, match=r"'better_response_id'\]; .*is always the better answer.*says which.*write"):
        read(write, [record])


def test_sharegpt_prompt_that_ends_with_an_answer_is_refused(write) -> None:
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
    with pytest.raises(
        DataError, match="'conversations' ends with an answer, which 'chosen' and 'rejected' would follow"
    ):
        read(write, [{"conversations": turns, "chosen": GOOD, "rejected": BAD}])


def test_conversation_that_ends_with_an_answer_is_no_prompt_of_strings(write) -> None:
    with pytest.raises(DataError, match=r"'messages' ends with an answer.*; remove its last turn"):
        read(write, [{"messages": [USER, GOOD], "chosen": "a", "rejected": "b"}], prompt_field="messages")


def test_members_of_sharegpt_turns_reach_the_template(write) -> None:
    turn = {"from": "human", "value": "Hi", "name": "Ann", "tool_calls": None}
    ((prompt, _, _),) = read(write, [{"conversations": [turn], "chosen": GOOD, "rejected": BAD}])
    assert prompt == [{"role": "user", "content": "Hi", "name": "Ann"}]


@pytest.mark.parametrize("write_list", [json.dumps, repr, lambda value: " " + json.dumps(value, indent=1)])
@pytest.mark.parametrize("name", ["prompt", "chosen", "rejected"])
def test_printed_messages_are_refused(write, write_list, name: str) -> None:
    record = {"prompt": "Q", "chosen": "a", "rejected": "b", name: write_list([USER, GOOD])}
    with pytest.raises(
        DataError, match=f"'{name}' is the text of a message or a list of messages.*; store that itself"
    ):
        read(write, [record])


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


@pytest.mark.parametrize("calls", [[CALL], json.dumps([CALL]), {"type": ["function"], "function": [CALL["function"]]}])
def test_tool_calls_in_every_form_are_a_list(write, calls: Any) -> None:
    turn = {**GOOD, "content": None, "tool_calls": calls}
    ((prompt, _, _),) = read(write, [{"prompt": [USER, turn, USER], "chosen": [GOOD], "rejected": [BAD]}])
    assert prompt[1] == {**GOOD, "content": "", "tool_calls": [CALL]}


@pytest.mark.parametrize("calls", ["add", [json.dumps(CALL)], CALL, 3, "[1"])
def test_tool_calls_of_another_form_are_refused(write, calls: Any) -> None:
    turn = {**GOOD, "tool_calls": calls}
    with pytest.raises(
        DataError, match=r"'prompt\[1\].tool_calls' (must be a list of objects|is a string but not JSON)"
    ):
        read(write, [{"prompt": [USER, turn, USER], "chosen": [GOOD], "rejected": [BAD]}])


@pytest.mark.parametrize("message", [GOOD, {"content": GOOD["content"], "role": "assistant"}])
@pytest.mark.parametrize("write_one", [json.dumps, repr])
def test_printed_message_is_refused_and_other_json_is_not(write, message: dict, write_one) -> None:
    with pytest.raises(DataError, match="'chosen' is the text of a message"):
        read(write, [{"prompt": "Q", "chosen": write_one(message), "rejected": "b"}])


@pytest.mark.parametrize(
    "answer",
    [
        '[{"value": 3}, {"value": 4}]',
        '{"content": "a role: user"}',
        '[{"role": "manager", "name": "Ann"}]',
        '{"model": "m", "messages": [{"role": "user", "content": "a"}]}',
    ],
)
def test_json_that_is_an_answer_is_one(write, answer: str) -> None:
    assert read(write, [{"prompt": "Q", "chosen": answer, "rejected": "b"}]) == [("Q", answer, "b")]


def repeating(prompt: str) -> dict:
    return {"prompt": prompt, "chosen": f"{prompt} yes", "rejected": f"{prompt}\nno"}


@pytest.mark.parametrize("setting", ["auto", "remove"])
def test_repeated_prompt_is_removed(write, byte_tokenizer, setting: str) -> None:
    records = [repeating("Q: x"), repeating("Q: y ")]
    assert read(write, records, repeated_prompt=setting) == [("Q: x", " yes", "\nno"), ("Q: y ", " yes", "\nno")]
    dataset = load_dataset(
        write("\n".join(map(json.dumps, records))), byte_tokenizer, DataConfig(repeated_prompt=setting)
    )
    assert dataset.report.repeated_prompts == {"removed": 2}
    assert "repeated prompts: 2 removed" in dataset.report.summary()
    # as TRL would join them
    assert byte_tokenizer.decode(dataset[0].chosen_input_ids) == "<bos>" + records[0]["chosen"] + "<eos>"


def test_repeated_prompt_is_kept_on_request(write, byte_tokenizer) -> None:
    assert read(write, [repeating("Q")], repeated_prompt="keep") == [("Q", "Q yes", "Q\nno")]
    path = write(json.dumps(repeating("Q")))
    report = load_dataset(path, byte_tokenizer, DataConfig(repeated_prompt="keep")).report
    assert report.repeated_prompts == {"kept": 1}


def test_prompt_repeated_on_one_side_is_reported(write, byte_tokenizer) -> None:
    path = write("\n".join(map(json.dumps, (ONE_SIDE, PLAIN))))
    assert load_dataset(path, byte_tokenizer, DataConfig()).report.repeated_prompts == {"on one side": 1}


PLAIN = {"prompt": "Q", "chosen": "a", "rejected": "b"}
ONE_SIDE = {"prompt": "Q", "chosen": "Q a", "rejected": "b"}


@pytest.mark.parametrize("other", [PLAIN, ONE_SIDE])
@pytest.mark.parametrize("position", [0, 1, 255])
def test_repeated_prompt_is_kept_where_one_of_the_first_records_does_not_repeat_it(write, other, position: int) -> None:
    records = [repeating("Q") for _ in range(300)]
    records[position] = other
    expected = [(record["prompt"], record["chosen"], record["rejected"]) for record in records]
    assert read(write, records) == expected


@pytest.mark.parametrize("other", [PLAIN, ONE_SIDE])
def test_later_record_that_does_not_repeat_the_prompt_is_refused(write, other: dict) -> None:
    records = [repeating("Q") for _ in range(300)]
    records[256] = other
    with pytest.raises(DataError, match=r":257: not both answers begin with the prompt.*`repeated_prompt: keep`"):
        read(write, records)
    assert len(read(write, records, repeated_prompt="keep")) == 300
    with pytest.raises(DataError, match=r":2: not both answers begin with the prompt"):
        read(write, [repeating("Q"), other], repeated_prompt="remove")


def test_only_strings_with_a_prompt_decide(write) -> None:
    found = {"chosen": "Q yes", "rejected": "Q no"}
    chat = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
    pairs = read(write, [found, chat, repeating("Q"), chat, found])
    assert pairs == [
        ("Q", " yes", " no"),
        ([USER], [GOOD], [BAD]),
        ("Q", " yes", "\nno"),
        ([USER], [GOOD], [BAD]),
        ("Q", " yes", " no"),
    ]


def test_every_file_decides_for_itself(write, byte_tokenizer) -> None:
    paths = [write(json.dumps(repeating("Q")), "a.jsonl"), write(json.dumps(PLAIN), "b.jsonl")]
    dataset = load_dataset(paths, byte_tokenizer, DataConfig())
    assert [byte_tokenizer.decode(pair.chosen_input_ids) for pair in dataset] == ["<bos>Q yes<eos>", "<bos>Qa<eos>"]
