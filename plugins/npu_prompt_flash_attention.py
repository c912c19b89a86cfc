"""torch_npu's attention for a prompt: PromptFlashAttention. Not yet run on hardware."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from attnbench import Backend, Problem, hookimpl
from attnbench.problem import DeviceKind
from attnbench_plugins import npu_operators
from attnbench_plugins.masks import hides

if TYPE_CHECKING:
    from torch import Tensor

OPERATOR = "npu_prompt_flash_attention"


class NpuPromptFlashAttention(Backend):
    """torch_npu.npu_prompt_flash_attention, whose scale is called scale_value."""

    name = "npu_prompt_flash_attention"
    device: DeviceKind = "npu"
    summary = "torch_npu.npu_prompt_flash_attention (not yet run on hardware)"
    homepage: str = npu_operators.HOMEPAGE
    libraries: Mapping[str, str] = npu_operators.LIBRARIES

    def unavailable(self) -> str | None:
        reason: str | None = npu_operators.unavailable(OPERATOR)
        return reason

    def unsupported(self, problem: Problem) -> str | None:
        reason: str | None = npu_operators.inference_limits(problem, decodes=False)
        if reason is not None:
            return reason
        if problem.visible_rows < problem.seqlen_q:
            return "no mask that hides all keys from a query"
        return None

    def prepare(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        npu_operators.require_contiguous(q, k, v)
        attend = npu_operators.operator(OPERATOR)
        # The scale is always given: its default is 1.
        options: dict[str, object] = {
            "num_heads": problem.heads_q,
            "num_key_value_heads": problem.heads_kv,
            "scale_value": problem.softmax_scale,
            "input_layout": "BNSD",
            "pre_tokens": npu_operators.EVERY_TOKEN,
            "next_tokens": npu_operators.EVERY_TOKEN,  # its default is 0, that of every other operator this
        }
        if hides(problem):
            options |= npu_operators.causal(q.device)

        def call() -> Tensor:
            output: Tensor = attend(q, k, v, **options)
            return output

        return call


@hookimpl
def attnbench_backends() -> Iterable[Backend]:
    return [NpuPromptFlashAttention()]
