"""How JAX starts, on which GPUs, and how it sees a problem's tensors in torch's memory. Knows no attention.

JAX takes an array to be immutable, but reads its memory at each call of a jitted function: what torch writes there
between two calls is seen, and nothing is copied.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from attnbench import Problem
from attnbench.problem import DeviceKind
from attnbench_plugins.folding import fold
from attnbench_plugins.packages import GPU, missing, no_gpu

if TYPE_CHECKING:
    from torch import Tensor

CALLS, ROUNDS = 10, 3
"""How often a candidate is called to see how fast it is: the shortest of three loops of ten calls. Not measured, and as
many as where torch is asked (fastest.py)."""
LEAST_CAPABILITY: GPU = (8, 0)
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


def no_jax_on_a_gpu() -> str | None:
    """Why there is no GPU, or no JAX for it."""
    plugins = ("jax_cuda13_plugin", "jax_cuda12_plugin")
    reasons = [missing(plugin, "jax-cuda") for plugin in plugins]
    return no_gpu(LEAST_CAPABILITY) or missing("jax", "jax-cuda") or (reasons[0] if all(reasons) else None)


def in_one_head(problem: Problem, tensor: Tensor) -> Tensor:
    """A view as JAX wants it, (batch, length, heads, dim), with all queries of a key head in one."""
    folded: Tensor = fold(problem, tensor)
    return folded.flatten(0, 1).unsqueeze(2)


def in_groups(problem: Problem, tensor: Tensor) -> Tensor:
    """q as (batch · heads_kv, group, seqlen_q, dim), a view."""
    folded: Tensor = fold(problem, tensor)
    return folded.view(problem.batch * problem.heads_kv, -1, problem.seqlen_q, problem.head_dim)


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


def fastest_looped(
    candidates: Sequence[Callable[..., Any]], q: Any, *others: Any, most: int | None = None
) -> Callable[..., Any]:
    """The candidate that is fastest on these arrays, jitted, of the first `most` that compile.

    Each is timed in a loop on the device, where its output, of q's shape, is the next q: a call is shorter than what
    the host takes for it. Where none compiles, what the first raised is raised.
    """
    import jax

    if len(candidates) == 1:
        return cast(Callable[..., Any], jax.jit(candidates[0]))
    times: dict[int, float] = {}
    errors: list[Exception] = []
    for index, candidate in enumerate(candidates):
        if len(times) == most:
            break
        looped = jax.jit(lambda q, *others, attend=candidate: _repeated(attend, q, others))
        try:
            looped(q, *others).block_until_ready()
        except Exception as failed:
            errors.append(failed)
            continue
        times[index] = min(_seconds(lambda: looped(q, *others)) for _ in range(ROUNDS))  # noqa: B023
    if not times:
        raise errors[0] if errors else ValueError("there is no candidate")
    return cast(Callable[..., Any], jax.jit(candidates[min(times, key=times.__getitem__)]))


def _repeated(attend: Callable[..., Any], q: Any, others: Sequence[Any]) -> Any:
    import jax

    return jax.lax.fori_loop(0, CALLS, lambda _, q: attend(q, *others), q)


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call().block_until_ready()
    return time.perf_counter() - start
