"""attnbench.blocks: what blocks make of a measurement, and that they survive being written down."""

from __future__ import annotations

import json

import pytest

from attnbench.blocks import Block, How, Lap, Progress, Seen, Verdict, measurement
from attnbench.problem import Problem
from attnbench.result import Check, Status

HOW = How("cpu", "host_clock", "median", "hot")
CHECK = Check(max_abs_err=0.0, err_budget=1e-6, classic_ok=True, inputs="normal", rows_checked=8, rows_total=8)
BUSY = Seen(load=0.4, steal=0.02, clock_mhz=2000.0, temperature_c=60.0, causes=("other programs",))
CALM = Seen(load=0.1, steal=0.0, clock_mhz=3000.0, temperature_c=50.0)
BLOCKS = (
    Block(laps={"a": Lap(times_us=(1.0, 2.0), host_us=(5.0, 7.0))}, seen=(CALM, CALM), dropped=(BUSY,), spent_s=1.0),
    Block(laps={"a": Lap(times_us=(3.0,), host_us=(6.0,))}, seen=(CALM, BUSY), spent_s=2.5),
)


def test_a_measurement_is_of_all_blocks():
    found = measurement(BLOCKS, "a", HOW)
    assert found.blocks == ((1.0, 2.0), (3.0,))
    assert (found.statistic, found.timing_method, found.cache) == ("median", "host_clock", "hot")
    assert found.host_us == 6.0
    assert found.clock_mhz == 3000.0
    conditions = found.conditions
    assert conditions is not None
    assert (conditions.rounds, conditions.rounds_dropped, conditions.rounds_disturbed) == (4, 1, 1)
    assert conditions.causes == ("other programs",)
    assert (conditions.load, conditions.steal, conditions.temperature_c) == (0.1, 0.0, 60.0)


def test_what_cannot_be_read_stays_open():
    found = measurement([Block(laps=BLOCKS[0].laps, seen=(Seen(),), spent_s=1.0)], "a", HOW)
    assert found.clock_mhz is None
    assert found.conditions is not None
    assert (found.conditions.load, found.conditions.steal, found.conditions.temperature_c) == (None, None, None)


@pytest.mark.parametrize("block", BLOCKS)
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
