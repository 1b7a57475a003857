"""An export, loaded by transformers and peft, reads, answers and stops as the run trained it."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from gguf import SpecialVocab
from hf_oracle import save
from peft import AutoPeftModelForCausalLM
from served_exports import CHATML, SPECIAL, VOCAB_SIZE, byte_tokenizer, places
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from fastpref.run.config.run_file import load_run_config
from fastpref.run.plan.prepare import prepare

END_OF_TURN = SPECIAL.index("<|im_end|>")
TEMPLATE = "{{ range if range is string }}" + CHATML.replace(
    "assistant\n{% endif %}", "assistant\n{% if not thinks %}<think></think>{% endif %}{% endif %}"
).replace("{{ message.content }}", "{% if message.role == 'assistant' and not thinks %}<think></think>{% endif %}"
          "{{ message.content }}")  # fmt: skip
PAIR = {
    "prompt": [{"role": "user", "content": "Which?"}],
    "chosen": [{"role": "assistant", "content": "This."}],
    "rejected": [{"role": "assistant", "content": "None."}],
}


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model with weights: its tokenizer has no chat template, and it stops at `<|endoftext|>`."""
    torch.manual_seed(5)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "max_position_embeddings": 256}
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, num_attention_heads=2, num_key_value_heads=1, bos_token_id=0, eos_token_id=0, **sizes
    )
    path = save(LlamaForCausalLM(config), tmp_path_factory.mktemp("base"))
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def chat_project(project: Path, base_model: Path) -> Path:
    (project / "pairs.jsonl").write_text(2 * (json.dumps(PAIR) + "\n"))
    (project / "run.yaml").write_text(f"""
model: {{path: {base_model}}}
data:
  train: pairs.jsonl
  max_length: 128
  chat_template: {json.dumps(TEMPLATE)}
  chat_template_kwargs: {{thinks: false}}
training:
  output_dir: out
  per_device_train_batch_size: 2
  learning_rate: 1e-2
  max_steps: 2
  report_to: []
  disable_progress: true
""")
    return project


def trained_ids() -> tuple[list[int], list[int]]:
    """Ids of the first pair's prompt and chosen answer, as the trainer got them."""
    pair = prepare(load_run_config("run.yaml", ["training.output_dir=new"])).train[0]
    return pair.chosen_input_ids[: pair.num_prompt_tokens], pair.chosen_input_ids[pair.num_prompt_tokens :]


def assert_reads_and_stops_as_trained(directory: Path, model: torch.nn.Module, **settings) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    prompt, answer = trained_ids()
    inputs = tokenizer.apply_chat_template(
        PAIR["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert inputs["input_ids"].tolist() == [prompt]
    whole = tokenizer.apply_chat_template(PAIR["prompt"] + PAIR["chosen"], return_dict=True)
    assert whole["input_ids"] == prompt + answer
    # a model that has learnt this answer, and would say it again and again
    script = iter([*answer, *answer])
    model.get_output_embeddings().register_forward_hook(
        lambda _, __, logits: torch.nn.functional.one_hot(torch.tensor([[next(script)]]), VOCAB_SIZE) * 9.0
    )
    generated = model.generate(**inputs, max_new_tokens=40, do_sample=False, pad_token_id=3, **settings)[0].tolist()
    assert generated == prompt + answer[: answer.index(END_OF_TURN) + 1]


def test_whole_model(chat_project: Path, base_model: Path, run_cli) -> None:
    result = run_cli("train", "run.yaml", "--export", "model")
    assert result.exit_code == 0, result.output
    assert run_cli("export", "run.yaml", "--output", "again").exit_code == 0
    files = [{file.name: file.read_bytes() for file in (chat_project / name).iterdir()} for name in ("model", "again")]
    assert files[0] == files[1]
    assert files[0]["tokenizer.json"] == (base_model / "tokenizer.json").read_bytes()
    served = AutoTokenizer.from_pretrained(chat_project / "model").chat_template
    assert places(chat_project / "model") == [served, served]
    # as llama.cpp's converter reads the directory
    assert SpecialVocab(chat_project / "model", load_merges=False).chat_template == served
    model = AutoModelForCausalLM.from_pretrained(chat_project / "model")
    assert_reads_and_stops_as_trained(chat_project / "model", model)


def test_adapter_and_merged_model(chat_project: Path, base_model: Path, run_cli, monkeypatch) -> None:
    shutil.copytree(base_model, chat_project / "base")
    run = ("run.yaml", "model.path=base", "lora={r: 2, lora_alpha: 4}")
    with pytest.warns(UserWarning, match="answers end in token 0 or 2, of which generation_config.json of base lacks"):
        assert run_cli("train", *run, "--export", "adapter").exit_code == 0
    assert run_cli("export", *run, "--output", "merged", "--merge").exit_code == 0
    merged = AutoModelForCausalLM.from_pretrained(chat_project / "merged")
    # the base is found from any directory
    (chat_project / "elsewhere").mkdir()
    with monkeypatch.context() as patch:
        patch.chdir(chat_project / "elsewhere")
        adapted = AutoPeftModelForCausalLM.from_pretrained(chat_project / "adapter")
    ids = torch.arange(24)[None]
    torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-5)
    ends = GenerationConfig.from_pretrained(chat_project / "adapter")
    assert_reads_and_stops_as_trained(chat_project / "adapter", adapted, generation_config=ends)
    assert_reads_and_stops_as_trained(chat_project / "merged", merged)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("out", "is, or holds, that of training.output_dir"),
        (".", "exists and is not empty"),
        ("out/checkpoints/step-2", "lies among the checkpoints of the run"),
        ("runs/..//out/", "is, or holds, that of training.output_dir"),
        ("run.yaml/model", "cannot be made"),
        ("~/model", "begins with ~"),
    ],
)
def test_directory_that_the_end_would_refuse_is_refused_at_the_beginning(
    chat_project: Path, run_cli, output: str, message: str
) -> None:
    for arguments in (("train", "run.yaml", "--export", output), ("export", "run.yaml", "--output", output)):
        result = run_cli(*arguments)
        assert result.exit_code == 2, result.output
        assert message in re.sub(r"\s+", " ", result.stderr)
    assert not (chat_project / "out").exists()


def test_directory_around_that_of_the_run_is_refused(chat_project: Path, run_cli) -> None:
    result = run_cli("train", "run.yaml", "training.output_dir=runs/a", "--export", "runs")
    assert result.exit_code == 2 and "is, or holds, that of training.output_dir" in re.sub(r"\s+", " ", result.stderr)


def test_what_cannot_be_served_is_refused_before_training(chat_project: Path, run_cli) -> None:
    result = run_cli("train", "run.yaml", "data.chat_template_kwargs={range: all}", "--export", "model")
    assert result.exit_code == 2, result.output
    assert "range cannot be written into the chat template for an export" in re.sub(r"\s+", " ", result.stderr)
    assert not (chat_project / "out" / "metrics.jsonl").exists() and not (chat_project / "model").exists()


@pytest.fixture
def trained_project(chat_project: Path, base_model: Path, run_cli) -> Path:
    """A run that is done, with a tokenizer and a template of its own directory."""
    byte_tokenizer(chat_template=CHATML).save_pretrained(chat_project / "tokenizer")
    (chat_project / "run.jinja").write_text(TEMPLATE)
    run = (chat_project / "run.yaml").read_text()
    run = run.replace(f"{{path: {base_model}}}", f"{{path: {base_model}, tokenizer: tokenizer}}")
    run = re.sub(r"  chat_template: .*", "  chat_template: run.jinja", run).replace("max_steps: 2", "max_steps: 1")
    (chat_project / "run.yaml").write_text(run)
    result = run_cli("train", "run.yaml")
    assert result.exit_code == 0, result.output
    return chat_project


def tokenizer_with_a_new_word() -> None:
    tokenizer = AutoTokenizer.from_pretrained("tokenizer")
    tokenizer.add_tokens(["Which"])
    tokenizer.save_pretrained("tokenizer")


def tokenizer_with_another_end() -> None:
    byte_tokenizer("<|im_end|>", chat_template=CHATML).save_pretrained("tokenizer")


@pytest.mark.parametrize(
    ("edit", "settings", "changed"),
    [
        (lambda: Path("run.jinja").write_text(TEMPLATE + " "), (), "data.chat_template"),
        (None, ("data.chat_template=null",), "data.chat_template"),
        (None, ("data.chat_template_kwargs={thinks: true}",), "data.chat_template_kwargs"),
        (tokenizer_with_a_new_word, (), "model.tokenizer"),
        (tokenizer_with_another_end, (), "model.tokenizer"),
        (lambda: Path("tokenizer/chat_template.jinja").write_text("{{ messages }}"), (), ""),  # which is not used
        (lambda: Path("run.jinja").rename("moved.jinja"), ("data.chat_template=moved.jinja",), ""),
        (None, ("data.append_eos=false",), ""),  # no pair is made of strings
    ],
)
def test_text_that_was_not_trained_is_not_served(trained_project: Path, run_cli, edit, settings, changed: str) -> None:
    if edit is not None:
        edit()
    result = run_cli("export", "run.yaml", "--output", "model", *settings)
    if changed:
        assert result.exit_code == 4
        assert f"trained with another value or file of {changed}, so that" in re.sub(r"\s+", " ", result.stderr)
    else:
        assert result.exit_code == 0, result.output


def test_template_that_wrote_no_pair_may_change(trained_project: Path, run_cli) -> None:
    pair = {"prompt": "Which?", "chosen": " This.", "rejected": " None."}
    Path("pairs.jsonl").write_text(json.dumps(pair) + "\n" + json.dumps(pair | {"chosen": " All."}) + "\n")
    run = ("run.yaml", "training.output_dir=strings", "data.chat_template=null", "data.chat_template_kwargs={}")
    assert run_cli("train", *run).exit_code == 0
    Path("tokenizer/chat_template.jinja").write_text(TEMPLATE)
    assert run_cli("export", *run, "--output", "model").exit_code == 0
    result = run_cli("export", *run, "--output", "other", "data.append_eos=false")
    assert result.exit_code == 4 and "data.append_eos" in result.stderr
