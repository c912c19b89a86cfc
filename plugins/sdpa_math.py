"""torch's attention of single operations, to which scaled_dot_product_attention falls back, on cpu and cuda.

It takes everything. Keys and values of grouped heads are copied for each query head, at each call.
"""

from __future__ import annotations

from collections.abc import Iterable

from attnbench import Backend, hookimpl
from attnbench.problem import DeviceKind
from attnbench_plugins.sdpa_kernels import SdpaKernel


@hookimpl
def attnbench_backends() -> Iterable[Backend]:
    devices: tuple[DeviceKind, ...] = ("cpu", "cuda")
    return [SdpaKernel("sdpa_math", "MATH", lambda problem: None, zeros=True, device=device) for device in devices]
