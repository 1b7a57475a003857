"""Chat templates: where they come from, and what is said where one does not fit the pairs."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from fastpref.data import (
    DataConfig,
    PreferencePair,
    TokenizedPair,
    load_dataset,
    load_tokenizer,
    tokenize_pairs,
)
from fastpref.data.chat import with_chat_template
from fastpref.errors import ConfigError, DataError

USER = {"role": "user", "content": "Hi"}
GOOD = {"role": "assistant", "content": "Hello."}
BAD = {"role": "assistant", "content": "Go."}
SYSTEM = {"role": "system", "content": "Be kind."}
LINES = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds", "parameters": {}}}


def make_pair(prompt=None, chosen=None, rejected=None, **fields: Any) -> PreferencePair:
    sides = {"prompt": prompt or [USER], "chosen": chosen or [GOOD], "rejected": rejected or [BAD]}
    return PreferencePair(**sides, path="pairs.jsonl", line=3, **fields)


def tokenize_one(pair: PreferencePair, tokenizer: Any, **options: Any) -> TokenizedPair:
    (tokenized,), _ = tokenize_pairs([pair], tokenizer, DataConfig(**options))
    return tokenized


def text_of(pair: TokenizedPair, tokenizer: Any) -> str:
    return tokenizer.decode(pair.chosen_input_ids)


@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_chat_template_may_be_a_file(byte_tokenizer, write, start: str) -> None:
    path = write(start + LINES, "chat.jinja")
    pair = tokenize_one(make_pair(), byte_tokenizer, chat_template=path)
    expected = byte_tokenizer.apply_chat_template([USER, GOOD], chat_template=LINES, tokenize=False)
    assert text_of(pair, byte_tokenizer) == expected == "user: Hi\nassistant: Hello.\n"
    assert pair == tokenize_one(make_pair(), byte_tokenizer, chat_template=LINES)
    assert pair == tokenize_one(make_pair(), byte_tokenizer, chat_template=Path(path))


def test_chat_template_file_that_changes_makes_other_data(byte_tokenizer, write) -> None:
    """A checkpoint records the hash of the data, so that a run does not go on with another template."""
    record = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
    pairs, config = write(json.dumps(record)), DataConfig(chat_template=write(LINES, "chat.jinja"))
    before = load_dataset(pairs, byte_tokenizer, config).sha256
    assert load_dataset(pairs, byte_tokenizer, config).sha256 == before
    write(LINES.replace(":", ">"), "chat.jinja")
    assert load_dataset(pairs, byte_tokenizer, config).sha256 != before


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (None, r"chat_template: '.*chat\.jinja' is no file, .*Jinja markup, \{\{ or \{%.*relative paths start at /"),
        ("", "is empty"),
        (" \n", "is empty"),
        ("Hello", "holds text without Jinja markup"),
        (json.dumps({"chat_template": LINES}), "holds a JSON object; name a file that holds the template's text alone"),
        (b"\xff\xfe{\x00{\x00", "is not UTF-8 at byte 0"),
    ],
)
def test_chat_template_file_without_a_template_is_refused(byte_tokenizer, write, tmp_path, content, match) -> None:
    path = str(tmp_path / "chat.jinja") if content is None else write(content, "chat.jinja")
    with pytest.raises(ConfigError, match=match) as caught:
        tokenize_one(make_pair(), byte_tokenizer, chat_template=path)
    assert [problem.key for problem in caught.value.problems] == ["chat_template"]


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ("{tmp}", "is a directory; name the file in it"),
        ("~/chat.jinja", "is no file.*~ is not expanded"),
        ("x" * 5000, "is no file"),
        ("a\0b", "is no file"),
        ("chatml", "is no file"),
    ],
)
def test_chat_template_that_is_neither_text_nor_file_is_refused(byte_tokenizer, tmp_path, setting, match) -> None:
    with pytest.raises(ConfigError, match=match):
        tokenize_one(make_pair(), byte_tokenizer, chat_template=setting.format(tmp=tmp_path))


@pytest.fixture
def named(byte_tokenizer, tmp_path: Path) -> Any:
    """A tokenizer of several templates, as transformers reads them from a directory."""
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.chat_template = {
        "default": LINES,
        "tool_use": "TOOLS {{ tools[0].function.name }} " + LINES,
        "short": "{{ messages[-1].content }}",
    }
    tokenizer.save_pretrained(tmp_path / "named")
    return load_tokenizer(tmp_path / "named")


def test_named_chat_templates_are_used_as_transformers_does(named) -> None:
    for tools in (None, [TOOL]):
        expected = named.apply_chat_template([USER, GOOD], tools=tools, tokenize=False)
        assert text_of(tokenize_one(make_pair(tools=tools), named), named) == expected
    assert expected.startswith("TOOLS add user: Hi")
    other = tokenize_one(make_pair(tools=None), named, chat_template="X" + LINES)
    assert text_of(other, named) == "Xuser: Hi\nassistant: Hello.\n"
    assert with_chat_template(named, "tool_use").chat_template.startswith("TOOLS")
    assert set(named.chat_template) == {"default", "tool_use", "short"}


def test_named_chat_template_that_is_not_there_lists_the_names(named) -> None:
    with pytest.raises(ConfigError, match="nor one of the tokenizer's templates, 'default', 'short', 'tool_use'"):
        tokenize_one(make_pair(), named, chat_template="tool")
    named.chat_template = {"tool_use": LINES, "short": "{{ messages }}"}
    with pytest.raises(ConfigError, match=r"templates short, tool_use and none called default; set `chat_template`"):
        tokenize_one(make_pair(), named)
    assert tokenize_one(make_pair(), named, chat_template="tool_use")


@pytest.mark.parametrize(
    ("template", "chosen", "rejected", "match"),
    [
        (LINES.replace("content }}", "content | trim }}"), "Yes", "Yes \n", "the white space of 'content' alone"),
        (
            LINES.replace("message.content }}", "message.content.split('</think>')[-1] }}"),
            "<think>a</think>Yes",
            "<think>b</think>Yes",
            "'content': '<think>a</think>Yes' and '<think>b</think>Yes'",
        ),
        (LINES.replace("content }}", "content | lower }}"), "Yes", "yes", "'content': 'Yes' and 'yes'"),
        (LINES.replace("content }}", "content[:3] }}"), "Yes, a", "Yes, b", "'content'"),
    ],
)
def test_template_that_writes_both_sides_alike_is_named(byte_tokenizer, template, chosen, rejected, match) -> None:
    pair = make_pair(chosen=[{**GOOD, "content": chosen}], rejected=[{**GOOD, "content": rejected}])
    with pytest.raises(DataError, match=f"writes chosen and rejected alike, which differ in {match}") as caught:
        tokenize_one(pair, byte_tokenizer, chat_template=template)
    assert "max_length" not in str(caught.value)
    _, report = tokenize_pairs([pair], byte_tokenizer, DataConfig(chat_template=template, on_bad_pair="drop"))
    assert report.dropped == {"identical": 1}


@pytest.mark.parametrize("role", ["Assistant", "gpt", "model"])
def test_role_that_a_template_does_not_know_is_named(byte_tokenizer, role: str) -> None:
    known = LINES.replace("in messages", "in messages if message.role in ('user', 'assistant', 'system', 'tool')")
    sides = [[{"role": role, "content": text}] for text in ("a", "b")]
    with pytest.raises(DataError, match=f"writes chosen and rejected alike.*, or mend the role '{role}'"):
        tokenize_one(make_pair(None, *sides), byte_tokenizer, chat_template=known)
    with pytest.raises(DataError, match=f"leaves out the {role} turn 'a'.*, or mend the role '{role}'"):
        tokenize_one(make_pair([USER, sides[0][0], USER]), byte_tokenizer, chat_template=known)


def test_template_that_reads_no_reasoning_field_is_named(byte_tokenizer) -> None:
    sides = [[{**GOOD, "reasoning_content": text}] for text in ("so", "thus")]
    with pytest.raises(DataError, match=r"alike, which differ in 'reasoning_content': 'so' and 'thus'"):
        tokenize_one(make_pair(None, *sides), byte_tokenizer)


CALL = {"role": "assistant", "content": "", "tool_calls": [TOOL]}
WITHOUT_SYSTEM = LINES.replace("in messages", "in messages if message.role != 'system'")
EVERYTHING = "{{ tools }}" + LINES.replace("{{ message.content", "{{ message }}{{ message.content")


@pytest.mark.parametrize(
    ("pair", "template", "left_out"),
    [
        ({"prompt": [SYSTEM, USER]}, WITHOUT_SYSTEM, "the system turn 'Be kind.'"),
        ({"tools": [TOOL]}, LINES, "the tools"),
        (
            {"prompt": [USER, {**GOOD, "function_call": {"name": "add"}}, USER]},
            *(LINES, "'function_call' of a turn, {'name': 'add'}"),
        ),
        (
            {"prompt": [USER, {**GOOD, "content": "a"}, USER]},
            LINES.replace("content }}", "content[:0] if loop.index == 2 else message.content }}"),
            "the assistant turn 'a'",
        ),
        ({"prompt": [USER, CALL, {"role": "tool", "content": "3"}]}, LINES, "the tool calls of a turn"),
    ],
)
def test_template_that_leaves_something_out_is_named(byte_tokenizer, pair, template, left_out) -> None:
    with pytest.raises(DataError, match=f"the chat template leaves out {left_out}"):
        tokenize_one(make_pair(**pair), byte_tokenizer, chat_template=template)
    assert tokenize_one(make_pair(**pair), byte_tokenizer, chat_template=EVERYTHING)


CALLS = (
    "{% if message.tool_calls %}{{ message.tool_calls[0].function | tojson }}{% else %}{{ message.content }}{% endif %}"
)
FIRST_CALL = LINES.replace("{{ message.content }}", CALLS)


def call(arguments: Any) -> dict:
    return {"type": "function", "function": {"name": "add", "arguments": arguments}}


@pytest.mark.parametrize(
    ("answer", "template", "left_out"),
    [
        ({"content": "Let me add.", "tool_calls": [call({})]}, FIRST_CALL, "the assistant turn 'Let me add.'"),
        ({"tool_calls": [call({"a": 1}), call({"a": 2})]}, FIRST_CALL, "a tool call, {"),
        ({"content": "3", "reasoning_content": "1 + 2"}, LINES, "'reasoning_content' of an answer, '1 \\+ 2'"),
        ({"content": "3", "thinking": "1 + 2"}, LINES, "'thinking' of an answer"),
        (
            {"content": "<think>1 + 2</think>3"},
            LINES.replace(".content }}", ".content.split('</think>')[-1] }}"),
            "the reasoning of an answer, '1 \\+ 2'",
        ),
    ],
)
def test_template_that_leaves_out_a_part_of_an_answer_is_named(byte_tokenizer, answer, template, left_out) -> None:
    sides = [[{**GOOD, "content": "", **answer}], [BAD]]
    for options in ({}, {"boundary": "common_prefix"}):
        with pytest.raises(DataError, match=f"the chat template leaves out {left_out}"):
            tokenize_one(make_pair(None, *sides), byte_tokenizer, chat_template=template, **options)
    everything = LINES.replace("{{ message.content }}", "{{ message }}")
    assert tokenize_one(make_pair(None, *sides), byte_tokenizer, chat_template=everything)


def test_reasoning_of_earlier_turns_may_be_left_out(byte_tokenizer) -> None:
    prompt = [USER, {**GOOD, "reasoning_content": "so"}, USER]
    answer = [{**GOOD, "content": "<think>Hm</think>1"}, USER, {**GOOD, "content": "2"}]
    template = LINES.replace(".content }}", ".content.split('</think>')[-1] }}")
    assert tokenize_one(make_pair(prompt, answer), byte_tokenizer, chat_template=template)


def test_arguments_that_are_json_text_are_written_as_the_template_means_them(byte_tokenizer) -> None:
    """Nowhere as a string of JSON: as the object where the template makes JSON, as they are where it writes text."""
    as_json = LINES.replace("{{ message.content }}", "{{ (message.tool_calls or []) | tojson }}{{ message.content }}")
    written = "content }}{% for call in message.tool_calls %}{{ call.function.arguments }}{% endfor %}"
    as_text = LINES.replace("content }}", written)

    def text(arguments: Any, template: str) -> str:
        pair = make_pair(None, [{**GOOD, "tool_calls": [call(arguments)]}])
        return text_of(tokenize_one(pair, byte_tokenizer, chat_template=template), byte_tokenizer)

    assert text('{"a":  "\u00fc"}', as_json) == text({"a": "\u00fc"}, as_json)
    assert '{"a":  "\u00fc"}' in text('{"a":  "\u00fc"}', as_text)
    with pytest.raises(DataError, match=r"quotes the arguments of a tool call, '\{a: 1\}', .*not JSON"):
        text("{a: 1}", as_json)


def test_template_may_change_what_it_writes(byte_tokenizer) -> None:
    """Trimmed, without the reasoning of earlier turns, and with the system turn in the user's."""
    template = (
        "{% set first = messages[0].content if messages[0].role == 'system' else '' %}"
        "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ first if loop.first }}"
        "{{ m.content.split('</think>')[-1].strip() | upper }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    prompt = [SYSTEM, USER, {"role": "assistant", "content": "<think>Hm</think> Yes? "}, {**USER, "content": " b "}]
    pair = tokenize_one(make_pair(prompt), byte_tokenizer, chat_template=template)
    assert text_of(pair, byte_tokenizer) == "<user>Be kind.HI<assistant>YES?<user>B<assistant>HELLO."


THINKING = LINES.replace("assistant: {% endif", "assistant: <think>\n\n</think>\n\n{% endif")
DEFAULT_SYSTEM = "{% if messages | length > 1 %}system: x\n{% endif %}" + LINES


@pytest.mark.parametrize("boundary", ["strict", "separate"])
@pytest.mark.parametrize(
    ("template", "match", "common_prefix"),
    [
        (THINKING, r"before a completion in its generation prompt: '<think>.*' alone, 'Hello\.", True),
        (DEFAULT_SYSTEM, r"before a completion: 'user: Hi.*' alone, 'system: x", False),
    ],
)
def test_template_that_begins_otherwise_alone(byte_tokenizer, boundary, template, match, common_prefix) -> None:
    with pytest.raises(DataError, match=f"writes the prompt differently alone than {match}") as caught:
        tokenize_one(make_pair(), byte_tokenizer, chat_template=template, boundary=boundary)
    assert "merges" not in str(caught.value)
    assert "set another `chat_template`" in str(caught.value)
    assert "boundary: separate" not in str(caught.value)
    assert ("boundary: common_prefix" in str(caught.value)) == common_prefix
    options = {"chat_template": template, "boundary": "common_prefix"}
    if common_prefix:
        pair = tokenize_one(make_pair(), byte_tokenizer, **options)
        assert byte_tokenizer.decode(pair.chosen_input_ids[pair.num_prompt_tokens :]) == "Hello.\n"
    else:
        with pytest.raises(DataError, match="no token is left for the prompt"):
            tokenize_one(make_pair(), byte_tokenizer, **options)


@pytest.mark.parametrize("boundary", ["strict", "separate", "common_prefix"])
def test_template_without_a_generation_prompt_is_read_as_trl_does(byte_tokenizer, boundary) -> None:
    pair = tokenize_one(make_pair(), byte_tokenizer, chat_template=LINES.split("{% if")[0], boundary=boundary)
    assert byte_tokenizer.decode(pair.chosen_input_ids[: pair.num_prompt_tokens]) == "user: Hi\n"


@pytest.mark.parametrize(
    ("template", "options", "error", "match"),
    [
        ("{{ date.year }}" + LINES, {}, DataError, "'date' is undefined; if it is .* `chat_template_kwargs`"),
        ("{{ 1 // 0 }}", {}, DataError, "refuses these messages: .*zero"),
        ("{{ messages | nothing }}", {}, ConfigError, "not valid Jinja"),
        ("{{ raise_exception('no tool role') }}", {}, DataError, "refuses these messages: no tool role"),
        (LINES, {"enable_thinkng": False}, ConfigError, "reads no 'enable_thinkng'; mend its name"),
        (LINES, {"continue_final_message": True}, ConfigError, "'continue_final_message' is not a variable"),
        (LINES, {"tools": []}, ConfigError, "'tools' is not a variable"),
    ],
)
def test_template_that_cannot_be_rendered_says_why(byte_tokenizer, template, options, error, match) -> None:
    with pytest.raises(error, match=match):
        tokenize_one(make_pair(), byte_tokenizer, chat_template=template, chat_template_kwargs=options)


def test_strings_that_differ_in_the_end_token_alone_are_identical(byte_tokenizer) -> None:
    pair = PreferencePair(prompt="a", chosen="b<eos>", rejected="b", path="pairs.jsonl", line=1)
    with pytest.raises(DataError, match="differ only in '<eos>' at the end"):
        tokenize_one(pair, byte_tokenizer)
    assert tokenize_one(pair, byte_tokenizer, append_eos=False)
