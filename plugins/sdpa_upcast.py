"""torch's scaled_dot_product_attention in fp32 on fp16 and bf16: two lines of torch that other kernels have to beat.

Knows nothing of masks and groups, which `sdpa` does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from attnbench import Backend, Problem, hookimpl
from attnbench.problem import DeviceKind
from attnbench_plugins.sdpa import Sdpa

if TYPE_CHECKING:
    from torch import Tensor


class SdpaUpcast(Backend):
    """Casts q, k and v to fp32 and the output back at each call. The fp32 tensors are allocated once."""

    name = "sdpa_upcast"
    device: DeviceKind = "cpu"
    summary = "sdpa in fp32 on fp16 and bf16, with both casts timed"

    def __init__(self) -> None:
        self._sdpa: Backend = Sdpa("cpu")
        self.homepage = self._sdpa.homepage

    def unavailable(self) -> str | None:
        return self._sdpa.unavailable()

    def unsupported(self, problem: Problem) -> str | None:
        return "nothing to upcast" if problem.dtype == "fp32" else self._sdpa.unsupported(problem)

    def prepare(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        narrow = (q, k, v)
        wide = [tensor.float() for tensor in narrow]
        attend = self._sdpa.prepare(dataclasses.replace(problem, dtype="fp32"), *wide)

        def call() -> Tensor:
            for target, source in zip(wide, narrow):
                target.copy_(source)
            return attend().to(q.dtype)

        return call

    def parallel_units(self, problem: Problem) -> int | None:
        return self._sdpa.parallel_units(problem)


@hookimpl
def attnbench_backends() -> Iterable[Backend]:
    return [SdpaUpcast()]
