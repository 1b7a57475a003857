import builtins
import copy
import json
from collections.abc import Callable

import pytest

from fastpref.data import DataConfig, DataReport, LengthStats, PreferencePair, TokenizedPair, tokenize_pairs
from fastpref.errors import ConfigError, DataError, MissingDependencyError

USER = {"role": "user", "content": "Hi"}
GOOD = {"role": "assistant", "content": "Hello."}
BAD = {"role": "assistant", "content": "Go."}


def make_pair(prompt="ab", chosen="cd", rejected="e", line=1, **fields) -> PreferencePair:
    return PreferencePair(prompt=prompt, chosen=chosen, rejected=rejected, path="pairs.jsonl", line=line, **fields)


def tokenize_one(pair: PreferencePair, tokenizer, **options) -> TokenizedPair:
    (tokenized,), _ = tokenize_pairs([pair], tokenizer, DataConfig(**options))
    return tokenized


def completion(ids: list[int], labels: list[int]) -> list[int]:
    return ids[labels.count(-100) :]


def texts(pair: TokenizedPair, tokenizer) -> tuple[str, str, str]:
    prompt = pair.chosen_input_ids[: pair.num_prompt_tokens]
    assert pair.rejected_input_ids[: pair.num_prompt_tokens] == prompt
    chosen = completion(pair.chosen_input_ids, pair.chosen_labels)
    rejected = completion(pair.rejected_input_ids, pair.rejected_labels)
    return tokenizer.decode(prompt), tokenizer.decode(chosen), tokenizer.decode(rejected)


def test_tokenize_strings_gives_bos_prompt_completion_eos(byte_tokenizer) -> None:
    pair = tokenize_one(make_pair(weight=2.5, line=7), byte_tokenizer)
    ids = {text: byte_tokenizer.convert_tokens_to_ids(text) for text in ("<bos>", "a", "b", "c", "d", "e", "<eos>")}
    assert pair == TokenizedPair(
        pair_id=0,
        chosen_input_ids=[ids["<bos>"], ids["a"], ids["b"], ids["c"], ids["d"], ids["<eos>"]],
        chosen_labels=[-100, -100, -100, ids["c"], ids["d"], ids["<eos>"]],
        rejected_input_ids=[ids["<bos>"], ids["a"], ids["b"], ids["e"], ids["<eos>"]],
        rejected_labels=[-100, -100, -100, ids["e"], ids["<eos>"]],
        weight=2.5,
        source="pairs.jsonl:7",
    )


def test_tokenize_eos_is_appended_once_and_only_when_asked(byte_tokenizer) -> None:
    with_eos = make_pair(chosen="cd<eos>", rejected="e")
    assert texts(tokenize_one(with_eos, byte_tokenizer), byte_tokenizer) == ("<bos>ab", "cd<eos>", "e<eos>")
    plain = tokenize_one(with_eos, byte_tokenizer, append_eos=False)
    assert texts(plain, byte_tokenizer) == ("<bos>ab", "cd<eos>", "e")


def test_tokenize_messages_use_the_chat_template(byte_tokenizer) -> None:
    system = {"role": "system", "content": "S"}
    pair = make_pair([system, USER], [GOOD], [BAD, USER, GOOD])
    assert texts(tokenize_one(pair, byte_tokenizer), byte_tokenizer) == (
        "<|system|>S<eos><|user|>Hi<eos><|assistant|>",
        "Hello.<eos>",
        "Go.<eos><|user|>Hi<eos><|assistant|>Hello.<eos>",
    )


def test_tokenize_template_option_variables_and_tools(byte_tokenizer) -> None:
    template = (
        "{{ greeting }}{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}"
        "{% for message in messages %}|{{ message.content }}{% endfor %}{% if add_generation_prompt %}|{% endif %}"
    )
    pair = make_pair([USER], [GOOD], [BAD], tools=[{"type": "function", "function": {"name": "add"}}])
    options = {"chat_template": template, "chat_template_kwargs": {"greeting": "Dear "}}
    tokenized = tokenize_one(pair, byte_tokenizer, **options)
    assert texts(tokenized, byte_tokenizer) == ("Dear [add]|Hi|", "Hello.", "Go.")


def test_tokenize_keeps_the_order_of_mixed_forms(byte_tokenizer) -> None:
    pairs = [make_pair([USER], [GOOD], [BAD]) if n % 3 else make_pair("ab", str(n), "e") for n in range(300)]
    tokenized, report = tokenize_pairs(pairs, byte_tokenizer, DataConfig())
    assert [pair.pair_id for pair in tokenized] == list(range(300))
    for n, pair in enumerate(tokenized):
        assert texts(pair, byte_tokenizer)[1] == ("Hello.<eos>" if n % 3 else f"{n}<eos>")
    assert report.kept == report.read == 300


def test_tokenize_strict_boundary_refuses_a_merge(merging_tokenizer) -> None:
    with pytest.raises(DataError, match=r"pairs\.jsonl:3: only the first 1 of the prompt's 2 tokens.*merges") as caught:
        tokenize_one(make_pair("ca", "b", "d", line=3), merging_tokenizer)
    assert "boundary: separate" in str(caught.value)
    assert "on_bad_pair: drop" in str(caught.value)


def test_tokenize_common_prefix_boundary_moves_to_the_last_shared_token(merging_tokenizer) -> None:
    pairs = [make_pair("ca", "b", "d"), make_pair("c", "b", "d")]
    tokenized, report = tokenize_pairs(pairs, merging_tokenizer, DataConfig(boundary="common_prefix"))
    assert texts(tokenized[0], merging_tokenizer) == ("c", "ab<eos>", "ad<eos>")
    assert texts(tokenized[1], merging_tokenizer) == ("c", "b<eos>", "d<eos>")
    assert report.boundary_moved == 1


def test_tokenize_separate_boundary_never_merges(merging_tokenizer, byte_tokenizer) -> None:
    pair = tokenize_one(make_pair("ca", "b", "d"), merging_tokenizer, boundary="separate")
    assert texts(pair, merging_tokenizer) == ("ca", "b<eos>", "d<eos>")
    assert len(pair.chosen_input_ids) == 4
    # <bos> begins the prompt, not the completion
    strings = tokenize_one(make_pair(), byte_tokenizer, boundary="separate")
    assert texts(strings, byte_tokenizer) == ("<bos>ab", "cd<eos>", "e<eos>")
    chat = tokenize_one(make_pair([USER], [GOOD], [BAD]), byte_tokenizer, boundary="separate")
    assert texts(chat, byte_tokenizer) == ("<|user|>Hi<eos><|assistant|>", "Hello.<eos>", "Go.<eos>")


@pytest.mark.parametrize("boundary", ["strict", "separate"])
def test_tokenize_template_that_writes_the_prompt_differently_is_a_boundary_error(byte_tokenizer, boundary) -> None:
    template = "{{ messages|length }}{% for message in messages %}{{ message.content }}{% endfor %}"
    with pytest.raises(DataError, match="writes the prompt differently"):
        tokenize_one(make_pair([USER], [GOOD], [BAD]), byte_tokenizer, chat_template=template, boundary=boundary)


def test_tokenize_report_counts_each_cause(byte_tokenizer) -> None:
    config = DataConfig(on_bad_pair="drop", max_length=8, truncation="keep_start")
    pairs = [
        make_pair(),
        make_pair(chosen="e"),
        make_pair(chosen=" "),
        make_pair(prompt=""),
        make_pair(prompt="x" * 7),
        make_pair(prompt="x" * 7, chosen="12345"),
        make_pair(chosen="123456", rejected="12345z"),
        make_pair(chosen="123456", rejected="e"),
    ]
    tokenized, report = tokenize_pairs(pairs, byte_tokenizer, config)
    assert [pair.source for pair in tokenized] == ["pairs.jsonl:1"] * 2
    assert report == DataReport(
        kept=2,
        dropped={"identical": 1, "empty_completion": 1, "empty_prompt": 1, "prompt_too_long": 2, "identical_tokens": 1},
        truncated={"chosen": 1},
        prompt_tokens=LengthStats(min=3, mean=3.0, p95=3, max=3),
        chosen_tokens=LengthStats(min=3, mean=4.0, p95=5, max=5),
        rejected_tokens=LengthStats(min=2, mean=2.0, p95=2, max=2),
    )
    assert report.read == 8
    assert report.summary() == (
        "2 of 8 pairs kept; dropped: 1 empty_completion, 1 empty_prompt, 1 identical, 1 identical_tokens, "
        "2 prompt_too_long; truncated: 1 chosen; longest: 3 prompt + 5 completion tokens"
    )


def test_tokenize_bad_pairs_are_reported_together(byte_tokenizer) -> None:
    pairs = [make_pair(line=1), make_pair(chosen="e", line=2), make_pair(rejected="", line=3)]
    with pytest.raises(DataError) as caught:
        tokenize_pairs(pairs, byte_tokenizer, DataConfig())
    message = str(caught.value)
    assert message.startswith("2 bad records:\npairs.jsonl:2: chosen and rejected are equal")
    assert "pairs.jsonl:3: the rejected completion is empty" in message
    assert (caught.value.path, caught.value.line) == ("pairs.jsonl", 2)


def test_tokenize_stops_at_max_reported(byte_tokenizer) -> None:
    def endless():
        line = 0
        while True:
            line += 1
            yield make_pair(chosen="e", line=line)

    with pytest.raises(DataError, match=r"^the first 4 bad records:") as caught:
        tokenize_pairs(endless(), byte_tokenizer, DataConfig(max_reported=4))
    assert str(caught.value).count("pairs.jsonl:") == 4


def test_tokenize_no_pairs_gives_an_empty_report(byte_tokenizer) -> None:
    assert tokenize_pairs([], byte_tokenizer, DataConfig()) == ([], DataReport())


def test_length_stats_p95_covers_at_least_95_percent() -> None:
    assert LengthStats.of([5]) == LengthStats(min=5, mean=5.0, p95=5, max=5)
    assert LengthStats.of(list(range(1, 101))) == LengthStats(min=1, mean=50.5, p95=95, max=100)
    assert LengthStats.of([3, 1, 2]).p95 == 3


def test_tokenize_messages_without_a_template_are_refused(byte_tokenizer) -> None:
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(
        ConfigError, match=r"pairs\.jsonl:1 is made of messages, but the tokenizer has no chat template"
    ):
        tokenize_one(make_pair([USER], [GOOD], [BAD]), tokenizer)


def test_tokenize_strings_without_an_eos_token_are_refused(byte_tokenizer) -> None:
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match=r"no end-of-sequence token.*append_eos: false"):
        tokenize_one(make_pair(), tokenizer)
    assert tokenize_one(make_pair(), tokenizer, append_eos=False).num_prompt_tokens == 3


def test_tokenize_template_errors_name_the_pair_or_the_template(byte_tokenizer) -> None:
    pair = make_pair([USER], [GOOD], [BAD], line=5)
    with pytest.raises(DataError, match=r"pairs\.jsonl:5: the chat template refuses these messages: no system turn"):
        tokenize_one(pair, byte_tokenizer, chat_template="{{ raise_exception('no system turn') }}")
    with pytest.raises(ConfigError, match=r"not valid Jinja \(its line 2\)"):
        tokenize_one(pair, byte_tokenizer, chat_template="a\n{% for %}")


def test_tokenize_template_without_jinja2_names_the_extra(byte_tokenizer, monkeypatch) -> None:
    def refuse(name: str, *args, original: Callable = builtins.__import__, **kwargs):
        if name == "jinja2":
            raise ImportError("No module named 'jinja2'")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingDependencyError, match=r"fastpref\[hf\]"):
        tokenize_one(make_pair([USER], [GOOD], [BAD]), byte_tokenizer)


def test_tokenize_template_cannot_reach_python(byte_tokenizer) -> None:
    """A template is part of a downloaded tokenizer: it runs in Jinja's sandbox."""
    template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(DataError, match="refuses these messages"):
        tokenize_one(make_pair([USER], [GOOD], [BAD]), byte_tokenizer, chat_template=template)


def test_tokenized_pairs_survive_json(byte_tokenizer) -> None:
    """Ids are plain integers, not numpy or tensor scalars."""
    pair = tokenize_one(make_pair(), byte_tokenizer)
    assert json.loads(json.dumps(pair.chosen_input_ids)) == pair.chosen_input_ids


def test_tokenize_limits_cut_special_tokens_like_any_other(byte_tokenizer) -> None:
    """keep_end takes off <bos> and the system turn; nothing is put back."""
    system = {"role": "system", "content": "S"}
    chat = make_pair([system, USER], [GOOD], [BAD])
    pair = tokenize_one(chat, byte_tokenizer, max_length=11, truncation="keep_end")
    assert texts(pair, byte_tokenizer) == ("Hi<eos><|assistant|>", "Hello.<eos>", "Go.<eos>")
    strings = tokenize_one(make_pair(), byte_tokenizer, max_length=5, truncation="keep_end")
    assert texts(strings, byte_tokenizer) == ("ab", "cd<eos>", "e<eos>")
    strings = tokenize_one(make_pair(), byte_tokenizer, max_length=5)
    assert texts(strings, byte_tokenizer) == ("<bos>ab", "cd", "e<eos>")


def test_tokenize_is_not_bounded_by_the_tokenizers_length(byte_tokenizer) -> None:
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.model_max_length = 4
    assert tokenize_one(make_pair("x" * 20), tokenizer) == tokenize_one(make_pair("x" * 20), byte_tokenizer)
