"""What files of other people contain, from the run file to trained weights: two steps, or the same refusal twice."""

import json
from pathlib import Path

import pytest
import torch
from tiny_project import MODEL, TEMPLATE, WORDS

TOOL_TEMPLATE = (
    "{% if tools %}<|user|>{% for tool in tools %}{% for name in tool.parameters %}{{ name }} "
    "{% endfor %}{% endfor %}<|end|>{% endif %}" + TEMPLATE
)
TWO_STEPS = ("training.max_steps=2", "training.report_to=[]", "data.eval=[]")


def metrics(folder: Path) -> list[dict[str, float]]:
    """What two runs with the same tokens have in common: every metric but those of time."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if not name.startswith(("perf/", "time/", "memory/"))}
        for line in lines
    ]


def trained(run_cli, output: str, *settings: str) -> list[dict[str, float]]:
    """The metrics of two steps that `check` has called valid."""
    checked = run_cli("check", "run.yaml", *settings, *TWO_STEPS)
    assert checked.exit_code == 0, checked.output
    result = run_cli("train", "run.yaml", *settings, *TWO_STEPS, f"training.output_dir={output}")
    assert result.exit_code == 0, result.output
    return metrics(Path(output))


def refused(run_cli, *settings: str) -> str:
    """The message with which both `check` and `train` refuse."""
    checked, started = (run_cli(command, "run.yaml", *settings, *TWO_STEPS) for command in ("check", "train"))
    assert checked.exit_code == started.exit_code != 0, (checked.output, started.output)
    assert checked.stderr.splitlines()[-1] == started.stderr.splitlines()[-1]
    return checked.stderr


def rows(count: int = 4) -> list[dict]:
    """Pairs whose tools have other parameters in each row."""
    return [
        {
            "prompt": [{"role": "user", "content": WORDS[index]}],
            "chosen": [{"role": "assistant", "content": WORDS[index + 1]}],
            "rejected": [{"role": "assistant", "content": WORDS[index + 2]}],
            "tools": [{"name": WORDS[3], "parameters": {WORDS[index + 5]: {"type": "string", "default": None}}}],
        }
        for index in range(count)
    ]


def write_jsonl(path: str, records: list[dict]) -> str:
    Path(path).write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_columns_of_json_train_like_the_lines_they_were_made_from(project: Path, run_cli) -> None:
    datasets = pytest.importorskip("datasets", minversion="4.8")
    lines = write_jsonl("tools.jsonl", rows())
    features = datasets.Features(
        {
            **{side: [{"role": datasets.Value("string"), "content": datasets.Value("string")}] for side in
               ("prompt", "chosen", "rejected")},
            "tools": datasets.Json(),
        }
    )  # fmt: skip
    data = datasets.Dataset.from_list(rows(), features=features)
    data.to_parquet("tools.parquet")
    data.save_to_disk("tools")
    Path("tools.jinja").write_text(TOOL_TEMPLATE)
    runs = [
        trained(run_cli, f"out-{number}", f"data.train={path}", "data.chat_template=tools.jinja")
        for number, path in enumerate((lines, "tools.parquet", "tools"))
    ]
    assert runs[0] == runs[1] == runs[2]
    assert "4 bad records" in (message := refused(run_cli, f"data.train={lines}"))
    assert "tools.jsonl:4: the chat template leaves out the tools" in message


def test_a_template_is_the_same_as_text_and_as_a_file(project: Path, run_cli) -> None:
    lines = write_jsonl("tools.jsonl", rows())
    Path("tools.jinja").write_text(TOOL_TEMPLATE)
    as_file = trained(run_cli, "out-file", f"data.train={lines}", "data.chat_template=tools.jinja")
    as_text = trained(run_cli, "out-text", f"data.train={lines}", f"data.chat_template={json.dumps(TOOL_TEMPLATE)}")
    assert as_file == as_text
    assert "chat_template" in refused(run_cli, "data.chat_template=missing.jinja")


def test_a_column_of_the_prompt_that_is_not_read_is_named(project: Path, run_cli) -> None:
    records = [
        {
            "instruction": f"{WORDS[0]} {WORDS[1]}",
            "input": WORDS[index + 2],
            "chosen": f" {WORDS[4]}",
            "rejected": f" {WORDS[5]}",
        }
        for index in range(4)
    ]
    lines = write_jsonl("alpaca.jsonl", records)
    message = refused(run_cli, f"data.train={lines}", "data.prompt_field=instruction")
    assert "'input'" in message and "ignored_fields" in message
    trained(run_cli, "out-1", f"data.train={lines}", "data.prompt_field=instruction", "data.ignored_fields=[input]")


def test_a_system_column_trains_like_a_system_turn(project: Path, run_cli) -> None:
    system = f"{WORDS[8]} {WORDS[9]}"
    plain = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows()]
    turns = [row | {"prompt": [{"role": "system", "content": system}, *row["prompt"]]} for row in plain]
    as_turn = trained(run_cli, "out-turn", f"data.train={write_jsonl('turns.jsonl', turns)}")
    columns = write_jsonl("columns.jsonl", [row | {"system": system, "turns": 1, "task": "qa"} for row in plain])
    assert trained(run_cli, "out-column", f"data.train={columns}") == as_turn
    assert trained(run_cli, "out-plain", f"data.train={columns}", "data.ignored_fields=[system]") != as_turn


def test_answers_that_repeat_the_prompt_train_without_it(project: Path, run_cli) -> None:
    def pairs(repeated: str) -> list[dict]:
        return [
            {
                "prompt": f"{WORDS[index]} {WORDS[index + 1]}",
                "chosen": f"{repeated.format(WORDS[index], WORDS[index + 1])} {WORDS[6]}",
                "rejected": f"{repeated.format(WORDS[index], WORDS[index + 1])} {WORDS[7]}",
            }
            for index in range(4)
        ]

    plain = trained(run_cli, "out-plain", f"data.train={write_jsonl('plain.jsonl', pairs(''))}")
    repeated = trained(run_cli, "out-repeated", f"data.train={write_jsonl('repeated.jsonl', pairs('{} {}'))}")
    assert repeated == plain


def test_json_lines_named_json_train_like_themselves(project: Path, run_cli) -> None:
    Path("pairs.json").write_text(Path("pairs.jsonl").read_text())
    assert trained(run_cli, "out-json", "data.train=pairs.json") == trained(
        run_cli, "out-jsonl", "data.train=pairs.jsonl"
    )


def test_a_config_with_what_hubs_add_trains_like_the_plain_one(project: Path, run_cli) -> None:
    hub = MODEL | {
        "_name_or_path": "somebody/model",
        "_attn_implementation": "sdpa",
        "_model_name_or_path": "a name",
        "is_llama_config": True,
        "rope_interleaved": False,
        "use_mrope": False,
        "do_sample": True,
        "temperature": 0.6,
        "transformers.js_config": {"dtype": "q4"},
    }
    plain = trained(run_cli, "out-plain")
    assert trained(run_cli, "out-hub", f"model.config={json.dumps(hub)}") == plain
    assert "rope_interleaved" in refused(run_cli, f"model.config={json.dumps(hub | {'rope_interleaved': True})}")


def test_an_adapter_that_changed_its_base_is_refused_by_name(project: Path, run_cli, tokenizer_dir: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    sizes = {name: value for name, value in MODEL.items() if name != "model_type"}
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained("base")
    for kind in (True, "pissa"):
        base = transformers.LlamaForCausalLM.from_pretrained("base")
        settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=kind)
        peft.get_peft_model(base, settings).save_pretrained(f"adapter-{kind}")
    lora = "lora={r: 4, target_modules: [q_proj, v_proj], path: adapter-%s}"
    model = f"model={{path: base, tokenizer: {tokenizer_dir}}}"
    trained(run_cli, "out-plain", model, lora % True)
    message = refused(run_cli, model, lora % "pissa")
    assert "init_lora_weights" in message and "pissa" in message
