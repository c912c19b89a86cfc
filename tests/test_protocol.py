"""attnbench.protocol: how many calls are timed, in which order, when it stops, and what a bad option is told."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest

from attnbench import protocol as timing
from attnbench.blocks import Block, Lap, Seen
from attnbench.devices import Timing
from attnbench.errors import AttnbenchError
from attnbench.protocol import (
    FIXED_ROUNDS,
    HOST_CALLS,
    MAX_CALLS,
    MAX_DROPS,
    MIN_CALLS,
    ROUNDS,
    Protocol,
    make_protocol,
    take_block,
)
from attnbench.result import sample_sizes


class Broken(Exception):
    pass


class Lane:
    """A lane whose calls take the times it is told, and which writes down what it is asked."""

    calls_a_sample, fallback = 1, ""

    def __init__(self, name="a", times=(100.0,), journal=None, fail_at=None):
        self.name = name
        self.times = itertools.cycle(times)
        self.call_us = times[0]
        self.paused = False
        self.journal = [] if journal is None else journal
        self.asked = 0
        self.fail_at = fail_at

    def ask(self):
        self.paused = False
        self.asked += 1
        if self.asked == self.fail_at:
            raise Broken(f"{self.name} broke")

    def warm_up(self, seconds):
        self.journal.append((self.name, "warm", seconds))
        self.ask()
        return self.call_us

    def time_calls(self, count, *, cold):
        self.journal.append((self.name, count, cold))
        self.ask()
        samples = len(sample_sizes(count, self.calls_a_sample))
        times = [next(self.times) for _ in range(samples)]
        return Timing(times_us=times, method="cuda_graph", calls_a_sample=self.calls_a_sample, fallback=self.fallback)

    def pause(self):
        self.paused = True

    def host_us(self, count):
        self.journal.append((self.name, "host", count))
        return [7.0, 1.0, 2.0, 3.0, 100.0][:count]


class Watch:
    """A machine that is what it is told to be, round by round, and calm afterwards."""

    def __init__(self, *seen):
        self.seen = iter(seen)
        self.started = 0

    def start(self):
        self.started += 1

    def stop(self):
        return next(self.seen, Seen())


BUSY = Seen(load=0.5, causes=("other programs",))


def go(lanes, protocol, *, index=0, seed=0, watch=None, failures=None, known_us=None):
    return take_block(
        {lane.name: lane for lane in lanes},
        protocol,
        index,
        seed=seed,
        watch=watch or Watch(),
        expected=Broken,
        failed=lambda name, error: (failures if failures is not None else []).append((name, str(error))),
        known_us=known_us,
    )


def rounds_of(journal):
    """The timed rounds in a journal, in the order taken: what is not a warm-up or a host time."""
    rounds = journal[[i for i, entry in enumerate(journal) if entry[1] == "host"][-1] + 1 :]
    return [entry for entry in rounds if entry[1] != "warm"]


def lap(time_us):
    return Lap(times_us=(time_us,), calls=(1,), host_us=(1.0,), timing_method="host_clock")


def blocks(**medians):
    """Blocks in which each backend's calls take the times given, one a block; each block took a second."""
    counts = {len(times) for times in medians.values()}
    assert len(counts) == 1
    return [
        Block(
            laps={name: lap(times[i]) for name, times in medians.items()},
            seen=(Seen(),),
            spent_s=1.0,
        )
        for i in range(counts.pop())
    ]


# fixed


def test_fixed_times_exactly_its_iterations_in_five_blocks_each_after_its_warm_ups():
    protocol = Protocol(name="fixed", warmup=50, iters=200)
    assert protocol.fixed_counts == [40] * 5
    for index in range(5):
        lane = Lane(times=(10.0, 20.0, 60.0))
        found = go([lane], protocol, index=index)
        assert lane.journal[:2] == [("a", 50, False), ("a", "host", 5)]
        assert [entry[1] for entry in lane.journal[2:]] == ["warm", 14, "warm", 13, "warm", 13]
        assert len(found.laps["a"].times_us) == 40
        assert found.laps["a"].host_us == (7.0, 1.0, 2.0, 3.0, 100.0)
        assert len(found.seen) == FIXED_ROUNDS == 3
        assert found.laps["a"].calls == (14, 13, 13)


def test_of_calls_that_are_timed_together_fixed_still_counts_every_one():
    lane = Lane(times=(10.0, 20.0, 60.0))
    lane.calls_a_sample, lane.fallback = 5, "why"
    lap = go([lane], Protocol(name="fixed", warmup=50, iters=200)).laps["a"]
    assert [entry[1] for entry in rounds_of(lane.journal)] == [14, 13, 13]
    assert (lap.calls, lap.calls_a_sample) == ((14, 13, 13), (5, 5, 5))
    assert [item.samples for item in lap.rounds] == [[5, 5, 4], [5, 5, 3], [5, 5, 3]]
    assert len(lap.times_us) == 9, "a mean of five calls is one sample"
    assert (lap.timing_method, lap.fallback) == ("cuda_graph", "why")


def test_the_defaults_are_50_warm_ups_and_200_iterations():
    assert (make_protocol("fixed").warmup, make_protocol("fixed").iters) == (50, 200)


@pytest.mark.parametrize(
    ("iters", "counts"), [(1, [1]), (3, [3]), (39, [39]), (40, [20, 20]), (101, [21, 20, 20, 20, 20]), (200, [40] * 5)]
)
def test_fixed_deals_its_iterations_out_evenly_over_blocks_of_at_least_20(iters, counts):
    protocol = Protocol(name="fixed", warmup=0, iters=iters)
    assert protocol.fixed_counts == counts
    assert protocol.most_blocks == len(counts)
    lane = Lane()
    go([lane], protocol)
    sizes = [count for _, count, _ in rounds_of(lane.journal)]
    assert sum(sizes) == counts[0]
    assert len(sizes) == min(FIXED_ROUNDS, counts[0])
    assert max(sizes) - min(sizes) <= 1


def test_many_warm_ups_are_asked_for_in_pieces_whose_answers_are_no_larger_than_a_rounds():
    lane = Lane(times=(1.0,))
    go([lane], Protocol(name="fixed", warmup=2 * MAX_CALLS + 5, iters=20))
    pieces = [count for _, count, _ in lane.journal[:3]]
    assert sum(pieces) == 2 * MAX_CALLS + 5
    assert max(pieces) <= MAX_CALLS
    assert lane.journal[3][1] == "host"


@pytest.mark.parametrize("name", ["warmup", "iters"])
def test_more_calls_than_can_be_kept_are_refused(name):
    with pytest.raises(AttnbenchError, match=f"--{name} must be a whole number from . to 1,000,000, not 1000001"):
        Protocol(name="fixed", **{name: 1_000_001})


def test_without_warm_ups_fixed_asks_for_none():
    lane = Lane()
    go([lane], Protocol(name="fixed", warmup=0, iters=20))
    assert lane.journal[0] == ("a", "host", 5)


def test_fixed_ends_with_its_blocks_whatever_they_say():
    protocol = Protocol(name="fixed", iters=60)
    wide = blocks(a=[1.0, 9.0, 1.0], b=[9.0, 1.0, 9.0])
    assert [protocol.enough(wide[:n], "a") for n in (1, 2, 3)] == [False, False, True]


# adaptive


@pytest.mark.parametrize(
    ("call_us", "calls"), [(1.0, MAX_CALLS), (10.0, MAX_CALLS), (100.0, 1000), (10_000.0, 10), (1e6, MIN_CALLS)]
)
def test_an_adaptive_round_lasts_100_ms_within_2_and_10000_calls(call_us, calls):
    lane = Lane(times=(call_us,))
    found = go([lane], Protocol())
    assert [count for _, count, _ in rounds_of(lane.journal)] == [calls] * ROUNDS
    assert len(found.laps["a"].times_us) == calls * ROUNDS


@pytest.mark.parametrize(("call_us", "calls"), [(100.0, HOST_CALLS), (20_000.0, 5), (30_000.0, 3), (1e6, MIN_CALLS)])
def test_host_time_takes_five_calls_but_of_slow_ones_no_more_than_a_round(call_us, calls):
    lane = Lane(times=(call_us,))
    go([lane], Protocol())
    assert ("a", "host", calls) in lane.journal


def test_a_lane_whose_calls_are_known_is_warmed_up_by_its_rounds_alone():
    known, new = Lane("known", times=(1000.0,)), Lane("new", times=(1000.0,))
    go([known, new], Protocol(), known_us={"known": 500.0})
    assert known.journal[:3] == [("known", "host", HOST_CALLS), ("known", "warm", 0.02), ("known", 200, False)]
    assert new.journal[:4] == [
        ("new", "warm", 0.02),
        ("new", "host", HOST_CALLS),
        ("new", "warm", 0.02),
        ("new", 100, False),
    ]


def test_adaptive_warms_up_for_20_ms():
    lane = Lane()
    go([lane], Protocol())
    assert lane.journal[:2] == [("a", "warm", 0.02), ("a", "host", HOST_CALLS)]


def test_a_block_that_takes_its_share_of_the_budget_starts_no_other_round(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing.time, "monotonic", lambda: now[0])

    class Slow(Lane):
        def time_calls(self, count, *, cold):
            now[0] += 1.1
            return super().time_calls(count, cold=cold)

    for budget_s, rounds in ((5.0, 1), (10.0, 2), (20.0, 4)):  # a fifth of each is a block's share
        found = go([Slow()], Protocol(budget_s=budget_s))
        assert len(found.seen) == rounds
        assert found.spent_s == pytest.approx(1.1 * rounds)


@pytest.mark.parametrize("n", [1, 4, 6, 7])
def test_adaptive_looks_only_at_its_looks(n):
    assert not Protocol(budget_s=1e6).enough(blocks(a=[1.0] * n, b=[2.0] * n), "a")


def test_adaptive_stops_at_the_first_look_where_every_ratio_is_narrow():
    # Both vary by ±30%, and together: the ratio does not.
    wave = [1.0, 1.3, 0.7, 1.2, 0.8]
    assert Protocol().enough(blocks(a=wave, b=[2 * value for value in wave]), "a")
    assert not Protocol().enough(blocks(a=wave, b=[2.0] * 5), "a")
    assert not Protocol().enough(blocks(a=wave, b=[2 * value for value in wave], c=[3.0] * 5), "a")


def test_a_tie_that_is_narrow_stops_and_a_clear_win_that_is_wide_does_not():
    assert Protocol().enough(blocks(a=[1.0] * 5, b=[1.0] * 5), "a")
    assert not Protocol(budget_s=1e6).enough(blocks(a=[10.0] * 5, b=[1.0, 2.0, 1.0, 2.0, 1.0]), "a")


def test_a_ratios_interval_is_as_wide_as_its_hand_computed_value():
    # log ratios ±0.013, 8 of them: sd 0.01390, t(0.95, 7) 2.3646, half-width 0.01162; of 5 it is 0.01768.
    noisy = [2.0 * math.exp(0.013 * (-1) ** i) for i in range(8)]
    protocol = Protocol(budget_s=1e6)
    assert [protocol.enough(blocks(a=[1.0] * n, b=noisy[:n]), "a") for n in (5, 8)] == [False, True]


def test_adaptive_ends_with_its_last_look_or_its_budget_however_wide_the_intervals():
    wide = blocks(a=[1.0, 5.0] * 9, b=[5.0, 1.0] * 9)
    assert [Protocol(budget_s=1e6).enough(wide[:n], "a") for n in (12, 17, 18)] == [False, False, True]
    assert [Protocol(budget_s=7.0).enough(wide[:n], "a") for n in (3, 5, 6, 7)] == [False, False, False, True]
    assert [Protocol(budget_s=2.0).enough(wide[:n], "a") for n in (2, 4, 5)] == [False, False, True]


def test_alone_a_backend_is_looked_at_by_its_own_times():
    assert Protocol().enough(blocks(a=[1.0] * 5), "sdpa")
    assert not Protocol().enough(blocks(a=[1.0, 1.2, 0.9, 1.1, 1.0]), "sdpa")


@pytest.mark.parametrize("baseline", [None, "not_there"])
def test_without_the_baseline_ratios_are_to_the_fastest(baseline: str | None):
    wave = [1.0, 1.3, 0.7, 1.2, 0.8]
    assert Protocol().enough(blocks(a=wave, b=wave), baseline)
    steady_to_the_first = blocks(a=[2 * value for value in wave], b=[3 * value for value in wave], c=[0.1] * 5)
    assert not Protocol().enough(steady_to_the_first, baseline)


def test_a_backend_that_left_is_not_looked_at():
    steady = blocks(a=[1.0] * 5, b=[2.0] * 5, c=[1.0, 9.0, 1.0, 9.0, 1.0])
    last = dataclasses.replace(steady[-1], laps={name: steady[-1].laps[name] for name in "ab"})
    assert not Protocol().enough(steady, "a")
    assert Protocol().enough([*steady[:-1], last], "a")


# Rounds that were disturbed


def test_a_disturbed_round_is_thrown_away_for_all_and_taken_again():
    lanes = [Lane("a", times=range(1, 10**4)), Lane("b", times=range(1, 10**4))]
    found = go(lanes, Protocol(name="fixed", warmup=0, iters=3), watch=Watch(Seen(), BUSY, Seen(load=0.01)))
    assert [lap.times_us for lap in found.laps.values()] == [(1.0, 3.0, 4.0)] * 2
    assert found.dropped == (BUSY,)
    assert found.seen == (Seen(), Seen(load=0.01), Seen())


def test_on_a_machine_that_is_always_disturbed_rounds_are_kept_and_told_of():
    watch = Watch(*[BUSY] * 100)
    found = go([Lane()], Protocol(name="fixed", warmup=0, iters=3), watch=watch)
    assert found.dropped == (BUSY,) * MAX_DROPS
    assert found.seen == (BUSY,) * 3
    assert watch.started == MAX_DROPS + 3
    assert len(found.laps["a"].times_us) == 3


# Both


@pytest.mark.parametrize("protocol", [Protocol(name="fixed", iters=200), Protocol()], ids=["fixed", "adaptive"])
def test_lanes_take_turns_in_an_order_that_the_seed_decides(protocol):
    def order(seed):
        journal = []
        go([Lane(name, journal=journal) for name in "abcd"], protocol, seed=seed)
        taken = [name for name, *_ in rounds_of(journal)]
        return [tuple(taken[i : i + 4]) for i in range(0, len(taken), 4)]

    orders = [order(seed) for seed in range(10)]
    assert all(sorted(names) == list("abcd") for rounds in orders for names in rounds)
    assert len({names for rounds in orders for names in rounds}) > 10
    assert order(0) == orders[0]


def test_every_lane_is_warmed_up_before_any_is_timed():
    journal = []
    go([Lane(name, journal=journal) for name in "ab"], Protocol(name="fixed", warmup=9, iters=20))
    assert journal[:4] == [("a", 9, False), ("a", "host", 5), ("b", 9, False), ("b", "host", 5)]
    assert ("a", 9, False) not in journal[4:]


@pytest.mark.parametrize(
    "protocol", [Protocol(name="fixed", warmup=9, iters=20), Protocol()], ids=["fixed", "adaptive"]
)
def test_while_one_lane_is_timed_all_others_are_paused(protocol):
    lanes, seen = [], []

    class Watching(Lane):
        def time_calls(self, count, *, cold):
            seen.append([lane.paused for lane in lanes if lane is not self and lane.asked])
            return super().time_calls(count, cold=cold)

    lanes += [Watching(name) for name in "abc"]
    go(lanes, protocol)
    assert all(map(all, seen))
    assert max(map(len, seen)) == 2
    assert all(lane.paused for lane in lanes)


def test_a_round_starts_with_an_untimed_warm_up_that_brings_caches_and_threads_back():
    journal = []
    found = go([Lane(name, journal=journal) for name in "ab"], Protocol(name="fixed", warmup=9, iters=21))
    for before, taken in zip(journal[4::2], journal[5::2]):
        assert before == (taken[0], "warm", 0.02)
        assert taken[1:] == (7, False)
    assert len(journal[4:]) == 2 * 2 * FIXED_ROUNDS
    assert len(found.laps["a"].times_us) == 21


@pytest.mark.parametrize("name", ["fixed", "adaptive"])
def test_a_cold_round_is_timed_cold(name):
    lane = Lane()
    go([lane], Protocol(name=name, cache="cold", warmup=9, iters=20))
    assert all(cold for _, _, cold in rounds_of(lane.journal))


@pytest.mark.parametrize("fail_at", [1, 2, 3, 7], ids=lambda n: f"call {n}")
def test_a_lane_that_fails_is_dropped_and_reported_and_the_rest_go_on(fail_at):
    failures = []
    lanes = [Lane("a"), Lane("bad", fail_at=fail_at), Lane("c")]
    found = go(lanes, Protocol(name="fixed", warmup=5, iters=20), failures=failures)
    assert failures == [("bad", "bad broke")]
    assert {name: len(lap.times_us) for name, lap in found.laps.items()} == {"a": 20, "c": 20}
    assert lanes[1].asked == fail_at


def test_when_every_lane_failed_there_is_no_block():
    failures = []
    assert go([Lane("a", fail_at=1), Lane("b", fail_at=4)], Protocol(), failures=failures) is None
    assert [name for name, _ in failures] == ["a", "b"]


def test_an_exception_that_is_not_expected_is_not_swallowed():
    class Bug(Exception):
        pass

    lane = Lane()
    lane.host_us = lambda count: (_ for _ in ()).throw(Bug("mine"))
    with pytest.raises(Bug, match="mine"):
        go([lane], Protocol())


# Options


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, Protocol(name="adaptive")),
        ({"name": "adaptive", "budget_s": 3.0}, Protocol(name="adaptive", budget_s=3.0)),
        ({"name": "fixed"}, Protocol(name="fixed")),
        ({"iters": 7}, Protocol(name="fixed", iters=7)),
        ({"warmup": 0}, Protocol(name="fixed", warmup=0)),
        ({"name": "fixed", "warmup": 1, "iters": 2}, Protocol(name="fixed", warmup=1, iters=2)),
        ({"cache": "cold"}, Protocol(name="adaptive", cache="cold")),
    ],
)
def test_make_protocol_gives_what_was_asked_for(options, expected):
    assert make_protocol(**options) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iters": 0}, "--iters must be a whole number from 1 to 1,000,000, not 0"),
        ({"iters": -1}, "--iters must be a whole number from 1 to 1,000,000, not -1"),
        ({"iters": 1.5}, "--iters must be a whole number from 1 to 1,000,000, not 1.5"),
        ({"iters": True}, "--iters must be a whole number from 1 to 1,000,000, not True"),
        ({"warmup": -1}, "--warmup must be a whole number from 0 to 1,000,000, not -1"),
        ({"budget_s": 0}, "--budget must be a number of seconds above 0, not 0"),
        ({"budget_s": -1}, "--budget must be a number of seconds above 0, not -1"),
        ({"budget_s": float("nan")}, "--budget must be a number of seconds above 0, not nan"),
        ({"budget_s": float("inf")}, "--budget must be a number of seconds above 0, not inf"),
        ({"name": "adaptive", "iters": 5}, "--iters belongs to --protocol fixed"),
        ({"name": "adaptive", "warmup": 5}, "--warmup belongs to --protocol fixed"),
        ({"name": "fixed", "budget_s": 5}, "--budget belongs to --protocol adaptive"),
        ({"iters": 5, "budget_s": 5}, "--budget belongs to --protocol adaptive"),
        ({"name": "fast"}, "no protocol is called 'fast'"),
        ({"name": "fast", "iters": 3}, "no protocol is called 'fast'"),
        ({"cache": "warm"}, "no cache is called 'warm'"),
    ],
)
def test_make_protocol_says_what_is_wrong(options, message):
    with pytest.raises(AttnbenchError) as caught:
        make_protocol(**options)
    assert caught.value.message == message
    assert caught.value.exit_code == 2


def test_a_wrong_choice_is_told_the_right_ones():
    for options, hint in (({"name": "fast"}, "choose adaptive or fixed"), ({"cache": "x"}, "choose hot or cold")):
        with pytest.raises(AttnbenchError) as caught:
            make_protocol(**options)
        assert caught.value.hint == hint


def test_the_statistic_is_the_mean_under_fixed_and_the_median_under_adaptive():
    assert (Protocol(name="fixed").statistic, Protocol(name="adaptive").statistic) == ("mean", "median")


def test_a_protocol_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Protocol().iters = 3  # type: ignore[misc]
