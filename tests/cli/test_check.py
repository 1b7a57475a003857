"""`fastpref check`: what it shows, and that it needs neither weights nor ranks."""

import json
import re
from pathlib import Path

import pytest
from tiny_project import MODEL, write_pairs

from fastpref.run.config.layout import ParallelLayout
from fastpref.run.plan.pipeline import plan_pipeline


def squeezed(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def test_check_shows_the_plan(project: Path, run_cli) -> None:
    result = run_cli("check", "run.yaml")
    assert result.exit_code == 0, result.output
    output = squeezed(result.output)
    for part in (
        "Pair 0: pairs.jsonl:1",
        "prompt (6 tokens, not scored): <|user|>|w0|w1|w2|<|end|>|<|assistant|>",
        "chosen (3 tokens, scored): ⟦w3|w4|<|end|>⟧",
        "rejected (4 tokens, scored): ⟦w5|w6|w7|<|end|>⟧",
        "Pair 1: pairs.jsonl:2",
        "pairs kept 10 of 10 4 of 4",
        "prompt tokens 6-6, mean 6.0, 95% <= 6",
        "rejected tokens 4-4, mean 4.0",
        "tensor 1 0 context 1 0 data 1 0 pipeline 1 0",
        "global batch 4 pairs = 2 per rank x 2 accumulated x 1 data-parallel",
        "steps per epoch 3",
        "total steps 3",
        "run.yaml is valid.",
    ):
        assert part in output, part
    assert "Pair 2" not in output
    assert not (project / "out").exists()


def test_check_reads_headers_and_no_weights(
    project: Path, run_cli, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**MODEL)).save_pretrained(project / "model")
    (project / "model" / "generation_config.json").unlink(missing_ok=True)
    monkeypatch.delattr("fastpref.checkpoint.hf.safe_open")
    settings = f"model={{path: model, tokenizer: {tokenizer_dir}}}"
    assert run_cli("check", "run.yaml", settings).exit_code == 0
    (project / "model" / "model.safetensors").unlink()
    result = run_cli("check", "run.yaml", settings)
    assert result.exit_code == 4
    assert "model: has neither model.safetensors nor its index: found: config.json; download" in squeezed(result.stderr)


def test_check_plans_for_more_ranks_than_are_present(project: Path, run_cli) -> None:
    layout = ["training.tensor_model_parallel_size=2", "training.pipeline_model_parallel_size=2"]
    result = run_cli("check", "run.yaml", *layout, "--world-size", "8")
    output = squeezed(result.output)
    assert "Layout (world size 8)" in output
    assert "tensor 2 0, 1 context 1 0 data 2 0, 2 pipeline 2 0, 4" in output
    assert "global batch 8 pairs = 2 per rank x 2 accumulated x 2 data-parallel" in output
    assert "steps per epoch 2" in output
    fewest = squeezed(run_cli("check", "run.yaml", *layout).output)
    assert "Layout (world size 4)" in fewest


def test_check_shows_what_the_head_costs_the_last_stage(project: Path, run_cli) -> None:
    model = json.dumps({**MODEL, "num_hidden_layers": 6, "vocab_size": 512})
    settings = [f"model.config={model}", "training.pipeline_model_parallel_size=2"]
    even = squeezed(run_cli("check", "run.yaml", *settings).output)
    balanced = squeezed(run_cli("check", "run.yaml", *settings, "training.pipeline_balance=head_cost").output)
    head_layers = float(re.search(r"Pipeline stages \(even\) .* 1 3 (\S+) \d", even)[1])
    # 7 of 32 positions are scored; the head makes its logits twice: 5 passes against a layer's 4
    layer = 2 * 16 * (2 * 16 + 2 * 8 + 3 * 24) + 2 * 16 * 16
    assert head_layers == pytest.approx(2 * 16 * 512 * 7 / 32 * 5 / (4 * layer), abs=0.006)
    share = (3 + head_layers) / (6 + head_layers)
    assert f"1 3 {head_layers:.2f} {share:.1%}" in even
    assert f"waiting for the slowest {1 - 1 / (2 * share):.1%}" in even
    last = plan_pipeline(6, ParallelLayout(pp=2), head_layers).stage_layers[1]
    assert last < 3
    assert re.search(rf"Pipeline stages \(head_cost\) .* 0 {6 - last} .* 1 {last} {head_layers:.2f} ", balanced)
    assert "Pipeline stages" not in run_cli("check", "run.yaml").output


def test_check_shows_what_a_screened_head_takes(project: Path, run_cli) -> None:
    settings = [f"model.config={json.dumps({**MODEL, 'vocab_size': 8192})}", "training.pipeline_model_parallel_size=2"]
    screened = squeezed(run_cli("check", "run.yaml", *settings, "training.head_forward=screened").output)
    # 8192 columns of 16 bytes and a scale, for the policy and its frozen copy
    assert "screened heads, int8 0.3 MiB" in screened
    exact = squeezed(run_cli("check", "run.yaml", *settings).output)
    assert "int8" not in exact
    of_exact, of_screened = (
        float(re.search(r"Pipeline stages \(even\) .* 1 1 (\S+) \d", output)[1]) for output in (exact, screened)
    )
    # two passes forward and three back, of fp32; screened 0.5 + 0.25 and 0.25 of each
    assert of_screened == pytest.approx(of_exact * (2 * 0.75 + 3 * 0.25) / 5, abs=0.02)


def test_check_refuses_what_a_screened_head_cannot_go_back_by(project: Path, run_cli) -> None:
    settings = ["training.head_forward=screened", "training.head_backward=cached"]
    result = run_cli("check", "run.yaml", *settings)
    assert result.exit_code == 2
    assert (
        "training.head_forward screened has the exact logits of active columns only, got head_backward 'cached'"
        in squeezed(result.stderr)
    )


def test_check_refuses_a_world_that_the_layout_does_not_divide(project: Path, run_cli) -> None:
    result = run_cli("check", "run.yaml", "training.tensor_model_parallel_size=2", "--world-size", "3")
    assert result.exit_code == 2
    assert (
        "training.tensor_model_parallel_size = 2 must divide the number of ranks, got 3; start 2 or 4" in result.stderr
    )


def test_check_reports_dropped_and_truncated_pairs(project: Path, run_cli) -> None:
    write_pairs(project / "more.jsonl", 2)
    pair = {"prompt": "w1 w2", "chosen": "w3", "rejected": "w3"}
    with (project / "pairs.jsonl").open("a") as file:
        file.write(json.dumps(pair) + "\n")
        file.write(json.dumps(pair | {"rejected": " ".join(["w4"] * 40)}) + "\n")
    settings = ["data.on_bad_pair=drop", "data.train=[pairs.jsonl, more.jsonl]", "data.boundary=separate"]
    output = squeezed(run_cli("check", "run.yaml", *settings).output)
    assert "pairs kept 13 of 14 4 of 4" in output
    assert "dropped: identical 1 0" in output
    assert "truncated: rejected 1 0" in output


def test_check_shortens_long_pairs(project: Path, run_cli) -> None:
    pair = {"prompt": "w1 " * 60 + "w2", "chosen": "w3 " * 120 + "w4", "rejected": "w5"}
    (project / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    longer = {**MODEL, "max_position_embeddings": 512}
    result = run_cli(
        "check", "run.yaml", "data.max_length=null", f"model.config={json.dumps(longer)}", "data.boundary=separate"
    )
    output = squeezed(result.output)
    assert "prompt (61 tokens, not scored): ... 13 more ... w1" in output
    assert "chosen (122 tokens, scored): ⟦w3|" in output
    assert "... 26 more ... w3|" in output
    assert output.count("w1") == 47


def test_check_escapes_control_characters(project: Path, run_cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import PreTrainedTokenizerFast

    monkeypatch.setattr(PreTrainedTokenizerFast, "decode", lambda self, ids, **_: "\x1b[31m\n")
    output = run_cli("check", "run.yaml").output
    assert "\x1b" not in output
    assert "\\x1b[31m\\n" in output


def test_check_shows_what_padding_costs(project: Path, run_cli) -> None:
    """10 pairs of 6 prompt and 3 and 4 answer tokens in steps of 4, rows padded to multiples of 8."""
    output = squeezed(run_cli("check", "run.yaml").output)
    # two rows of 16 for 8 + 9 tokens; two pairs of a short last step are missing
    assert "padded (this run) 8.0 38.4 55.7%" in output
    packed = ["training.packing=true", "training.prefix_sharing=true", "training.pack_length=48"]
    output = squeezed(run_cli("check", "run.yaml", *packed).output)
    # 17 positions a pair alone, of which two fill a row to 34 of 40; 12 with the prompt shared
    assert "packed 1.7 20.0 15.0%" in output
    assert "packed, prompt shared (this run) 1.0 12.0 0.0%" in output


def test_check_names_a_pair_that_does_not_fit_a_packed_row(project: Path, run_cli) -> None:
    result = run_cli("check", "run.yaml", "training.packing=true", "training.pack_length=16")
    assert result.exit_code == 3
    message = squeezed(result.stderr)
    assert "pairs.jsonl:1: the pair takes 17 positions of a packed row and a row has pack_length=16" in message
    assert "raise pack_length to 24 or more, set prefix_sharing: true, or lower data.max_length" in message
    result = run_cli("check", "run.yaml", "training.packing=true", "training.pack_length=20")
    assert result.exit_code == 2
    assert "pack_length must be a multiple of pad_to_multiple_of=8, got 20" in squeezed(result.stderr)


def test_check_names_the_prompt_that_is_not_read(project: Path, run_cli) -> None:
    record = {"instruction": "w1 w2", "input": "w3", "chosen": "w4 w5", "rejected": "w4 w6", "id": 7}
    (project / "pairs.jsonl").write_text(json.dumps(record) + "\n")
    settings = ["data.boundary=separate"]
    result = run_cli("check", "run.yaml", *settings)
    assert result.exit_code == 3
    assert "`prompt_field: instruction`" in squeezed(result.stderr)
    settings.append("data.prompt_field=instruction")
    assert "field 'input' is not read" in squeezed(run_cli("check", "run.yaml", *settings, "data.eval=[]").stderr)
    settings.append("data.ignored_fields=[input]")
    output = squeezed(run_cli("check", "run.yaml", *settings, "data.eval=[]").output)
    assert "prompt (2 tokens, not scored): w1|w2" in output
    assert "not read: id 1" in output
    mistyped = run_cli("check", "run.yaml", "data.prompt_field=promt")
    assert "field 'promt', which `prompt_field` names, is missing" in squeezed(mistyped.stderr)


def test_check_counts_repeated_prompts(project: Path, run_cli) -> None:
    record = {"prompt": "w1 w2", "chosen": "w1 w2 w4", "rejected": "w1 w2 w6"}
    (project / "pairs.jsonl").write_text(json.dumps(record) + "\n")
    output = squeezed(run_cli("check", "run.yaml", "data.boundary=separate").output)
    assert "repeated prompts: removed 1 0" in output
    assert "chosen (2 tokens, scored): ⟦w4|<|end|>⟧" in output
    output = squeezed(run_cli("check", "run.yaml", "data.boundary=separate", "data.repeated_prompt=keep").output)
    assert "repeated prompts: kept 1 0" in output
    assert "chosen (4 tokens, scored): ⟦w1|w2|w4|<|end|>⟧" in output


def test_check_says_how_to_fetch_a_data_set(project: Path, run_cli) -> None:
    result = run_cli("check", "run.yaml", "data.train=trl-lib/some_set")
    message = squeezed(result.stderr)
    assert "data.train: 'trl-lib/some_set' does not exist" in message
    assert "datasets.load_dataset('trl-lib/some_set', split='train')" in message
    assert "datasets" not in squeezed(run_cli("check", "run.yaml", "data.train=no/pairs.jsonl").stderr)


def test_check_refuses_versions_that_do_not_fit(project, run_cli, tmp_path_factory, monkeypatch) -> None:
    """Before anything is read, and with a way to go on; nothing of them is imported."""
    site = tmp_path_factory.mktemp("site")
    for name, version in (("transformer_engine", "2.11.0"), ("transformer_engine_torch", "2.18.0")):
        folder = site / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(site)
    result = run_cli("check", "run.yaml")
    assert result.exit_code == 2 and "its distributions must be of one version" in result.output
    result = run_cli("check", "run.yaml", "training.transformer_impl=local")
    assert result.exit_code == 0, result.output


def test_check_remarks_on_a_megatron_that_nobody_tried(project, run_cli, tmp_path_factory, monkeypatch) -> None:
    folder = tmp_path_factory.mktemp("site") / "megatron_core-0.99.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: megatron-core\nVersion: 0.99.0\n")
    monkeypatch.syspath_prepend(folder.parent)
    result = run_cli("check", "run.yaml")
    assert result.exit_code == 0 and "megatron-core 0.99.0 is newer than 0.19.2" in result.output.replace("\n", " ")
