"""Owns what makes a round of timing a disturbed one: other programs, a hypervisor's steal, a throttling device."""

from __future__ import annotations

from attnbench import contention
from attnbench.blocks import Seen
from attnbench.devices import Device, Reading

MAX_OTHERS, MAX_OTHERS_CORES = 0.1, 1.0
"""Share of the processors that others may use, and no more than so many cores of many: with one of two cores taken,
OpenMP's barriers made a 40 µs call take 8 ms."""
MAX_STEAL = 0.05


class MachineWatch:
    """Reads the machine before and after each round."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._before: contention.Load | None = None
        self._reading = Reading()

    def start(self) -> None:
        self._reading = self._device.reading()
        self._before = contention.sample()

    def stop(self) -> Seen:
        after = contention.sample()
        readings = (self._reading, self._device.reading())
        share = contention.between(self._before, after) if self._before and after else None
        causes = [f"throttling ({why})" for why in dict.fromkeys(why for r in readings for why in r.throttled)]
        if share is not None and share.others > min(MAX_OTHERS, MAX_OTHERS_CORES / share.processors):
            causes.append("other programs")
        if share is not None and share.steal > MAX_STEAL:
            causes.append("steal by the hypervisor")
        clocks = [reading.clock_mhz for reading in readings if reading.clock_mhz is not None]
        heat = [reading.temperature_c for reading in readings if reading.temperature_c is not None]
        return Seen(
            load=round(share.others, 4) if share else None,
            steal=round(share.steal, 4) if share else None,
            clock_mhz=max(clocks, default=None),
            temperature_c=max(heat, default=None),
            causes=tuple(causes),
        )
