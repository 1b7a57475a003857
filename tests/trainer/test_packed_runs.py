"""Runs on packed rows take the steps that runs on padded rows take: metrics, gradient norms, final parameters."""

import json
from pathlib import Path

import pytest
import torch

from checks.tiny import stock_model, tiny_pairs
from fastpref.data import PackedCollator, PreferenceCollator
from fastpref.errors import ConfigError, DataError
from fastpref.trainer import DPOConfig, DPOTrainer, ModelOptions, TrainingArguments, build_models, load_models
from fastpref.trainer.model.request import PassRequest
from fastpref.trainer.step.batch import Microbatch

POLICY = Path(__file__).resolve().parents[1] / "golden" / "policy_init"
PAIRS = tiny_pairs(22, seed=11)
STEPS = 3


@pytest.fixture
def args(quiet_args):
    def make(**overrides) -> TrainingArguments:
        # 8 pairs a step; epsilon far above the rounding of gradients, which Adam would blow up to full-sized updates
        batches = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": STEPS}
        return quiet_args(**(batches | {"adam_epsilon": 1e-5, "learning_rate": 5e-3} | overrides))

    return make


def run(models: list, reference: list | None, loss: DPOConfig, args: TrainingArguments) -> DPOTrainer:
    trainer = DPOTrainer(models, loss, reference, args, train_dataset=PAIRS, eval_dataset=PAIRS[:7])
    trainer.train()
    return trainer


def golden_run(loss: DPOConfig, args: TrainingArguments) -> DPOTrainer:
    options = ModelOptions(recompute_granularity=args.recompute_granularity)
    reference = load_models(POLICY.parent / "reference_init", options) if loss.use_ref_model else None
    return run(load_models(POLICY, options), reference, loss, args)


def assert_same_run(ours: DPOTrainer, theirs: DPOTrainer, start: list) -> None:
    assert len(ours.log_history) == len(theirs.log_history) == STEPS + 1
    for record, expected in zip(ours.log_history, theirs.log_history, strict=True):
        assert set(record) == set(expected)
        for name, value in expected.items():
            if not name.startswith(("perf/", "memory/")):
                # fp32 sums in another order; log-ratios near zero carry the absolute noise of sums near 30
                assert record[name] == pytest.approx(value, rel=2e-5, abs=2e-6), f"step {record['step']}: {name}"
    chunks = zip(ours.model[0].parameters(), theirs.model[0].parameters(), start[0].parameters(), strict=True)
    for one, other, before in chunks:
        assert (one - other).norm() <= 1e-3 * (other - before).norm() > 0


LOSSES = {
    "dpo": DPOConfig(),
    "orpo": DPOConfig(pref_loss="orpo", orpo_nll="prompt_and_response"),
    "dpo+sft": DPOConfig(pref_loss=("sigmoid", "sft"), loss_weights=(1.0, 0.2)),
    "ld-dpo": DPOConfig(ld_alpha=0.5),
}


@pytest.mark.parametrize("name", LOSSES)
def test_packed_runs_equal_the_padded_run(args, name: str) -> None:
    padded = golden_run(LOSSES[name], args())
    for settings in ({"pack_length": 64}, {"prefix_sharing": True}, {"prefix_sharing": True, "pack_length": 64}):
        packed = golden_run(LOSSES[name], args(packing=True, **settings))
        assert_same_run(packed, padded, load_models(POLICY))
        rows = [batch for step in range(STEPS) for batch in packed.feed.train_batches(step)]
        assert max(batch.num_pairs for batch in rows) >= (3 if "pack_length" in settings else 2)
        shared = sum(batch.segments.shares_prefixes for batch in rows)
        assert shared == (len(rows) if "prefix_sharing" in settings else 0)
        first, theirs = packed.log_history[0], padded.log_history[0]
        assert first["perf/positions_per_pair"] < theirs["perf/positions_per_pair"]


def test_packed_run_of_gemma_equals_the_padded_run(args) -> None:
    """Two ropes and windows shorter than the rows, at the positions of each sequence."""
    gemma = {
        "model_type": "gemma3_text",
        **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3},
        **{"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64},
        **{"sliding_window": 4, "sliding_window_pattern": 2, "initializer_range": 0.2},
    }

    def gemma_run(**settings) -> DPOTrainer:
        return run(build_models(gemma, seed=1), None, DPOConfig(), args(**settings))

    packed = gemma_run(packing=True, prefix_sharing=True, pack_length=64)
    assert_same_run(packed, gemma_run(), build_models(gemma, seed=1))


@pytest.mark.parametrize("granularity", ["full", "selective"])
def test_packed_run_with_recomputation_equals_the_padded_run(args, granularity: str) -> None:
    settings = {"packing": True, "prefix_sharing": True, "recompute_granularity": granularity}
    assert_same_run(golden_run(DPOConfig(), args(**settings)), golden_run(DPOConfig(), args()), load_models(POLICY))


@pytest.mark.parametrize("prefix_sharing", [False, True])
def test_packed_run_of_stock_megatron_models_equals_the_padded_run(args, prefix_sharing: bool) -> None:
    settings = {"packing": True, "prefix_sharing": prefix_sharing}
    packed = run(stock_model(0), stock_model(1), DPOConfig(), args(**settings))
    assert_same_run(packed, run(stock_model(0), stock_model(1), DPOConfig(), args()), stock_model(0))


@pytest.mark.parametrize("prefix_sharing", [False, True])
def test_packed_run_with_sliding_windows_equals_the_padded_run(args, prefix_sharing: bool) -> None:
    config = json.loads((POLICY / "config.json").read_text())
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 3}

    def build(seed: int) -> list:
        models = build_models(config | {"initializer_range": 0.2}, seed=seed)
        assert models[0].config.window_size == (2, 0)
        return models

    settings = {"packing": True, "prefix_sharing": prefix_sharing}
    packed = run(build(0), build(1), DPOConfig(), args(**settings))
    assert_same_run(packed, run(build(0), build(1), DPOConfig(), args()), build(0))


def scores_of(trainer: DPOTrainer, batches: list[Microbatch]) -> dict[int, tuple[float, float]]:
    """Response sums of both sides by pair, under the policy."""
    found = {}
    with torch.no_grad():
        for batch, scores in zip(batches, trainer.engine.schedule.score(trainer.model, batches), strict=True):
            found |= {int(pair): sides for pair, *sides in zip(batch.pair_ids_B, *scores.view(2, -1), strict=True)}
    return found


def test_packed_rows_answer_what_padded_rows_answer(args) -> None:

    collate = PreferenceCollator(0)
    padded = [Microbatch.from_dict(collate(PAIRS[start : start + 4])) for start in (0, 4)]
    for prefix_sharing in (False, True):
        settings = {"packing": True, "prefix_sharing": prefix_sharing, "shuffle": False}
        trainer = DPOTrainer(load_models(POLICY), DPOConfig(), None, args(**settings), train_dataset=PAIRS[:8])
        packed = scores_of(trainer, trainer.feed.train_batches(0))
        expected = scores_of(trainer, padded)
        assert set(packed) == set(expected) == set(range(8))
        for pair, sides in expected.items():
            assert torch.stack(packed[pair]) == pytest.approx(torch.stack(sides), rel=2e-6)


def test_head_answers_bit_for_bit_whatever_the_packing(args) -> None:
    """The same hidden states at a sequence's labels give the same sums, in a padded batch and in two packings."""
    pairs = PAIRS[:6]
    trainer = DPOTrainer(load_models(POLICY), DPOConfig(), None, args(), train_dataset=pairs)
    head, hidden_size = trainer.model[0].output_layer, trainer.model[0].config.hidden_size
    like = PreferenceCollator(0)
    hidden = {}
    answers = []
    for collator in (like, PackedCollator(like, prefix_sharing=False), PackedCollator(like, prefix_sharing=True)):
        batch = Microbatch.from_dict(collator(pairs))
        request = batch.head_request()
        states_TH = torch.zeros(request.labels_T.numel(), hidden_size)
        for sequence in range(12):
            rows = request.rows_R[request.cu_rows[sequence] : request.cu_rows[sequence + 1]]
            generator = torch.Generator().manual_seed(sequence)
            states = hidden.setdefault(sequence, torch.randn(len(rows), hidden_size, generator=generator))
            states_TH[rows] = states
        head.request = PassRequest(head=request)
        answers.append(head(states_TH.view(batch.seq_length, -1, hidden_size))[0])
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])


def test_hidden_states_of_one_row_have_the_strides_of_a_matrix(args) -> None:
    """So that products with frozen weights and with trained ones add alike, and a frozen copy answers the same bits."""
    trainer = DPOTrainer(load_models(POLICY), DPOConfig(), None, args(packing=True), train_dataset=PAIRS)
    seen = []
    for model in (trainer.model[0], trainer.ref_models[0]):
        layer = model.decoder.layers[0]
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["hidden_states"].detach()), with_kwargs=True
        )
        trainer.engine.schedule.score([model], trainer.feed.train_batches(0)[:1])
    for hidden in seen:
        assert hidden.size(1) == 1 and hidden.stride(0) == hidden.stride(1) == hidden.size(2)
    assert len(seen) == 2 and torch.equal(*seen)


def test_packed_batches_hold_every_pair_of_the_step_once(args) -> None:
    trainer = DPOTrainer(
        load_models(POLICY), DPOConfig(), None, args(packing=True, prefix_sharing=True), train_dataset=PAIRS
    )
    for step in range(6):
        found = [int(pair) for batch in trainer.feed.train_batches(step) for pair in batch.pair_ids_B]
        assert sorted(found) == sorted(trainer.feed.schedule.batch(step))
    found = [int(p) for batches in trainer.feed.eval_batches(PAIRS) for batch in batches for p in batch.pair_ids_B]
    assert sorted(found) == list(range(len(PAIRS)))


def test_packing_refuses_what_cannot_work(args) -> None:
    def build(**settings) -> DPOTrainer:
        data = {key: settings.pop(key) for key in ("data_collator",) if key in settings}
        loss = settings.pop("loss", DPOConfig())
        return DPOTrainer(load_models(POLICY), loss, None, args(**settings), train_dataset=PAIRS, **data)

    with pytest.raises(ConfigError, match="packing is True, but data_collator is a PreferenceCollator"):
        build(packing=True, data_collator=PreferenceCollator(0))
    with pytest.raises(ConfigError, match="packing is False, but data_collator is a PackedCollator"):
        build(data_collator=PackedCollator(PreferenceCollator(0), prefix_sharing=True))
    with pytest.raises(ConfigError, match="pack_length must be a multiple of pad_to_multiple_of=8, got 60"):
        build(packing=True, pack_length=60)
    message = r"tiny:\d+: the pair takes \d+ positions .* pack_length=8; raise pack_length to 24 or more, set prefix_sh"
    with pytest.raises(DataError, match=message):
        build(packing=True, pack_length=8)
    with pytest.raises(ConfigError, match="aot sorts the pairs of a whole batch, which packing deals to several rows"):
        build(packing=True, loss=DPOConfig(pref_loss="aot"), gradient_accumulation_steps=1)
    with pytest.raises(ConfigError, match="prefix_sharing \\(True\\) is used by packed rows only"):
        args(prefix_sharing=True)
    with pytest.raises(ConfigError, match="pack_length \\(64\\) is used by packed rows only"):
        args(pack_length=64)
    with pytest.raises(ConfigError, match="per_device_eval_batch_size and packing exclude each other"):
        args(packing=True, per_device_eval_batch_size=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segment_bounds": torch.tensor([[0, 1, 2, 99]])}, "segment_bounds: a row of"),
        ({"segment_bounds": torch.tensor([[0, 3, 2, 5]])}, "segment_bounds: segment 0 must start at 0"),
        ({"segment_bounds": torch.tensor([0, 1, 2, 3])}, r"segment_bounds \[n, 4\] and input_ids \[1, L\]"),
        ({"labels": torch.zeros(1, 32, dtype=torch.long)}, "labels must be -100 behind the last pair, from 26 on"),
        ({"attention_mask": torch.ones(1, 32)}, "must not have attention_mask"),
        ({"pair_weights": torch.ones(3)}, r"pair_weights must be \[2\], one per pair"),
    ],
)
def test_packed_batches_are_checked(change: dict, message: str) -> None:
    batch = PackedCollator(PreferenceCollator(0), prefix_sharing=True)(PAIRS[:2])
    with pytest.raises(DataError, match=message):
        Microbatch.from_dict(batch | change)


def test_training_step_takes_packed_batches_only_where_the_model_is_ready(args) -> None:
    batch = PackedCollator(PreferenceCollator(0), prefix_sharing=True)(PAIRS[:3])
    settings = {"gradient_accumulation_steps": 1}
    trainer = DPOTrainer(load_models(POLICY), DPOConfig(), None, args(**settings), train_dataset=PAIRS)
    with pytest.raises(ConfigError, match=r"a packed batch needs training\.packing: true"):
        trainer.training_step(trainer.models_wrapped, iter([batch]), 64)
    ready = DPOTrainer(load_models(POLICY), DPOConfig(), None, args(packing=True, **settings), train_dataset=PAIRS)
    loss, *_ = ready.training_step(ready.models_wrapped, iter([batch]), 64)
    assert loss.item() == pytest.approx(0.6931472, rel=1e-6)
