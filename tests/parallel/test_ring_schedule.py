"""The schedule of the loop ring: every visit once, in order, one per stage and tick; the bubble; the messages."""

import random
from collections import Counter

import pytest

from megatron_rdt.parallel.ring_schedule import Message, RingSchedule, Visit, assign_layers, schedule_ring


def draw(stages: int, sequences: int, seed: int) -> RingSchedule:
    numbers = random.Random(seed)
    laps = [numbers.randint(1, 9) for _ in range(sequences)]
    return schedule_ring(stages, laps, [i * stages // sequences for i in range(sequences)])


SCHEDULES = [
    draw(stages, sequences, seed)
    for seed, (stages, sequences) in enumerate([(2, 2), (2, 7), (3, 3), (4, 1), (4, 3), (4, 16), (5, 12), (8, 64)])
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s.stages}-{len(s.laps)}")
def test_each_stage_computes_each_lap_once_right_after_the_stage_before(schedule: RingSchedule) -> None:
    found = {}
    for tick in range(schedule.ticks):
        for stage in range(schedule.stages):
            if visit := schedule.visit(stage, tick):
                assert (stage, visit) not in found
                found[stage, visit] = tick
    for sequence, laps in enumerate(schedule.laps):
        for lap in range(laps):
            first = schedule.entries[sequence] + lap * schedule.stages
            for stage in range(schedule.stages):
                assert found.pop((stage, Visit(sequence, lap))) == first + stage
        assert sequence in schedule.finished_in(schedule.entries[sequence] + laps * schedule.stages)
    assert not found
    assert schedule.visit(0, schedule.ticks) is None


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s.stages}-{len(s.laps)}")
def test_messages_bring_what_the_next_tick_needs_and_nothing_else(schedule: RingSchedule) -> None:
    kinds: Counter[str] = Counter()
    for tick in range(schedule.ticks + 2):
        for message in schedule.messages_before(tick):
            kinds[message.kind] += 1
            sequence, owner = message.sequence, schedule.owners[message.sequence]
            if message.kind == "enter":
                assert message == Message("enter", sequence, owner, 0)
                assert schedule.visit(0, tick) == Visit(sequence, 0)
            elif message.kind == "leave":
                assert message == Message("leave", sequence, 0, owner)
                assert sequence in schedule.finished_in(tick - 1)
            else:
                before, after = schedule.visit(message.source, tick - 1), schedule.visit(message.target, tick)
                assert before is not None
                assert before.sequence == sequence
                assert after == Visit(sequence, before.lap + (message.target == 0)) or (
                    message.target == 0 and sequence in schedule.finished_in(tick)
                )
    assert kinds == {
        "enter": len(schedule.laps),
        "leave": len(schedule.laps),
        "hop": schedule.stages * sum(schedule.laps),
    }
    for backwards in (False, True):
        sent = sum((schedule.count_sent(stage, backwards) for stage in range(schedule.stages)), Counter())
        travelling = sum(owner > 0 for owner in schedule.owners)  # stage 0 keeps its own
        assert sent == Counter(hop=kinds["hop"], enter=travelling, leave=travelling)
    assert schedule.count_sent(0).keys() <= {"hop", "leave"}
    assert schedule.count_sent(0, backwards=True).keys() <= {"hop", "enter"}


@pytest.mark.parametrize(("stages", "turns", "loops"), [(2, 1, 1), (4, 1, 16), (8, 1, 16), (8, 3, 5)])
def test_the_bubble_of_equal_loop_counts(stages: int, turns: int, loops: int) -> None:
    sequences = turns * stages
    schedule = schedule_ring(stages, [loops] * sequences, [0] * sequences)
    assert schedule.ticks == sequences * loops + stages - 1
    assert schedule.bubble == pytest.approx((stages - 1) / (sequences * loops + stages - 1))


def test_with_fewer_sequences_than_stages_some_stages_wait_for_them() -> None:
    schedule = schedule_ring(8, [4] * 3, [0, 1, 2])
    assert schedule.ticks == 8 * 4 + 2  # the last one enters in tick 2
    assert schedule.bubble == pytest.approx(1 - 12 / 34)


def test_drawn_loop_counts_fill_the_lanes_evenly() -> None:
    """The longest first: three lanes of 8 laps, though no two of them have the same sequences."""
    schedule = schedule_ring(3, [1, 5, 8, 3, 2, 5], [0, 0, 1, 1, 2, 2])
    lanes: Counter[int] = Counter()
    for entry, laps in zip(schedule.entries, schedule.laps):
        lanes[entry % 3] += laps
    assert sorted(lanes.values()) == [8, 8, 8]
    assert schedule.ticks == 3 * 8 + 2


def test_many_drawn_sequences_leave_a_small_bubble() -> None:
    for seed in range(20):
        schedule = draw(8, 64, seed)
        longest_wait = max(schedule.laps) * 8
        assert schedule.ticks < sum(schedule.laps) + longest_wait
        assert schedule.bubble < 0.1


def test_the_schedule_is_the_same_in_every_process() -> None:
    assert draw(4, 16, 3) == draw(4, 16, 3)


def test_stages_hold_equally_many_consecutive_layers() -> None:
    assert assign_layers(6, 3) == [range(2), range(2, 4), range(4, 6)]
