"""cuDNN's attention through its own front end: a graph of one node, and the fastest of the plans that cuDNN has for it.

The front end alone gives cuDNN a mask aligned bottom-right and a window; torch hands cuDNN a tensor of either.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from attnbench import Backend, Problem, hookimpl
from attnbench.problem import DeviceKind
from attnbench_plugins.masks import hides
from attnbench_plugins.packages import missing, no_gpu
from attnbench_plugins.sdpa_cudnn import not_built
from attnbench_plugins.sdpa_kernels import HEAD_DIM_MULTIPLE, odd_head_dim

if TYPE_CHECKING:
    from torch import Tensor

MAX_HEAD_DIM = 256


class CudnnFrontend(Backend):
    """Plans of all of cuDNN's heuristics, and of the front end's own kernels, are built and timed in `prepare`."""

    name = "cudnn_frontend"
    device: DeviceKind = "cuda"
    summary = "cuDNN's attention through cudnn-frontend, the fastest of its plans"
    homepage = "https://docs.nvidia.com/deeplearning/cudnn/frontend/latest/operations/Attention.html"
    libraries = MappingProxyType({"nvidia-cudnn-frontend": "1.32.0"})

    def unavailable(self) -> str | None:
        reason: str | None = no_gpu((8, 0)) or missing("cudnn", "cudnn-frontend") or not_built()
        return reason

    def unsupported(self, problem: Problem) -> str | None:
        return refusal(problem)

    def prepare(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        from attnbench_plugins.fastest import fastest

        chosen: Callable[[], Tensor] = fastest(list(plans(problem, q, k, v)))
        return chosen


def refusal(problem: Problem) -> str | None:
    """Why cuDNN's attention cannot do a problem, whoever asks it to: the limits are those of its front end."""
    if problem.direction != "fwd":
        return "forward only"
    if problem.dtype == "fp32":
        return "fp16 and bf16 only"
    if max(problem.head_dim, problem.head_dim_v) > MAX_HEAD_DIM:
        return f"head sizes up to {MAX_HEAD_DIM}"
    if (problem.causal or problem.window is not None) and problem.seqlen_q > problem.seqlen_k:
        return "a mask needs as many keys as queries"
    odd: str | None = odd_head_dim(problem, HEAD_DIM_MULTIPLE)
    return odd


def plans(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Iterator[Callable[[], Tensor]]:
    """A call of each plan that is proposed, cuDNN's first choice first; each is built when it is first called."""
    import cudnn
    import torch

    out = torch.empty(problem.out_shape, dtype=q.dtype, device=q.device)
    handle = _handle()
    types = {torch.float16: cudnn.data_type.HALF, torch.bfloat16: cudnn.data_type.BFLOAT16}
    wide = cudnn.data_type.FLOAT
    graph = cudnn.pygraph(
        handle=handle, io_data_type=types[q.dtype], intermediate_data_type=wide, compute_data_type=wide
    )
    inputs = {
        name: graph.tensor(name=name, dim=list(tensor.shape), stride=list(tensor.stride()))
        for name, tensor in zip("qkv", (q, k, v))
    }
    result, _ = graph.sdpa(
        name="attention", **inputs, attn_scale=problem.softmax_scale, generate_stats=False, **_mask(problem)
    )
    result.set_output(True).set_dim(list(out.shape)).set_stride(list(out.stride()))
    graph.validate()
    graph.build_operation_graph()
    modes = cudnn.heur_mode
    graph.create_execution_plans([modes.A, modes.B, modes.FALLBACK])
    graph.check_support()
    buffers = dict(zip((*inputs.values(), result), (q, k, v, out)))

    def plan(index: int) -> Callable[[], Tensor]:
        @functools.cache
        def workspace() -> Tensor:
            graph.build_plan_at_index(index)
            size = max(1, graph.get_workspace_size_plan_at_index(index))
            return torch.empty(size, dtype=torch.uint8, device=q.device)

        def call() -> Tensor:
            cudnn.set_stream(handle, torch.cuda.current_stream(q.device).cuda_stream)
            graph.execute_plan_at_index(buffers, workspace(), index, handle)
            return out

        return call

    yield from map(plan, range(graph.get_execution_plan_count()))


def _mask(problem: Problem) -> dict[str, Any]:
    """The band of keys that a query sees, as sdpa() takes it: what it sees to the left includes its own key."""
    if not hides(problem):
        return {}
    import cudnn

    band: dict[str, Any] = {"diagonal_alignment": cudnn.diagonal_alignment.BOTTOM_RIGHT}
    if problem.window is not None:
        band["diagonal_band_left_bound"] = problem.window
    band["diagonal_band_right_bound"] = 0 if problem.window is None or problem.causal else problem.window - 1
    return band


@functools.cache
def _handle() -> Any:
    """This process's handle: one is slow to make, and its calls may share it, since they run one after another."""
    import cudnn

    return cudnn.create_handle()


@hookimpl
def attnbench_backends() -> Iterable[Backend]:
    return [CudnnFrontend()]
