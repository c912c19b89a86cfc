"""attnbench.protocol: how many calls are timed, in which order, when it stops, and what a bad option is told."""

from __future__ import annotations

import dataclasses
import itertools
import statistics

import pytest

from attnbench import protocol as timing
from attnbench.errors import AttnbenchError
from attnbench.protocol import (
    FIXED_ROUNDS,
    HOST_CALLS,
    LOOKS,
    MAX_CALLS,
    MIN_CALLS,
    WARM_UP_S,
    Protocol,
    make_protocol,
    measure,
)


class Broken(Exception):
    pass


class Lane:
    """A lane whose calls take the times it is told, and which writes down what it is asked."""

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
        return [next(self.times) for _ in range(count)]

    def pause(self):
        self.paused = True

    def host_us(self, count):
        self.journal.append((self.name, "host", count))
        return [7.0, 1.0, 2.0, 3.0, 100.0][:count]


def go(lanes, protocol, *, seed=0, clock=lambda: None, failures=None):
    return measure(
        {lane.name: lane for lane in lanes},
        protocol,
        seed=seed,
        timing_method="fake_clock",
        clock_mhz=clock,
        expected=Broken,
        failed=lambda name, error: (failures if failures is not None else []).append((name, str(error))),
    )


def blocks_of(journal):
    """The timed blocks in a journal, in the order taken: what is not a warm-up or a host time."""
    rounds = journal[[i for i, entry in enumerate(journal) if entry[1] == "host"][-1] + 1 :]
    return [entry for entry in rounds if entry[1] != "warm"]


# fixed


def test_fixed_times_exactly_its_iterations_after_its_warm_ups():
    lane = Lane(times=(10.0, 20.0, 60.0))
    found = go([lane], Protocol(name="fixed", warmup=50, iters=200))["a"]
    assert lane.journal[:2] == [("a", 50, False), ("a", "host", HOST_CALLS)]
    assert lane.journal[2:] == [("a", "warm", WARM_UP_S), ("a", 20, False)] * FIXED_ROUNDS
    assert (len(found.samples), len(found.blocks)) == (200, FIXED_ROUNDS)
    assert found.statistic == "mean"
    assert found.time_us == pytest.approx(statistics.fmean(found.samples))
    assert found.timing_method == "fake_clock"
    assert found.cache == "hot"


def test_the_defaults_are_50_warm_ups_and_200_iterations():
    assert (make_protocol("fixed").warmup, make_protocol("fixed").iters) == (50, 200)


@pytest.mark.parametrize("iters", [1, 3, 10, 13, 29, 200])
def test_fixed_deals_its_iterations_out_evenly(iters):
    found = go([Lane()], Protocol(name="fixed", warmup=0, iters=iters))["a"]
    sizes = [len(block) for block in found.blocks]
    assert sum(sizes) == iters
    assert len(sizes) == min(FIXED_ROUNDS, iters)
    assert max(sizes) - min(sizes) <= 1


def test_without_warm_ups_fixed_asks_for_none():
    lane = Lane()
    go([lane], Protocol(name="fixed", warmup=0, iters=20))
    assert lane.journal[0] == ("a", "host", HOST_CALLS)


# adaptive


def test_adaptive_stops_at_the_first_look_where_every_interval_is_narrow():
    found = go([Lane("a"), Lane("b", times=(50.0, 50.1))], Protocol())
    assert {len(m.blocks) for m in found.values()} == {LOOKS[0]}
    assert found["a"].statistic == "median"
    assert found["a"].time_us == 100.0


class Noisy(Lane):
    """Its blocks' medians differ by `spread` of 100 µs, each in its turn, for the first `blocks` blocks."""

    def __init__(self, name, spread, blocks=10**6):
        super().__init__(name)
        self.spread, self.left = spread, blocks

    def time_calls(self, count, *, cold):
        self.journal.append((self.name, count, cold))
        if count <= MIN_CALLS:
            return [100.0] * count
        self.left -= 1
        return [100.0 + (self.spread * (-1) ** self.left if self.left >= 0 else 0.0)] * count


def test_adaptive_goes_on_until_the_noisiest_lane_is_narrow():
    # Half-widths of ±3 µs alternating: 3.9% of 5 blocks, 2.6% of 8, 1.9% of 12.
    found = go([Lane("calm"), Noisy("noisy", 3.0)], Protocol(budget_s=1e6))
    assert {name: len(m.blocks) for name, m in found.items()} == {"calm": 12, "noisy": 12}
    for look, narrow in ((5, False), (8, False), (12, True)):
        assert timing._narrow([statistics.median(b) for b in found["noisy"].blocks[:look]]) is narrow


def test_adaptive_ends_with_its_last_look_however_wide_the_intervals():
    found = go([Lane("calm"), Noisy("noisy", 50.0)], Protocol(budget_s=1e6))
    assert {len(m.blocks) for m in found.values()} == {LOOKS[-1]}


@pytest.mark.parametrize(("seconds_a_round", "blocks"), [(1000.0, LOOKS[0]), (1.5, 7), (1.0, 11), (0.1, LOOKS[-1])])
def test_adaptive_starts_no_other_round_when_its_budget_is_spent(monkeypatch, seconds_a_round, blocks):
    now = [0.0]
    monkeypatch.setattr(timing.time, "monotonic", lambda: now[0])
    noisy = Noisy("noisy", 50.0)

    def read_clock():  # once a round
        now[0] += seconds_a_round

    found = go([Lane("calm"), noisy], Protocol(budget_s=10.5), clock=read_clock)
    assert {len(m.blocks) for m in found.values()} == {blocks}


@pytest.mark.parametrize(
    ("call_us", "calls"),
    [(1.0, MAX_CALLS), (100.0, 500), (10_000.0, 5), (1e6, MIN_CALLS)],
)
def test_an_adaptive_block_lasts_50_ms_within_3_and_1000_calls(call_us, calls):
    found = go([Lane(times=(call_us,))], Protocol())["a"]
    assert [len(block) for block in found.blocks] == [calls] * LOOKS[0]


def test_adaptive_warms_up_for_20_ms():
    lane = Lane()
    go([lane], Protocol())
    assert lane.journal[:2] == [("a", "warm", 0.02), ("a", "host", HOST_CALLS)]


# Both


@pytest.mark.parametrize("protocol", [Protocol(name="fixed", iters=200), Protocol()], ids=["fixed", "adaptive"])
def test_lanes_take_turns_in_another_order_each_round_that_the_seed_decides(protocol):
    def order(seed):
        journal = []
        found = go([Lane(name, journal=journal) for name in "abcd"], protocol, seed=seed)
        taken = [name for name, *_ in blocks_of(journal)]
        assert {len(m.blocks) for m in found.values()} == {len(taken) // 4}
        return [tuple(taken[i : i + 4]) for i in range(0, len(taken), 4)]

    rounds = order(0)
    assert all(sorted(names) == list("abcd") for names in rounds)
    assert len(set(rounds)) > len(rounds) // 2
    assert order(0) == rounds != order(1)


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


def test_a_block_starts_with_an_untimed_warm_up_that_brings_caches_and_threads_back():
    journal = []
    found = go([Lane(name, journal=journal) for name in "ab"], Protocol(name="fixed", warmup=9, iters=20))
    for before, block in zip(journal[4::2], journal[5::2]):
        assert before == (block[0], "warm", 0.02)
        assert block[1:] == (2, False)
    assert len(journal[4:]) == 2 * 2 * FIXED_ROUNDS
    assert len(found["a"].samples) == 20


@pytest.mark.parametrize("name", ["fixed", "adaptive"])
def test_a_cold_block_is_timed_cold(name):
    lane = Lane()
    found = go([lane], Protocol(name=name, cache="cold", warmup=9, iters=20))["a"]
    rounds = blocks_of(lane.journal)
    assert all(cold for _, _, cold in rounds)
    assert len(rounds) == len(found.blocks)
    assert found.cache == "cold"


@pytest.mark.parametrize("fail_at", [1, 2, 3, 7], ids=lambda n: f"call {n}")
def test_a_lane_that_fails_is_dropped_and_reported_and_the_rest_go_on(fail_at):
    failures = []
    lanes = [Lane("a"), Lane("bad", fail_at=fail_at), Lane("c")]
    found = go(lanes, Protocol(name="fixed", warmup=5, iters=100), failures=failures)
    assert failures == [("bad", "bad broke")]
    assert set(found) == {"a", "c"}
    assert {len(m.samples) for m in found.values()} == {100}
    assert lanes[1].asked == fail_at


def test_when_every_lane_failed_nothing_is_measured():
    failures = []
    assert go([Lane("a", fail_at=1), Lane("b", fail_at=4)], Protocol(), failures=failures) == {}
    assert [name for name, _ in failures] == ["a", "b"]


def test_an_exception_that_is_not_expected_is_not_swallowed():
    class Bug(Exception):
        pass

    lane = Lane()
    lane.host_us = lambda count: (_ for _ in ()).throw(Bug("mine"))
    with pytest.raises(Bug, match="mine"):
        go([lane], Protocol())


def test_host_us_is_the_median_of_its_calls():
    assert go([Lane()], Protocol())["a"].host_us == 3.0


def test_the_clock_is_the_median_of_readings_around_the_rounds():
    readings = iter([1000.0, 2000.0, None, 1500.0, 1600.0, *[None] * 20])
    found = go([Lane("a"), Lane("b")], Protocol(), clock=lambda: next(readings))
    assert {m.clock_mhz for m in found.values()} == {1550.0}


def test_a_device_that_tells_no_clock_leaves_it_open():
    assert go([Lane()], Protocol())["a"].clock_mhz is None


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
        ({"iters": 0}, "--iters must be a whole number of at least 1, not 0"),
        ({"iters": -1}, "--iters must be a whole number of at least 1, not -1"),
        ({"iters": 1.5}, "--iters must be a whole number of at least 1, not 1.5"),
        ({"iters": True}, "--iters must be a whole number of at least 1, not True"),
        ({"warmup": -1}, "--warmup must be a whole number of at least 0, not -1"),
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


def test_time_us_is_the_mean_under_fixed_and_the_median_under_adaptive():
    assert (Protocol(name="fixed").statistic, Protocol(name="adaptive").statistic) == ("mean", "median")
    times = (100.0, 100.0, 100.0, 100.0, 200.0)
    fixed = go([Lane(times=times)], Protocol(name="fixed", warmup=0, iters=200))["a"]
    assert fixed.time_us == pytest.approx(120, rel=0.02)
    assert go([Lane(times=times)], Protocol())["a"].time_us == 100.0


def test_a_protocol_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Protocol().iters = 3  # type: ignore[misc]
