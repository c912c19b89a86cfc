"""OpenVINO's ScaledDotProductAttention op, as its CPU plugin compiles it. Knows nothing of the kernels that it picks.

OpenVINO reads q, k and v and writes the output where torch has them. Without `inference_precision` it would run fp32 as
bf16 where the processor is faster at that; with it, the precision is the problem's dtype, or fp32 where the processor
has no arithmetic for fp16 or bf16. The conversions are then OpenVINO's own, and part of the time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from attnbench import Backend, Problem, hookimpl
from attnbench.problem import DeviceKind
from attnbench_plugins.folding import fold, folded_visible
from attnbench_plugins.packages import missing

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class OpenVino(Backend):
    """Forward attention by a model of one op; grouped heads are folded into the queries of their key head."""

    name = "openvino"
    device: DeviceKind = "cpu"
    summary = "OpenVINO's ScaledDotProductAttention op (its CPU plugin)"
    homepage = "https://docs.openvino.ai"
    libraries = MappingProxyType({"openvino": "2026.4.1"})

    def unavailable(self) -> str | None:
        reason: str | None = missing("openvino", "openvino")
        return reason

    def unsupported(self, problem: Problem) -> str | None:
        if problem.direction != "fwd":
            return "forward only"
        if problem.visible_rows < problem.seqlen_q:
            return "OpenVINO gives a query that sees no key NaN, not zeros"
        return None

    def prepare(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        import torch

        out = torch.empty(problem.out_shape, dtype=q.dtype)
        folded = [fold(problem, tensor) for tensor in (q, k, v)]
        request = compiled(problem, *folded).create_infer_request()
        shared = [_shared(tensor) for tensor in (*folded, fold(problem, out))]
        for index, tensor in enumerate(shared[:3]):
            request.set_input_tensor(index, tensor)
        request.set_output_tensor(shared[3])

        def call(_owners: list[Any] = shared) -> Tensor:
            request.infer(share_outputs=True)  # else the output is copied once more, into an array that nobody reads
            return out

        return call

    def parallel_units(self, problem: Problem) -> int:
        import torch

        return torch.get_num_threads()


def compiled(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Any:
    """The openvino.CompiledModel of a problem on such folded tensors, with torch's number of threads."""
    import numpy as np
    import openvino as ov
    import openvino.opset13 as op
    import torch
    from openvino.properties import hint, inference_num_threads, num_streams

    dtype = _element_type(q.dtype)
    parameters = [op.parameter(list(tensor.shape), dtype) for tensor in (q, k, v)]
    scale = op.convert(op.constant(np.float32(problem.softmax_scale)), dtype.get_type_name())
    # The op's causal is aligned top-left, and folded queries have no such order.
    square = problem.seqlen_q == problem.seqlen_k and problem.heads_q == problem.heads_kv
    causal = problem.causal and square and problem.window is None
    mask = None if causal else folded_visible(problem, q.device)
    attention = op.scaled_dot_product_attention(
        *parameters,
        attention_mask=None if mask is None else op.constant(mask.numpy()),
        scale=scale,
        causal=causal,
    )
    settings = {
        hint.inference_precision: dtype,
        hint.performance_mode: hint.PerformanceMode.LATENCY,
        num_streams: 1,
        inference_num_threads: torch.get_num_threads(),
    }
    return core().compile_model(ov.Model([attention], parameters), "CPU", settings)


@functools.cache
def core() -> Any:
    """The one openvino.Core of this process.

    Each Core replaces the stack on which the thread's signals are handled, and unmaps its own when it goes, even if a
    later one puts that back when it goes in turn: then the next Ctrl-C is a segmentation fault.
    """
    import openvino as ov

    return ov.Core()


def _element_type(dtype: torch.dtype) -> Any:
    import openvino as ov
    import torch

    return {torch.float32: ov.Type.f32, torch.float16: ov.Type.f16, torch.bfloat16: ov.Type.bf16}[dtype]


def _shared(tensor: Tensor) -> Any:
    """An openvino.Tensor of the same memory, which is the torch tensor's still. Raises where that is not contiguous."""
    import openvino as ov
    import torch

    # numpy has no bf16: OpenVINO takes the bits, and the type apart from them.
    bits = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
    return ov.Tensor(bits.numpy(), ov.Shape(list(tensor.shape)), _element_type(tensor.dtype))


@hookimpl
def attnbench_backends() -> Iterable[Backend]:
    return [OpenVino()]
