"""PyPI's flash-attn-npu: FlashAttention-3's interface on an NPU. Not yet run on hardware.

The limits are those of 0.4.2.post1 (flash_attn_npu_3 and csrc/ascend910/flash_attn_npu_3/flash_api.cpp).
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from attnbench import Backend, Problem, hookimpl
from attnbench.problem import DeviceKind
from attnbench_plugins.fastest import fastest
from attnbench_plugins.flash_attn_family import lost_window, no_flash_attn_2
from attnbench_plugins.masks import hides, window_size
from attnbench_plugins.npu_operators import require_contiguous

if TYPE_CHECKING:
    from torch import Tensor

PACKAGE = "flash_attn_npu_3"


class FlashAttnNpu(Backend):
    """flash_attn_with_kvcache, planned in `prepare`.

    It reads memory as contiguous (batch, seqlen, heads, head_dim), whatever the strides. Key heads are therefore given
    as batch elements of one key head each, which is how they lie.
    """

    name = "flash_attn_npu"
    device: DeviceKind = "npu"
    summary = "flash_attn_npu_3's flash_attn_with_kvcache (not yet run on hardware)"
    homepage = "https://github.com/MinghuasLab/flash-attention-npu"
    libraries = MappingProxyType({"flash-attn-npu": "0.4.2.post1"})

    def unavailable(self) -> str | None:
        from attnbench.devices import device

        if reason := device("npu").unavailable():
            return reason
        if importlib.util.find_spec(PACKAGE) is None:
            return f"{PACKAGE} is not installed: pip install --no-build-isolation 'attnbench[flash-attn-npu]'"
        try:
            importlib.import_module(PACKAGE)
        except (ImportError, RuntimeError) as error:  # it is built for one torch_npu, and refuses NPUs by name
            return f"{PACKAGE} does not import: {error}"
        return None

    def unsupported(self, problem: Problem) -> str | None:
        reason: str | None = no_flash_attn_2(problem) or lost_window(problem)
        return reason

    def prepare(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        require_contiguous(q, k, v)
        group, dim = problem.heads_q // problem.heads_kv, problem.head_dim
        heads = problem.batch * problem.heads_kv
        keys, values = (tensor.view(heads, problem.seqlen_k, 1, dim) for tensor in (k, v))
        if group == 1 or not hides(problem):
            # Without a mask queries of several heads are as good as more queries of one.
            attend = planned(problem, (heads, group * problem.seqlen_q, 1), 1, q)
            queries = q.view(heads, group * problem.seqlen_q, 1, dim)
            return lambda: attend(queries, keys, values).view(problem.out_shape)

        by_head = planned(problem, (heads, problem.seqlen_q, group), 1, q)
        by_batch = planned(problem, (problem.batch, problem.seqlen_q, problem.heads_q), problem.heads_kv, q)
        grouped = q.view(heads, group, problem.seqlen_q, dim).transpose(1, 2)

        def copying_q_and_the_output() -> Tensor:
            return by_head(grouped.contiguous(), keys, values).transpose(1, 2).reshape(problem.out_shape)

        def copying_q_k_and_v() -> Tensor:
            return by_batch(*(tensor.transpose(1, 2).contiguous() for tensor in (q, k, v))).transpose(1, 2)

        call: Callable[[], Tensor] = fastest([copying_q_and_the_output, copying_q_k_and_v])
        return call


def planned(problem: Problem, queries: tuple[int, int, int], heads_kv: int, q: Tensor) -> Callable[..., Tensor]:
    """The library's call for q of (batch, seqlen, heads) and so many key heads, with what it plans made beforehand."""
    import torch

    library = importlib.import_module(PACKAGE)
    lengths = torch.full((queries[0],), problem.seqlen_k, dtype=torch.int32, device=q.device)
    masks: dict[str, Any] = {"causal": problem.causal and hides(problem), "window_size": window_size(problem)}
    how = masks | {"softmax_scale": problem.softmax_scale, "num_splits": 1}
    plan = library.get_scheduler_metadata(
        batch_size=queries[0],
        max_seqlen_q=queries[1],
        max_seqlen_k=problem.seqlen_k,
        num_heads_q=queries[2],
        num_heads_kv=heads_kv,
        headdim=problem.head_dim,
        cache_seqlens=lengths,
        qkv_dtype=q.dtype,
        **how,
    )
    attend: Callable[..., Tensor] = library.flash_attn_with_kvcache
    return lambda q, k, v: attend(q, k, v, cache_seqlens=lengths, scheduler_metadata=plan, **how)


@hookimpl
def attnbench_backends() -> Iterable[Backend]:
    return [FlashAttnNpu()]
