"""Weights in and out: bit for bit, in any layout, and strict about what does not fit."""

import json
import re
from pathlib import Path

import hf_oracle
import megatron_runs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron_runs import Layout
from safetensors.torch import load_file, save_file, save_model

from fastpref.errors import CheckpointError, ConfigError
from fastpref.run.architecture.layouts import Columns, GateUp, QueryKeyValue, Replicated, VocabRows
from fastpref.testing.workers import RankPool
from fastpref.trainer.model.build import ModelOptions, build_models, load_models, save_hf

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "policy_init"
MOE = hf_oracle.VARIANTS["qwen3-moe"].to_dict()
LAYOUTS_2 = [Layout(tp=2), Layout(pp=2), Layout(pp=2, vpp=2)]
LAYOUTS_4 = [Layout(tp=2, pp=2), Layout(tp=4), Layout(pp=4), Layout(tp=2)]
EXPERT_LAYOUTS_4 = [Layout(tp=2, sp=True, ep=2), Layout(pp=2, ep=2), Layout(ep=2), Layout(ep=4)]


@pytest.fixture
def one_rank():
    with megatron_runs.parallel(Layout()):
        yield


def edit(path: Path, **tensors: torch.Tensor | None) -> None:
    """Change, add or (None) remove tensors of a one-file model; `__` in a key stands for a dot."""
    content = load_file(path / "model.safetensors")
    for key, tensor in tensors.items():
        name = key.replace("__", ".")
        content.pop(name, None)
        if tensor is not None:
            content[name] = tensor
    save_file(content, path / "model.safetensors")


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return hf_oracle.save(hf_oracle.make_model("llama"), tmp_path / "llama")


# --- layouts

SHAPES = st.sampled_from([1, 2, 4])


@settings(max_examples=60, deadline=None)
@given(size=SHAPES, groups=SHAPES, heads_per_group=st.sampled_from([4, 8]), head_dim=st.integers(1, 3), hidden=SHAPES)
def test_layouts_merge_undoes_shard(size: int, groups: int, heads_per_group: int, head_dim: int, hidden: int) -> None:
    layouts = [
        Replicated("a", (hidden,)),
        Columns("a", (3, 4 * hidden)),
        VocabRows("a", (5 * hidden + 1, 3)),
        GateUp("a", "b", (4 * hidden, 3)),
        QueryKeyValue("a", "b", "c", groups, heads_per_group, 4 * head_dim, (hidden,)),
        QueryKeyValue("a", "b", "c", groups, heads_per_group, 4 * head_dim, ()),
    ]
    for layout in layouts:
        tensors = {name: torch.randn(shape) for name, shape in layout.shapes.items()}

        def read(name, dim, start, stop, tensors=tensors):
            return tensors[name][start:stop] if dim == 0 else tensors[name][:, start:stop]

        shards = [layout.shard(read, rank, size) for rank in range(size)]
        assert len({shard.shape for shard in shards}) == 1
        hf_oracle.assert_same_bits(layout.merge(shards), tensors)


def test_query_key_value_interleaves_by_group() -> None:
    tensors = {"q": torch.arange(4.0), "k": torch.tensor([10.0, 11.0]), "v": torch.tensor([20.0, 21.0])}
    layout = QueryKeyValue("q", "k", "v", num_groups=2, heads_per_group=2, head_dim=1, tail=())
    read = lambda name, dim, start, stop: tensors[name][start:stop]  # noqa: E731
    assert layout.shard(read, 0, 1).tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    assert layout.shard(read, 1, 2).tolist() == [2, 3, 11, 21]
    assert layout.shard(read, 1, 4).tolist() == [10, 20]  # four ranks, two groups: a rank holds half a group


def test_vocab_rows_pads_with_zeros() -> None:
    layout = VocabRows("e", (3, 2))
    read = lambda name, dim, start, stop: torch.ones(3, 2)[start:stop]  # noqa: E731
    assert layout.shard(read, 1, 2).tolist() == [[1, 1], [0, 0]]
    assert layout.shard(read, 3, 4).tolist() == [[0, 0]]


# --- round trips


@pytest.mark.parametrize("variant", hf_oracle.VARIANTS)
def test_export_of_import_is_identical(variant: str, tmp_path: Path, one_rank) -> None:
    path = hf_oracle.save(hf_oracle.make_model(variant), tmp_path / "model", max_shard_size="60KB")
    save_hf(load_models(path), tmp_path / "out", path)
    hf_oracle.assert_same_bits(hf_oracle.read_tensors(tmp_path / "out"), hf_oracle.read_tensors(path))
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads((path / "config.json").read_text())


@pytest.mark.parametrize("layout", LAYOUTS_2, ids=str)
@pytest.mark.parametrize("variant", ["llama-tied-odd-vocab", "qwen2", "qwen3", "gemma3-tied-scaled-rope", "seed-oss"])
def test_export_on_two_ranks_is_identical(rank_pool_2: RankPool, variant: str, layout: Layout, tmp_path: Path) -> None:
    check_reexport(rank_pool_2, variant, layout, tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS_4, ids=str)
@pytest.mark.parametrize("variant", ["mistral", "qwen3-tied-odd-vocab"])
def test_export_on_four_ranks_is_identical(rank_pool_4: RankPool, variant: str, layout: Layout, tmp_path: Path) -> None:
    check_reexport(rank_pool_4, variant, layout, tmp_path)


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS_4, ids=str)
def test_export_of_experts_on_four_ranks_is_identical(rank_pool_4: RankPool, layout: Layout, tmp_path: Path) -> None:
    check_reexport(rank_pool_4, "qwen3-moe-mixed", layout, tmp_path)


def check_reexport(pool: RankPool, variant: str, layout: Layout, tmp_path: Path) -> None:
    path = hf_oracle.save(hf_oracle.make_model(variant).bfloat16(), tmp_path / "model")
    (path / "tokenizer.json").write_text("{}")
    (path / "tokenization_evil.py").write_text("raise SystemExit")
    options = ModelOptions(params_dtype=torch.bfloat16, sequence_parallel=layout.sp)
    pool.run(megatron_runs.reexport, str(path), str(tmp_path / "out"), layout, options, 40_000)
    out = tmp_path / "out"
    hf_oracle.assert_same_bits(hf_oracle.read_tensors(out), hf_oracle.read_tensors(path))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = {file.name: load_file(file) for file in out.glob("*.safetensors")}
    assert len(files) > 2
    assert index["weight_map"] == {name: file for file, tensors in files.items() for name in tensors}
    assert sorted(file.name for file in out.iterdir()) == sorted(
        ["config.json", "model.safetensors.index.json", "tokenizer.json", "generation_config.json", *files]
    )


def test_save_hf_writes_what_transformers_loads(tmp_path: Path, one_rank) -> None:
    model = hf_oracle.make_model("qwen2")
    path = hf_oracle.save(model, tmp_path / "model")
    save_hf(load_models(path), tmp_path / "out", path, max_shard_bytes=50_000)
    again = type(model).from_pretrained(tmp_path / "out")
    hf_oracle.assert_same_bits(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("keys", [("dtype",), ("torch_dtype",), ("dtype", "torch_dtype")])
def test_save_hf_leaves_no_other_dtype_behind(llama: Path, tmp_path: Path, one_rank, keys: tuple[str, ...]) -> None:
    config = {key: value for key, value in json.loads((llama / "config.json").read_text()).items() if key != "dtype"}
    save_hf(load_models(llama), tmp_path / "out", {**config, **dict.fromkeys(keys, "bfloat16")})
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: written[key] for key in written if "dtype" in key} == dict.fromkeys(keys, "float32")


def test_save_hf_casts_on_request(llama: Path, tmp_path: Path, one_rank) -> None:
    save_hf(load_models(llama), tmp_path / "out", llama, dtype=torch.bfloat16)
    expected = {name: tensor.bfloat16() for name, tensor in hf_oracle.read_tensors(llama).items()}
    hf_oracle.assert_same_bits(hf_oracle.read_tensors(tmp_path / "out"), expected)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


def test_load_models_accepts_an_index_without_total_size(tmp_path: Path, one_rank) -> None:
    save_hf(load_models(GOLDEN), tmp_path / "out", GOLDEN)
    hf_oracle.assert_same_bits(hf_oracle.read_tensors(tmp_path / "out"), hf_oracle.read_tensors(GOLDEN))


# --- random weights


def test_build_models_draws_the_same_weights_in_every_layout(
    rank_pool_2: RankPool, rank_pool_4: RankPool, tmp_path: Path
) -> None:
    config = hf_oracle.VARIANTS["qwen2-tied-window"].to_dict() | {"vocab_size": 97, "initializer_range": 0.5}
    megatron_runs.export_random(config, str(tmp_path / "one"), Layout(), 7)
    expected = hf_oracle.read_tensors(tmp_path / "one")
    for pool, layouts in ((rank_pool_2, LAYOUTS_2), (rank_pool_4, LAYOUTS_4)):
        for layout in layouts:
            out = tmp_path / f"{pool.world_size}-{layout}"
            pool.run(megatron_runs.export_random, config, str(out), layout, 7)
            hf_oracle.assert_same_bits(hf_oracle.read_tensors(out), expected)
    matrices = [tensor for tensor in expected.values() if tensor.ndim == 2]
    assert len({tensor.flatten()[:64].sum().item() for tensor in matrices}) == len(matrices)  # no two draws alike
    megatron_runs.export_random(config, str(tmp_path / "other"), Layout(), 8)
    other = hf_oracle.read_tensors(tmp_path / "other")
    for name, tensor in expected.items():
        if tensor.ndim == 1:
            assert torch.equal(tensor, torch.full_like(tensor, 0.0 if name.endswith("bias") else 1.0))
        else:
            assert not torch.equal(tensor, other[name])
            spread = 5 * 0.5 / (2 * tensor.numel()) ** 0.5  # five standard errors of a standard deviation
            assert tensor.std().item() == pytest.approx(0.5, abs=spread)


def test_build_models_starts_zero_centered_norms_at_zero(tmp_path: Path, one_rank) -> None:
    config = hf_oracle.VARIANTS["gemma3"].to_dict()
    save_hf(build_models(config, seed=3), tmp_path / "out", config)
    norms = {name: t for name, t in hf_oracle.read_tensors(tmp_path / "out").items() if name.endswith("norm.weight")}
    assert len(norms) == 4 * 6 + 1
    assert not any(tensor.any() for tensor in norms.values())


def test_build_models_draws_the_same_experts_in_every_layout(rank_pool_4: RankPool, tmp_path: Path) -> None:
    config = hf_oracle.VARIANTS["qwen3-moe"].to_dict()
    megatron_runs.export_random(config, str(tmp_path / "one"), Layout(), 7)
    expected = hf_oracle.read_tensors(tmp_path / "one")
    rank_pool_4.run(megatron_runs.export_random, config, str(tmp_path / "four"), Layout(pp=2, ep=2), 7)
    hf_oracle.assert_same_bits(hf_oracle.read_tensors(tmp_path / "four"), expected)
    experts = [tensor for name, tensor in expected.items() if ".experts." in name]
    assert len({tensor.sum().item() for tensor in experts}) == len(experts) == 4 * 8 * 3


def test_load_models_reads_only_the_experts_of_the_rank(rank_pool_2: RankPool, tmp_path: Path) -> None:
    path = hf_oracle.save(hf_oracle.make_model("qwen3-moe"), tmp_path / "model")
    for rank, names in enumerate(rank_pool_2.run(megatron_runs.names_read, str(path), Layout(ep=2))):
        numbers = {int(name.split(".experts.")[1].split(".")[0]) for name in names if ".experts." in name}
        assert numbers == set(range(4 * rank, 4 * rank + 4))


def test_build_models_pads_the_vocabulary_with_zero_rows(rank_pool_2: RankPool) -> None:
    config = hf_oracle.VARIANTS["llama"].to_dict() | {"vocab_size": 97}
    sizes = rank_pool_2.run(megatron_runs.last_vocab_row, config)
    assert [size[:2] for size in sizes] == [(98, 97), (98, 97)]
    assert sizes[0][2] > 0
    assert sizes[1][2] == 0


# --- refusals


def test_load_models_skips_rotary_tables(llama: Path, tmp_path: Path, one_rank) -> None:
    before = hf_oracle.read_tensors(llama)
    edit(
        llama,
        model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(6),
        model__rotary_emb__inv_freq=torch.ones(6),
        **{"model__layers__1__self_attn__rotary_emb__cos_cached": torch.ones(9, 12)},
    )
    save_hf(load_models(llama), tmp_path / "out", llama)
    hf_oracle.assert_same_bits(hf_oracle.read_tensors(tmp_path / "out"), before)


def test_load_models_reads_an_embedding_that_was_saved_as_the_head(tmp_path: Path, one_rank) -> None:
    model = hf_oracle.make_model("llama-tied-odd-vocab")
    path = hf_oracle.save(model, tmp_path / "model")
    before = hf_oracle.read_tensors(path)
    save_model(model, str(path / "model.safetensors"))  # keeps the first of two names
    assert "model.embed_tokens.weight" not in load_file(path / "model.safetensors")
    save_hf(load_models(path), tmp_path / "out", path)
    hf_oracle.assert_same_bits(hf_oracle.read_tensors(tmp_path / "out"), before)


def test_load_models_accepts_a_tied_head_only_if_it_is_the_embedding(tmp_path: Path, one_rank) -> None:
    path = hf_oracle.save(hf_oracle.make_model("llama-tied-odd-vocab"), tmp_path / "model")
    embedding = hf_oracle.read_tensors(path)["model.embed_tokens.weight"]
    edit(path, lm_head__weight=embedding.clone())
    load_models(path)
    embedding[96, 3] += 1
    edit(path, lm_head__weight=embedding)
    with pytest.raises(CheckpointError, match="tie_word_embeddings is true but lm_head"):
        load_models(path)


def test_load_models_fails_on_every_rank_when_one_rank_sees_nan(rank_pool_2: RankPool, llama: Path) -> None:
    head = hf_oracle.read_tensors(llama)["lm_head.weight"]
    head[-1, 0] = float("nan")  # in the slice of the last rank only
    edit(llama, lm_head__weight=head)
    for layout in (Layout(tp=2), Layout(pp=2)):
        for message in rank_pool_2.run(megatron_runs.load_error, str(llama), layout):
            assert re.search(r"CheckpointError: .* not finite .* lm_head.weight", message)


def test_save_hf_fails_on_every_rank_when_the_directory_is_taken(
    rank_pool_2: RankPool, llama: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/keep.txt").write_text("mine")
    for message in rank_pool_2.run(megatron_runs.save_error, str(llama), str(tmp_path / "out"), Layout(tp=2)):
        assert re.search("CheckpointError: .* exists and is not empty", message)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["keep.txt"]


def test_save_hf_fails_on_every_rank_when_the_disk_is_full(rank_pool_2: RankPool, llama: Path, tmp_path: Path) -> None:
    for message in rank_pool_2.run(megatron_runs.save_error, str(llama), str(tmp_path / "out"), Layout(pp=2), 100_000):
        assert re.match(r"OSError: \[Errno 28\] writing weights failed \(rank 0: \[Errno 27\]", message)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["llama"]


@pytest.mark.parametrize(
    ("layout", "config", "message"),
    [
        (
            Layout(tp=2),
            {"num_attention_heads": 3, "num_key_value_heads": 3},
            "must divide num_attention_heads 3 and .* num_key_value_heads 3 .*, got 2; nearest valid: 1",
        ),
        (Layout(ep=2), {}, "expert_model_parallel_size must be 1 for llama, which has no experts, got 2"),
        (Layout(ep=2), {**MOE, "num_local_experts": 5}, r"must divide .* experts 5, got 2; nearest valid: 1 or 5"),
        (Layout(tp=2), MOE, "tensor_model_parallel_size 2 needs sequence_parallel for a model with experts"),
        (Layout(tp=2), {**MOE, "moe_intermediate_size": 25}, "must divide an expert's width 25, got 2"),
        (Layout(tp=2), {"intermediate_size": 81}, "must divide intermediate_size 81, got 2; nearest valid: 1"),
        (Layout(pp=2), {"num_hidden_layers": 1}, "must not exceed num_hidden_layers 1, got 2; nearest valid: .* 1"),
        (Layout(pp=2, vpp=4), {}, r"must not exceed num_hidden_layers 4, got 2 \* 4; nearest valid: .* 1"),
    ],
)
def test_build_models_refuses_a_layout_that_does_not_fit(
    rank_pool_2: RankPool, layout: Layout, config: dict, message: str
) -> None:
    full = config if "model_type" in config else hf_oracle.VARIANTS["llama"].to_dict() | config
    for text in rank_pool_2.run(megatron_runs.build_error, full, layout):
        assert re.search("ConfigError: .*" + message, text, re.DOTALL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_parallel": True}, "sequence_parallel needs tensor_model_parallel_size >= 2"),
        ({"max_sequence_length": 129}, "max_sequence_length 129 is more than .* 128"),
        ({"max_sequence_length": 0}, "max_sequence_length must be a whole number >= 1"),
        ({"params_dtype": torch.float64}, "params_dtype must be"),
        ({"recompute_granularity": "some"}, "recompute_granularity must be"),
        ({"moe_aux_loss_coeff": -0.1}, r"moe_aux_loss_coeff must be a finite number >= 0, got -0\.1"),
    ],
)
def test_build_models_refuses_options_that_cannot_work(options: dict, message: str, one_rank) -> None:
    with pytest.raises(ConfigError, match=message):
        build_models(hf_oracle.VARIANTS["llama"].to_dict(), ModelOptions(**options), seed=0)
