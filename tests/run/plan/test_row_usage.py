"""What `check` says about rows against what a run logs that lays them out."""

import json
from pathlib import Path

import pytest
import torch
from tiny_project import MODEL

from fastpref.data import Segment, Segments
from fastpref.run.config.run_file import load_run_config
from fastpref.run.plan import preview
from fastpref.run.plan.prepare import prepare
from fastpref.run.plan.row_usage import KINDS, row_usages
from fastpref.trainer import TrainingArguments, build_models, initialize_megatron, save_hf
from fastpref.trainer.model.packing import install_packing, packed_row
from fastpref.trainer.ranks.platform import destroy

SETTINGS = {
    "padded": (),
    "packed": ("training.packing=true", "training.pack_length=48"),
    "packed, prompt shared": ("training.packing=true", "training.prefix_sharing=true"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_row_usages_are_what_a_run_logs(project: Path, run_cli, kind: str) -> None:
    lines = [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()]
    for index, line in enumerate(lines):
        line["prompt"][0]["content"] += " w9" * (5 * index % 7)
        line["chosen"][0]["content"] += " w8" * (3 * index % 5)
    Path("pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    overrides = (*SETTINGS[kind], "training.logging_steps=3")
    (usage,) = (usage for usage in row_usages(prepare(load_run_config("run.yaml", overrides))) if usage.is_used)
    assert usage.kind == kind
    assert run_cli("train", "run.yaml", *overrides).exit_code == 0
    record = json.loads((project / "out" / "metrics.jsonl").read_text().splitlines()[0])
    assert record["step"] == 3
    assert usage.padding_fraction == pytest.approx(record["perf/padding_fraction"], rel=1e-9)
    assert usage.positions_per_pair == pytest.approx(record["perf/positions_per_pair"], rel=1e-9)


def test_row_usages_leave_out_rows_that_pairs_do_not_fit(project: Path) -> None:
    overrides = ("training.packing=true", "training.prefix_sharing=true", "training.pack_length=16")
    usages = row_usages(prepare(load_run_config("run.yaml", overrides)))
    # 12 positions with the prompt shared, 17 without
    assert [usage.kind for usage in usages] == ["padded", "packed, prompt shared"]


def test_row_usages_count_what_a_layout_fills_rows_up_with(project: Path) -> None:
    """Three ranks share rows whose length is a multiple of 6, after the data's multiple of 8."""
    run = prepare(load_run_config("run.yaml", ("training.context_parallel_size=3",)), world_size=3)
    assert [run.row_length(positions) for positions in (1, 16, 24, 25)] == [12, 18, 24, 36]
    assert preview.longest_row(run) % 6 == preview.microbatch_positions(run) % 6 == 0
    for usage in row_usages(run):
        assert round(usage.positions_per_pair * len(run.train)) % 6 == 0


def kept_bytes(config: dict, segments: Segments) -> int:
    """Bytes that autograd keeps of a packed row for the backward pass of the layers, parameters aside."""
    (model,) = build_models(config, seed=0)
    install_packing([model], prefix_sharing=segments.shares_prefixes)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    ids = torch.zeros(1, segments.length, dtype=torch.int64)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, packed_row(model, segments, ids.device) as params:
        output = model.decoder(
            hidden_states=model.embedding(ids, ids),
            attention_mask=None,
            rotary_pos_emb=model.rotary_pos_emb(segments.longest),
            packed_seq_params=params,
        )
    size = sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in parameters)
    output.sum().backward()  # lets go of what it keeps, the model among it
    kept.clear()
    return size


@pytest.mark.parametrize(("prefix", "low"), [(0, 0.97), (75, 0.93)])
def test_activation_estimate_of_a_packed_row_is_what_autograd_keeps(project: Path, prefix: int, low: float) -> None:
    """With prefixes a little more is kept than counted: the mask of each rejected branch."""
    sizes = {"hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 8, "num_key_value_heads": 2}
    settings = ["training.packing=true", "training.pack_length=1024", f"training.prefix_sharing={prefix > 0}".lower()]
    rejected = (256 + prefix) // 2
    pairs = tuple(Segment(start, start + prefix, start + rejected, start + 256) for start in range(0, 1024, 256))
    segments = Segments(pairs, 1024)

    def both(num_layers: int) -> tuple[int, int]:
        config = {**MODEL, **sizes, "num_hidden_layers": num_layers}
        run = prepare(load_run_config("run.yaml", (*settings, f"model.config={json.dumps(config)}")))
        return preview.estimate_memory(run).activations, kept_bytes(config, segments)

    initialize_megatron(TrainingArguments())
    try:
        (few, few_kept), (many, many_kept) = both(2), both(6)
    finally:
        destroy()
    assert low <= (many - few) / (many_kept - few_kept) <= 1.03


def logged(run_cli, *overrides: str) -> list[dict]:
    output = f"out-{len(list(Path().glob('out-*')))}"
    result = run_cli("train", "run.yaml", *overrides, f"training.output_dir={output}")
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("settings", [("reference.mode=precomputed",), ("lora.r=4",)], ids=["precomputed", "lora"])
def test_packed_runs_with_other_references_equal_padded_ones(project: Path, run_cli, settings: tuple[str, ...]) -> None:
    model = project / "model"
    initialize_megatron(TrainingArguments())
    try:
        save_hf(build_models(MODEL, seed=3), model, MODEL)
    finally:
        destroy()
    tokenizer = load_run_config("run.yaml").model.tokenizer
    common = (f"model={{path: {model}, tokenizer: {tokenizer}}}", *settings)
    padded = logged(run_cli, *common)
    packed = logged(run_cli, *common, *SETTINGS["packed, prompt shared"])
    assert len(padded) == len(packed) > 3
    for record, expected in zip(packed, padded, strict=True):
        for name in {"loss", "eval_loss", "grad_norm", "rewards/margins", "eval_logps/chosen"} & set(expected):
            assert record[name] == pytest.approx(expected[name], rel=2e-5, abs=2e-6), name
