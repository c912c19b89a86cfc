"""How JAX starts, and how it sees torch's memory, in place. Knows no attention.

JAX takes an array to be immutable, but reads its memory at each call of a jitted function: what torch writes there
between two calls is seen, and nothing is copied.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from attnbench.problem import DeviceKind

if TYPE_CHECKING:
    from torch import Tensor

CALLS, ROUNDS = 10, 3
"""How often a candidate is called to see how fast it is: the shortest of three loops of ten calls."""
NOT_CAPTURED = "XLA runs on streams of its own, which a CUDA graph cannot hold"


def jax_on(device: DeviceKind) -> Any:
    """jax for that device. What is set here counts where this process has not imported or used jax before."""
    import torch

    os.environ.setdefault("JAX_PLATFORMS", device)
    # XLA would take three quarters of a GPU's memory at once.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # The threads of XLA's CPU client, whose only setting this is; the name depends on the version.
    os.environ["NPROC"] = os.environ["PJRT_NPROC"] = str(torch.get_num_threads())
    import jax

    return jax


def view(tensor: Tensor) -> Any:
    """A jax.Array in the tensor's memory. Raises ValueError where that is not aligned as XLA wants it.

    On a GPU, XLA's stream first waits for all that torch's current stream has been given so far.
    """
    import jax

    return jax.dlpack.from_dlpack(tensor, copy=False)


def on_torchs_stream(attend: Callable[..., Any], q: Tensor, *others: Any) -> Callable[[], Tensor]:
    """A call of `attend` on q and what others it takes, between what torch's current stream does before and after.

    The host waits for nothing: importing q makes XLA's stream wait for torch's, so that k and v are as torch left them,
    too, and exporting the output makes torch's wait for XLA's. Raises RuntimeError in a capture.
    """
    import torch
    from torch.utils.dlpack import from_dlpack

    def call() -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(NOT_CAPTURED)
        output: Tensor = from_dlpack(attend(view(q), *others))
        return output

    return call


def fastest(candidates: Sequence[Callable[..., Any]], q: Any, *others: Any) -> Callable[..., Any]:
    """The candidate that is fastest on these arrays, jitted; those that do not compile are out.

    Each is timed in a loop on the device, where its output, of q's shape, is the next q: a call is shorter than what
    the host takes for it. Raises what the last one raised where none is left.
    """
    import jax

    if len(candidates) == 1:
        return cast(Callable[..., Any], jax.jit(candidates[0]))
    times: dict[int, float] = {}
    error: Exception | None = None
    for index, candidate in enumerate(candidates):
        looped = jax.jit(lambda q, *others, attend=candidate: _repeated(attend, q, others))
        try:
            looped(q, *others).block_until_ready()
        except Exception as failed:
            error = failed
            continue
        times[index] = min(_seconds(lambda: looped(q, *others)) for _ in range(ROUNDS))  # noqa: B023
    if not times:
        raise error or ValueError("there is no candidate")
    return cast(Callable[..., Any], jax.jit(candidates[min(times, key=times.__getitem__)]))


def _repeated(attend: Callable[..., Any], q: Any, others: Sequence[Any]) -> Any:
    import jax

    return jax.lax.fori_loop(0, CALLS, lambda _, q: attend(q, *others), q)


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call().block_until_ready()
    return time.perf_counter() - start
