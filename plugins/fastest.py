"""The fastest of several calls that compute the same, found by trying. Knows no library and no problem.

For plugins whose library leaves a choice (splits, tiles, kernels) that no rule of its own makes well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, cast

from attnbench.problem import DeviceKind

if TYPE_CHECKING:
    from torch import Tensor

ROUNDS = 3
CALLS_A_ROUND = 10
"""On a GPU one replay of a graph, or a few where a call is long. Neither number was measured: a clock that is still low
in the first round has risen by the last, and a choice costs some milliseconds."""


def fastest(calls: Iterable[Callable[[], Tensor]]) -> Callable[[], Tensor]:
    """The call that takes its device least time, timed as attnbench will time it: by graph on a GPU, caches hot.

    All are called once first, so that what compiles at a first call has. Those that raise are left out; where all do,
    what the first raised is raised. One that cannot be captured comes after all that can. One call alone is not timed.
    A tie goes to the earlier, so the library's own choice should come first. Raises ValueError where there are none.
    """
    from attnbench.devices import device

    working: list[Callable[[], Tensor]] = []
    errors: list[Exception] = []
    where = ""
    for call in calls:
        try:
            where = call().device.type
        except Exception as error:
            errors.append(error)
        else:
            working.append(call)
    if not working:
        raise errors[0] if errors else ValueError("no calls to choose from")
    if len(working) == 1:
        return working[0]
    timer = device(cast(DeviceKind, where))
    # Rounds are interleaved, and the best of each call counts: the first may find the device's clock still low.
    times: list[list[tuple[bool, float]]] = [[] for _ in working]
    try:
        for _ in range(ROUNDS):
            for call, found in zip(working, times):
                timing = timer.time_calls(call, CALLS_A_ROUND, cold=False)
                found.append((bool(timing.fallback), min(timing.times_us)))
    finally:
        for call in working:
            timer.forget(call)
    return working[min(range(len(working)), key=lambda index: min(times[index]))]
