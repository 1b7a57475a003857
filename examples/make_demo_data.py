"""Write the demo preference data and its tokenizer: short stories, a question, a right and a wrong answer.

    python examples/make_demo_data.py            # writes examples/data and examples/tokenizer, byte for byte as shipped

- The right answer is in the story and can be checked; the wrong one is the right answer to another story's question.
- Stories come in twos that exchange their answers, so every sentence is preferred exactly as often as it is rejected:
  a model that does not read the prompt cannot beat 50 %.
- No story occurs twice, so the evaluation split shares no prompt with the training split.
- A Llama of 4 layers and 128 channels learns it from random weights in a minute on one CPU core.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

NAMES, COLOURS, OBJECTS, PLACES = (
    words.split()
    for words in (
        "Ada Ben Eva Gus Ian Ivy Kim Leo Max Mia Ned Pia Roy Sam Tom Zoe",
        "red blue green black white pink brown grey",
        "basket bell book bottle coat drum flute hat kite key lamp mirror ring scarf violin watch",
        "lake farm beach castle shop river tower bridge garden forest harbour market",
    )
)
EOS_TOKEN = "<|end|>"
SPECIAL_TOKENS = ["<|pad|>", EOS_TOKEN, "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
VOCAB_SIZE = 448
Story = tuple[str, str, str, str]
"""Name, colour, object, place."""


def write_demo(directory: Path, num_train: int, num_eval: int, seed: int) -> None:
    """Write `data/demo_train.jsonl`, `data/demo_eval.jsonl` and `tokenizer/` below `directory`."""
    generator = random.Random(seed)
    told: set[Story] = set()
    splits = {"train": make_pairs(num_train, generator, told), "eval": make_pairs(num_eval, generator, told)}
    (directory / "data").mkdir(parents=True, exist_ok=True)
    for name, pairs in splits.items():
        lines = "".join(json.dumps(pair) + "\n" for pair in pairs)
        (directory / "data" / f"demo_{name}.jsonl").write_text(lines, encoding="utf-8")
    write_tokenizer(directory / "tokenizer", splits["train"])


def make_pairs(count: int, generator: random.Random, told: set[Story]) -> list[dict]:
    """Make `count` pairs about stories that are not in `told` yet, and add those."""
    if count % 2:
        raise SystemExit(f"the number of pairs must be even, since stories come in twos; got {count}")
    pairs: list[dict] = []
    while len(pairs) < count:
        asked = len(pairs) // 2 % 4
        first, second = twin_stories(asked, generator)
        if first in told or second in told:
            continue
        told |= {first, second}
        pairs += [make_pair(first, second, asked), make_pair(second, first, asked)]
    generator.shuffle(pairs)
    return pairs


def twin_stories(asked: int, generator: random.Random) -> tuple[Story, Story]:
    """Draw two stories that differ in part `asked`; what the question and the answer mention besides is the same."""
    twins = []
    for part, words in enumerate((NAMES, COLOURS, OBJECTS, PLACES)):
        # The question about the object names the person; all the others name the object.
        is_mentioned = part == (0 if asked == 2 else 2)
        twins.append([generator.choice(words)] * 2 if is_mentioned else generator.sample(words, 2))
    first, second = zip(*twins, strict=True)
    return first, second


def make_pair(story: Story, other: Story, asked: int) -> dict:
    """Ask about part `asked` of `story`; the wrong answer is right for `other`."""
    name, colour, thing, place = story
    question = (
        f"Who found the {thing}?",
        f"What colour is the {thing}?",
        f"What did {name} find?",
        f"Where was the {thing}?",
    )[asked]
    prompt = f"{name} found a {colour} {thing} at the {place}. {question}"
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": answer(story, asked)}],
        "rejected": [{"role": "assistant", "content": answer(other, asked)}],
    }


def answer(story: Story, asked: int) -> str:
    """Answer question `asked` about `story` in one sentence."""
    name, colour, thing, place = story
    return (
        f"{name} found the {thing}.",
        f"The {thing} is {colour}.",
        f"{name} found a {thing}.",
        f"The {thing} was at the {place}.",
    )[asked]


def write_tokenizer(directory: Path, pairs: list[dict]) -> None:
    """Train a byte-level BPE tokenizer on the texts of `pairs` and write it with its chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    texts = [pair[side][0]["content"] for pair in pairs for side in ("prompt", "chosen")]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS_TOKEN,
        "model_max_length": 256,
        "pad_token": SPECIAL_TOKENS[0],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    text = json.dumps(settings, indent=2) + "\n"
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")


def main() -> None:
    """Parse the command line and write the files."""
    parser = argparse.ArgumentParser(description="Write the demo preference data and its tokenizer.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="directory to write into")
    parser.add_argument("--num-train", type=int, default=1500, help="training pairs, even")
    parser.add_argument("--num-eval", type=int, default=200, help="evaluation pairs, even")
    parser.add_argument("--seed", type=int, default=0, help="seed of the generator")
    args = parser.parse_args()
    write_demo(args.out, args.num_train, args.num_eval, args.seed)


if __name__ == "__main__":
    main()
