"""attnbench.watch: what makes a round a disturbed one, and what is written down of it."""

from __future__ import annotations

import pytest

from attnbench import contention, watch
from attnbench.blocks import Seen
from attnbench.contention import Load
from attnbench.devices import Reading
from attnbench.watch import MachineWatch


class Device:
    """A device that tells the readings it is given, one after another."""

    def __init__(self, *readings: Reading) -> None:
        self._readings = iter(readings)

    def reading(self) -> Reading:
        return next(self._readings)


@pytest.fixture
def seen(monkeypatch):
    """What a round gives in which these ticks of 1000 were others' and stolen."""

    def make(others: int, steal: int, *readings: Reading, processors: int = 8) -> Seen:
        loads = iter(
            [
                Load(processors=processors, total=0, idle=0, steal=0, own=0),
                Load(processors=processors, total=1000, idle=500 - others - steal, steal=steal, own=500),
            ]
        )
        monkeypatch.setattr(contention, "sample", lambda: next(loads))
        found = MachineWatch(Device(*(readings or (Reading(), Reading()))))  # type: ignore[arg-type]
        found.start()
        return found.stop()

    return make


@pytest.mark.parametrize(
    ("others", "steal", "causes"),
    [
        (0, 0, ()),
        (100, 50, ()),
        (101, 0, ("other programs",)),
        (0, 51, ("steal by the hypervisor",)),
        (200, 200, ("other programs", "steal by the hypervisor")),
    ],
)
def test_a_tenth_of_load_and_a_twentieth_of_steal_are_borne(seen, others, steal, causes):
    found = seen(others, steal)
    assert found.causes == causes
    assert (found.load, found.steal) == (others / 1000, steal / 1000)


@pytest.mark.parametrize(("processors", "borne"), [(2, 100), (10, 100), (64, 15)])
def test_of_many_processors_others_may_have_one_at_most(seen, processors, borne):
    assert seen(borne, 0, processors=processors).causes == ()
    assert seen(borne + 1, 0, processors=processors).causes == ("other programs",)


def test_a_device_that_throttles_before_or_after_disturbs_the_round(seen):
    calm, hot = Reading(clock_mhz=1500.0, temperature_c=60.0), Reading(temperature_c=85.0, throttled=("heat",))
    for readings in ((calm, hot), (hot, calm)):
        found = seen(0, 0, *readings)
        assert found.causes == ("throttling (heat)",)
        assert (found.clock_mhz, found.temperature_c) == (1500.0, 85.0)
    assert seen(0, 0, hot, hot).causes == ("throttling (heat)",)


def test_where_nothing_can_be_read_nothing_disturbs(monkeypatch):
    monkeypatch.setattr(watch.contention, "sample", lambda: None)
    found = MachineWatch(Device(Reading(), Reading()))  # type: ignore[arg-type]
    found.start()
    assert found.stop() == Seen()
