"""attnbench.blocks: what blocks make of a measurement, and that they survive being written down."""

from __future__ import annotations

import itertools
import json
import statistics

import pytest

from attnbench.blocks import Block, How, Lap, Progress, Seen, Verdict, measurement
from attnbench.problem import Problem
from attnbench.result import Check, Status

HOW = How("cpu", "median", "hot")
CHECK = Check(max_abs_err=0.0, err_budget=1e-6, classic_ok=True, inputs="normal", rows_checked=8, rows_total=8)
BUSY = Seen(load=0.4, steal=0.02, clock_mhz=2000.0, temperature_c=60.0, causes=("other programs",))
CALM = Seen(load=0.1, steal=0.0, clock_mhz=3000.0, temperature_c=50.0)


def lap(times_us: tuple[float, ...], calls: tuple[int, ...], host_us: tuple[float, ...] = (), **how: object) -> Lap:
    return Lap(times_us=times_us, calls=calls, host_us=host_us, **{"timing_method": "host_clock", **how})


BLOCKS = (
    Block(
        laps={"a": lap((1.0, 2.0), (1, 1), (5.0, 7.0))},
        seen=(CALM, CALM),
        dropped=(BUSY,),
        spent_s=1.0,
    ),
    Block(laps={"a": lap((3.0,), (1,), (6.0,))}, seen=(CALM, BUSY), spent_s=2.5),
)


def test_a_measurement_is_of_all_blocks():
    found = measurement(BLOCKS, "a", HOW)
    assert found.blocks == ((1.0, 2.0), (3.0,))
    assert [[item.calls for item in rounds] for rounds in found.rounds] == [[1, 1], [1]]
    assert (found.statistic, found.timing_method, found.cache) == ("median", "host_clock", "hot")
    assert found.host_us == 6.0
    assert found.clock_mhz == 3000.0
    conditions = found.conditions
    assert conditions is not None
    assert (conditions.rounds, conditions.rounds_dropped, conditions.rounds_disturbed) == (4, 1, 1)
    assert conditions.causes == ("other programs",)
    assert (conditions.load, conditions.steal, conditions.temperature_c) == (0.1, 0.0, 60.0)


def block_of(**rounds: list[list[float]]) -> Block:
    """A block in whose rounds the backends' calls take the times given."""
    laps = {name: lap(tuple(itertools.chain(*times)), tuple(map(len, times))) for name, times in rounds.items()}
    return Block(laps=laps, seen=(CALM,), spent_s=1.0)


def test_a_backend_alone_takes_the_median_of_its_rounds():
    alone = block_of(a=[[9.0, 1.0, 3.0], [5.0], [4.0, 4.0]])
    assert alone.time_us("a") == pytest.approx(4.0, rel=1e-5)
    assert [item.pace for item in alone.rounds("a")] == pytest.approx([0.75, 1.25, 1.0], rel=1e-5)


def test_of_two_backends_the_ratio_is_the_median_of_the_rounds_ratios():
    """The machine stepped to half its speed in the middle of the third round: a lost that round, and no more."""
    stepped = block_of(a=[[10.0], [10.2], [20.0], [20.0], [20.4]], b=[[5.0], [5.0], [5.0], [10.0], [10.0]])
    ratios = [2.0, 2.04, 4.0, 2.0, 2.04]
    assert stepped.time_us("a") / stepped.time_us("b") == pytest.approx(statistics.median(ratios), rel=1e-5)
    pooled = 20.0 / 5.0  # of the medians of all calls
    assert pooled != pytest.approx(2.04, rel=0.5)


def test_what_slowed_all_backends_in_a_round_changes_no_ratio():
    times = {"a": 3.0, "b": 5.0, "c": 11.0}
    calm = block_of(**{name: [[time]] * 4 for name, time in times.items()})
    paces = (1.0, 1.5, 0.6, 7.0)
    rough = block_of(**{name: [[time * pace] for pace in paces] for name, time in times.items()})
    for name in times:
        assert rough.time_us(name) / rough.time_us("a") == pytest.approx(calm.time_us(name) / calm.time_us("a"))


def test_a_backend_of_two_speeds_moves_no_others_time():
    """C is 200 times slower in half of the rounds: of an even number, the middle two are as far apart as can be."""
    rough = block_of(a=[[100.0]] * 8, b=[[110.0]] * 8, c=[[40.0]] * 4 + [[8000.0]] * 4)
    assert rough.time_us("a") == pytest.approx(100.0)
    assert rough.time_us("b") == pytest.approx(110.0)


def test_times_that_are_worlds_apart_have_a_pace_all_the_same():
    wild = block_of(a=[[0.001]] * 3 + [[5000.0]] * 5, b=[[1e9]] * 3 + [[0.001]] * 5)
    assert all(item.pace > 0 for item in wild.rounds("a"))
    assert measurement([wild], "a", HOW).time_us > 0


def test_a_measurement_has_the_blocks_times():
    taken = [block_of(a=[[1.0, 2.0], [3.0]], b=[[4.0], [1.0]]), block_of(a=[[2.0]], b=[[6.0]])]
    for name in "ab":
        assert measurement(taken, name, HOW).block_times_us == tuple(block.time_us(name) for block in taken)


@pytest.mark.parametrize(
    ("laps", "words"),
    [
        ({"a": lap((1.0, 2.0), (1,))}, "its times"),
        ({"a": lap((1.0, 2.0), (2,), calls_a_sample=(2,))}, "its times"),
        ({"a": lap((1.0, 2.0), (1, 1), calls_a_sample=(1,))}, "of every round"),
        (
            {
                "a": lap((1.0, 2.0), (2,)),
                "b": lap((1.0, 2.0), (1, 1)),
            },
            "same rounds",
        ),
    ],
)
def test_laps_that_do_not_fit_make_no_block(laps, words):
    with pytest.raises(ValueError, match=words):
        Block(laps=laps, seen=(), spent_s=1.0)


def test_what_cannot_be_read_stays_open():
    found = measurement([Block(laps=BLOCKS[0].laps, seen=(Seen(),), spent_s=1.0)], "a", HOW)
    assert found.clock_mhz is None
    assert found.conditions is not None
    assert (found.conditions.load, found.conditions.steal, found.conditions.temperature_c) == (None, None, None)


TOGETHER = Block(
    laps={
        "a": lap((1.0, 2.0, 9.0), (5, 3), timing_method="cuda_graph", calls_a_sample=(3, 3)),
        "b": lap((4.0,) * 8, (5, 3), timing_method="device_events", fallback="why"),
    },
    seen=(CALM, CALM),
    spent_s=1.0,
)
"""Of a, five calls in two samples and three in one; of b every call alone."""


def test_calls_that_were_timed_together_are_one_sample():
    assert [item.samples for item in TOGETHER.rounds("a")] == [[3, 2], [3]]
    assert TOGETHER.time_us("a") == pytest.approx((1.5 * 9.0) ** 0.5)
    found = measurement([TOGETHER], "a", How("cuda", "mean", "hot"))
    assert (found.timing_method, found.fallback, len(found.samples)) == ("cuda_graph", "", 3)
    assert found.time_us == pytest.approx((3 * 1.0 + 2 * 2.0 + 3 * 9.0) / 8)
    other = measurement([TOGETHER], "b", HOW)
    assert (other.timing_method, other.fallback) == ("device_events", "why")


@pytest.mark.parametrize("block", [*BLOCKS, TOGETHER])
def test_a_block_survives_json(block):
    assert Block.from_json(json.loads(json.dumps(block.to_json()))) == block


def test_a_block_with_an_unknown_field_is_none():
    data = json.loads(json.dumps(BLOCKS[0].to_json()))
    data["seen"][0]["weather"] = "fine"
    with pytest.raises(TypeError):
        Block.from_json(data)


def test_timed_gives_a_result_for_every_backend_that_is_still_in_it():
    problem = Problem(seqlen_q=8, seqlen_k=8, dtype="fp32")
    progress = Progress(problem=problem, verdicts={"a": Verdict(check=CHECK, used_cores=2)}, blocks=list(BLOCKS))
    (result,) = progress.timed(HOW)
    assert (result.backend, result.device, result.status) == ("a", "cpu", Status.PASSED)
    assert (result.check, result.used_cores) == (CHECK, 2)
    assert result.measurement == measurement(BLOCKS, "a", HOW)
