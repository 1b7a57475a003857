"""A completion on its own is tokenised as the text goes on at inference, whatever a tokenizer puts in front of texts.

The oracle is the text: prompt and completion tokens together decode to it, and where the whole text's tokens begin with
the prompt's, the completion's are the rest of them.
"""

import copy
import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from fastpref.data import DataConfig, PreferencePair, TokenizedPair, load_tokenizer, tokenize_pairs
from fastpref.errors import ConfigError, DataError

SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
WORDS = ["Answer", ":", "Yes", "No", "sir", "yes", "it", "is", "not", "12", "ab"]
PROMPTS = ["Answer:\n", "Answer: ", "Answer:", "Answer: a", " Answer:\n\n", "ab", "Answer: 1"]
COMPLETIONS = ["Yes", " Yes, sir", "  Yes", "\nYes it is", "b", "2 is", "Yes</s><|user|>No: it<|assistant|>Yes"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def wrap(backend: Tokenizer, **fields: Any) -> transformers.PreTrainedTokenizerFast:
    settings = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"} | fields
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE, **settings)


def add_special(backend: Tokenizer) -> Tokenizer:
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return backend


def pieces(words: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges that build each word from its characters, from the left, after the 256 bytes."""
    alphabet = sorted({character for word in words for character in word})
    vocab = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *alphabet]
    merges: list[tuple[str, str]] = []
    for word in words:
        for end in range(1, len(word)):
            if (word[:end], word[end]) not in merges:
                merges.append((word[:end], word[end]))
                vocab.append(word[: end + 1])
    return {token: index for index, token in enumerate(dict.fromkeys(vocab))}, merges


def sentencepiece(normalizer: Any, pre_tokenizer: Any) -> transformers.PreTrainedTokenizerFast:
    """Llama's kind of tokenizer: spaces are letters, unknown characters fall back to bytes."""
    vocab, merges = pieces([*("▁" + word for word in WORDS), *WORDS, "▁▁"])
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizer
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrap(add_special(backend))


def unigram(normalizer: Any, scheme: str) -> transformers.PreTrainedTokenizerFast:
    vocab, _ = pieces([*("▁" + word for word in WORDS), *WORDS])
    backend = Tokenizer(models.Unigram([(token, -float(index)) for token, index in vocab.items()], 0, True))
    backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizers.Metaspace("▁", scheme)
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace("▁", scheme)])
    return wrap(add_special(backend))


def byte_level(*, add_prefix_space: bool, in_sequence: bool = False) -> transformers.PreTrainedTokenizerFast:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    merges = [("a", "b"), ("Y", "e"), ("Ye", "s"), ("Ġ", "Yes"), ("Ġ", "a"), ("1", "2")]
    vocab = [*SPECIAL, *sorted(alphabet), *(left + right for left, right in merges)]
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(vocab)}, merges))
    last = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=not in_sequence)
    split = pre_tokenizers.Split(Regex(r"\d"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, last]) if in_sequence else last
    backend.decoder = decoders.ByteLevel()
    return wrap(add_special(backend))


def prepend_then_replace() -> Any:
    return normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


EXACT = {
    "llama-2": lambda: sentencepiece(prepend_then_replace(), None),
    "mistral": lambda: sentencepiece(None, pre_tokenizers.Metaspace("▁", "first", split=False)),
    "llama-legacy": lambda: sentencepiece(None, pre_tokenizers.Metaspace("▁", "always", split=False)),
    "gemma": lambda: sentencepiece(normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous")),
    "prepend alone": lambda: sentencepiece(
        normalizers.Prepend("▁"), pre_tokenizers.Metaspace("▁", "never", split=False)
    ),
    "unigram always": lambda: unigram(None, "always"),
    "unigram first, nested": lambda: unigram(
        normalizers.Sequence([normalizers.Sequence([normalizers.NFKC()]), normalizers.Replace("\r", "")]), "first"
    ),
    "gpt-2": lambda: byte_level(add_prefix_space=False),
    "roberta": lambda: byte_level(add_prefix_space=True),
    "left strip": lambda: sentencepiece(
        normalizers.Sequence([normalizers.Strip(left=True, right=False), prepend_then_replace()]), None
    ),
    "prefix space in a sequence": lambda: byte_level(add_prefix_space=True, in_sequence=True),
}


@pytest.fixture(scope="module", params=EXACT)
def exact(request: pytest.FixtureRequest) -> transformers.PreTrainedTokenizerFast:
    return EXACT[request.param]()


def make_pair(prompt: Any, chosen: Any, rejected: Any) -> PreferencePair:
    return PreferencePair(prompt=prompt, chosen=chosen, rejected=rejected, path="pairs.jsonl", line=1)


def tokenize_one(pair: PreferencePair, tokenizer: Any, **options: Any) -> TokenizedPair:
    (tokenized,), _ = tokenize_pairs([pair], tokenizer, DataConfig(max_length=None, **options))
    return tokenized


def text_of(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def test_separate_completion_reads_as_the_text_goes_on(exact) -> None:
    texts = list(product(PROMPTS, COMPLETIONS))
    pairs = [make_pair(prompt, completion, "???") for prompt, completion in texts]
    config = DataConfig(max_length=None, boundary="separate", append_eos=False)
    tokenized, report = tokenize_pairs(pairs, exact, config)
    assert report.kept == len(texts)
    for (prompt, completion), pair in zip(texts, tokenized, strict=True):
        alone = exact(prompt)["input_ids"]
        whole = exact(prompt + completion)["input_ids"]
        assert pair.chosen_input_ids[: pair.num_prompt_tokens] == alone
        assert text_of(exact, pair.chosen_input_ids) == text_of(exact, whole)
        if whole[: len(alone)] == alone:
            assert pair.chosen_input_ids == whole


def test_separate_completion_has_no_space_of_its_own(exact) -> None:
    """The prompt ends in the middle of a word, so that no tokenisation of the whole text is at hand."""
    pair = tokenize_one(make_pair("Answer: a", "b", "Yes"), exact, boundary="separate")
    rest = pair.chosen_input_ids[pair.num_prompt_tokens :]
    assert rest == [exact.convert_tokens_to_ids("b"), exact.eos_token_id]


def test_separate_messages_read_as_the_text_goes_on(exact) -> None:
    messages = [{"role": "user", "content": "Answer: 1"}]
    chosen = [{"role": "assistant", "content": "Yes, sir"}, *messages, {"role": "assistant", "content": "No"}]
    rejected = [{"role": "assistant", "content": "  No"}]
    pair = tokenize_one(make_pair(messages, chosen, rejected), exact, boundary="separate")
    for ids, side in ((pair.chosen_input_ids, chosen), (pair.rejected_input_ids, rejected)):
        text = exact.apply_chat_template(messages + side, tokenize=False)
        assert ids == exact(text, add_special_tokens=False)["input_ids"]
    assert pair.chosen_input_ids.count(exact.bos_token_id) == 1


def test_texts_are_cut_and_padded_by_no_setting_of_the_file(tmp_path: Path) -> None:
    tokenizer = EXACT["llama-2"]()
    tokenizer.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "tokenizer.json").read_text())
    stored["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    stored["padding"] = {"strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": None} | {
        "pad_id": 2,
        "pad_type_id": 0,
        "pad_token": "</s>",
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    loaded = load_tokenizer(tmp_path)
    for boundary in ("strict", "separate"):
        pair = make_pair("Answer:\n", "Yes it is not", "No, sir")
        assert tokenize_one(pair, loaded, boundary=boundary) == tokenize_one(pair, tokenizer, boundary=boundary)
    merged = make_pair("Answer: a", "b is not it", "Yes it is")
    assert tokenize_one(merged, loaded, boundary="separate") == tokenize_one(merged, tokenizer, boundary="separate")


def words_only() -> Any:
    """T5's and XLM-R's older form: spaces only cut words apart, each word gets its own."""
    tokenizer = unigram(None, "always")
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace("▁", "always")]
    )
    return wrap(backend)


def anchored() -> Any:
    """A dummy prefix under another name."""
    return sentencepiece(
        normalizers.Sequence([normalizers.Replace(Regex("^"), " "), normalizers.Replace(" ", "▁")]), None
    )


def wordpiece() -> Any:
    tokens = [*SPECIAL, "answer", ":", "yes", "ab", "##b", "a", "b", "it", "is", "?"]
    backend = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return wrap(add_special(backend))


def squeezing() -> Any:
    return sentencepiece(normalizers.Sequence([normalizers.Replace(Regex(" {2,}"), " "), prepend_then_replace()]), None)


@pytest.mark.parametrize(
    ("build", "prompt", "chosen"),
    [
        (squeezing, "Answer: ", " Yes"),
        (words_only, "Answer: a", "b it is"),
        (anchored, "Answer: a", "b"),
        (wordpiece, "answer: a", "b"),
    ],
)
def test_separate_is_refused_by_name_where_a_tokenizer_changes_the_text(build: Any, prompt: str, chosen: str) -> None:
    tokenizer = build()
    with pytest.raises(DataError, match=rf"the tokenizer {type(tokenizer).__name__} cannot go on behind this prompt"):
        tokenize_one(make_pair(prompt, chosen, "?"), tokenizer, boundary="separate")


def test_separate_keeps_words_that_are_unknown_only_together() -> None:
    words = [*SPECIAL, "Answer", "Yes"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = wrap(add_special(backend))
    pair = tokenize_one(make_pair("Answer", "Yes", "Answer"), tokenizer, boundary="separate", append_eos=False)
    assert pair.chosen_input_ids == tokenizer("Answer Yes")["input_ids"]


@pytest.mark.parametrize("name", ["llama-2", "roberta", "words_only", "wordpiece"])
@pytest.mark.parametrize("pair", [("Answer: a", "b it is", "yes"), ("Answer: ", "Yes", "No"), ("a", "b", "a")])
def test_strict_boundary_recommends_what_helps(name: str, pair: tuple[str, str, str]) -> None:
    tokenizer = EXACT[name]() if name in EXACT else {"words_only": words_only, "wordpiece": wordpiece}[name]()
    prompt, *sides = pair
    try:
        tokenize_one(make_pair(*pair), tokenizer)
    except DataError as error:
        message = str(error)
    else:
        return
    for boundary in ("separate", "common_prefix"):
        if f"boundary: {boundary}" in message:
            assert tokenize_one(make_pair(*pair), tokenizer, boundary=boundary)
        else:
            with pytest.raises(DataError):
                tokenize_one(make_pair(*pair), tokenizer, boundary=boundary)
    if "move the white space" in message:
        moved = make_pair(prompt.rstrip(), *(prompt[len(prompt.rstrip()) :] + side for side in sides))
        assert tokenize_one(moved, tokenizer)


def test_prompt_that_spells_out_the_first_token_gets_no_second_one(exact) -> None:
    pair = tokenize_one(make_pair("<s>Answer:\n", "Yes", "No"), exact)
    assert pair.chosen_input_ids.count(exact.bos_token_id) == 1
    assert pair.chosen_input_ids[:-1] == exact("<s>Answer:\nYes", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("append_eos", [True, False])
def test_tokenizer_that_ends_texts_itself_gives_one_end(append_eos: bool) -> None:
    tokenizer = byte_level(add_prefix_space=False)
    plain = tokenize_one(make_pair("Answer:", " Yes", " No"), tokenizer, append_eos=append_eos)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    for boundary in ("strict", "common_prefix", "separate"):
        pair = tokenize_one(make_pair("Answer:", " Yes", " No"), tokenizer, append_eos=append_eos, boundary=boundary)
        assert pair == plain
        assert pair.chosen_input_ids.count(2) == append_eos


def test_tokenizer_that_ends_texts_in_another_token_is_refused() -> None:
    tokenizer = byte_level(add_prefix_space=False)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <|user|>", special_tokens=[("<s>", 1), ("<|user|>", 3)]
    )
    with pytest.raises(ConfigError, match=r"ends every text in '<\|user\|>'.*post-processor"):
        tokenize_one(make_pair("Answer:", " Yes", " No"), tokenizer)


@pytest.mark.parametrize("change", ["split_special_tokens", "single_word"])
def test_appended_end_is_the_token_and_not_its_letters(change: str) -> None:
    if change == "split_special_tokens":
        tokenizer = wrap(byte_level(add_prefix_space=False).backend_tokenizer, split_special_tokens=True)
    else:
        backend = byte_level(add_prefix_space=False).backend_tokenizer
        stored = json.loads(backend.to_str())
        next(token for token in stored["added_tokens"] if token["content"] == "</s>")["single_word"] = True
        tokenizer = wrap(Tokenizer.from_str(json.dumps(stored)))
        assert tokenizer("a</s>")["input_ids"][-1] != 2, "the case has to be one"
    pair = tokenize_one(make_pair("Answer:", " ab", " No</s>"), tokenizer)
    assert pair.chosen_input_ids[-2:] == [tokenizer.convert_tokens_to_ids("ab"), 2]
    assert pair.rejected_input_ids[-1] == 2
    assert text_of(tokenizer, pair.rejected_input_ids) == "<s>Answer: No</s>"


@pytest.mark.parametrize("unknown", [True, False])
def test_end_that_is_not_in_the_vocabulary_is_refused(unknown: bool) -> None:
    tokenizer = wordpiece() if unknown else byte_level(add_prefix_space=False)
    tokenizer.eos_token = "[END]"
    with pytest.raises(ConfigError, match=r"'\[END\]' is not in its vocabulary.*append_eos: false"):
        tokenize_one(make_pair("answer", " yes", " it"), tokenizer)
    assert tokenize_one(make_pair("answer", " yes", " it"), tokenizer, append_eos=False)


def test_chat_template_whose_special_tokens_are_cut_into_pieces_is_refused() -> None:
    tokenizer = wrap(byte_level(add_prefix_space=False).backend_tokenizer, split_special_tokens=True)
    sides = [[{"role": "assistant", "content": text}] for text in ("Yes", "No")]
    with pytest.raises(ConfigError, match=r"cuts the special token .* into pieces.*split_special_tokens"):
        tokenize_one(make_pair([{"role": "user", "content": "ab"}], *sides), tokenizer)


def test_tokenizer_of_the_caller_is_left_as_it_is(exact) -> None:
    before = exact.backend_tokenizer.to_str()
    tokenize_one(make_pair("Answer: a", "b", "Yes"), exact, boundary="separate", chat_template="{{ messages }}")
    assert exact.backend_tokenizer.to_str() == before
    assert exact.chat_template == TEMPLATE
