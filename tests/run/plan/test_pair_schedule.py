"""Which pairs a step holds: one answer for the feed of a run, its check and the pass of the reference."""

import pytest

from fastpref.run.config.arguments import TrainingArguments
from fastpref.run.plan.pair_schedule import PairSchedule, Slots

ARGS = TrainingArguments(per_device_train_batch_size=2, gradient_accumulation_steps=3, num_train_epochs=2, seed=5)


@pytest.mark.parametrize("dp_size", [1, 2, 5])
@pytest.mark.parametrize("num_pairs", [1, 7, 29])
def test_microbatches_hold_every_pair_once_and_fillers_behind(num_pairs: int, dp_size: int) -> None:
    schedule = PairSchedule.training(ARGS, num_pairs, dp_size)
    assert schedule.total_steps == 2 * schedule.steps_per_epoch == 2 * -(-num_pairs // (6 * dp_size))
    for epoch in range(2):
        seen = []
        for step in range(epoch * schedule.steps_per_epoch, (epoch + 1) * schedule.steps_per_epoch):
            for rank in range(dp_size):
                microbatches = schedule.microbatches(step, rank)
                assert [len(slots.places) for slots in microbatches] == [2, 2, 2]
                for places, num_real in microbatches:
                    seen += places[:num_real]
                    # a filler repeats the first pair of its step
                    assert places[num_real:] == [schedule.batch(step)[0]] * (2 - num_real)
        assert sorted(seen) == list(range(num_pairs))


def test_total_steps_are_those_that_are_asked_for() -> None:
    args = TrainingArguments(per_device_train_batch_size=4, max_steps=9, drop_last=True)
    schedule = PairSchedule.training(args, 11, 2)
    assert (schedule.global_batch_pairs, schedule.steps_per_epoch, schedule.total_steps) == (8, 1, 9)


def test_one_pass_takes_the_pairs_in_order_in_groups_that_fill_the_pipeline() -> None:
    args = TrainingArguments(
        per_device_train_batch_size=2, per_device_eval_batch_size=3, pipeline_model_parallel_size=2, drop_last=True
    )
    schedule = PairSchedule.one_pass(args, 14, 2)
    assert [schedule.batch(step) for step in range(schedule.total_steps)] == [list(range(12)), [12, 13]]
    assert schedule.microbatches(1, 1) == [Slots([13, 12, 12], 1), Slots([12, 12, 12], 0)]
    packed = PairSchedule.one_pass(ARGS, 14, 2, packed=True)
    assert [len(packed.batch(step)) for step in range(packed.total_steps)] == [12, 2]


def test_only_a_packed_row_without_pairs_is_filled_and_with_the_cheapest() -> None:
    assert Slots.of_packed_row([2, 0], [5, 3, 4]) == Slots([2, 0], 2)
    assert Slots.of_packed_row([], [5, 3, 4]) == Slots([1], 0)
