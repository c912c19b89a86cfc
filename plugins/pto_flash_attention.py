"""The flash attention of PyPI's pto-kernels, precompiled PTO instructions. Not yet run on hardware."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterable
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from attnbench import Backend, Problem, hookimpl
from attnbench.problem import DeviceKind
from attnbench_plugins.npu_operators import require_contiguous

if TYPE_CHECKING:
    from torch import Tensor

PACKAGE = "pto_kernels"
HEAD_DIM = 128
QUERY_TILE, KEY_TILE = 128, 512
MOST_CORES = 24


class PtoFlashAttention(Backend):
    """pto_kernels.pto_flash_attention. It gives fp32, which is cast to fp16 at each call; the cast is timed."""

    name = "pto_flash_attention"
    device: DeviceKind = "npu"
    summary = "pto_kernels.pto_flash_attention and a cast to fp16 (not yet run on hardware)"
    homepage = "https://pypi.org/project/pto-kernels"
    libraries = MappingProxyType({"pto-kernels": "0.1.7", "torch-npu": "2.10.0"})

    def unavailable(self) -> str | None:
        from attnbench.devices import device

        if reason := device("npu").unavailable():
            return reason
        if importlib.util.find_spec(PACKAGE) is None:
            return f"{PACKAGE} is not installed: pip install pto-kernels, for Python 3.10 to 3.12"
        try:
            self._operator()
        except AttributeError as error:
            return f"{error}: pip install -U pto-kernels"
        except ImportError as error:
            return f"{PACKAGE} does not import: {error}: its wheels are built for one version of torch-npu each"
        return None

    def unsupported(self, problem: Problem) -> str | None:
        if problem.direction != "fwd":
            return "forward only"
        if problem.dtype != "fp16":
            return "fp16 only"
        if (problem.head_dim, problem.head_dim_v) != (HEAD_DIM, HEAD_DIM):
            return f"head size {HEAD_DIM} only"
        if problem.window is not None:
            return "no sliding window"
        if problem.seqlen_q % QUERY_TILE or problem.seqlen_k % KEY_TILE:
            return f"query lengths that are multiples of {QUERY_TILE}, key lengths of {KEY_TILE}"
        if problem.causal and problem.seqlen_q != problem.seqlen_k:
            return "causal aligned top-left, so only for as many queries as keys"
        if not math.isclose(problem.softmax_scale, HEAD_DIM**-0.5, rel_tol=1e-6):
            return "no softmax scale but 1/√128"
        return None

    def prepare(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        require_contiguous(q, k, v)
        attend, causal, dtype = self._operator(), problem.causal, q.dtype

        def call() -> Tensor:
            output: Tensor = attend(q, k, v, causal=causal).to(dtype)
            return output

        return call

    def parallel_units(self, problem: Problem) -> int | None:
        from attnbench.devices import device

        cores = device("npu").info().cores or MOST_CORES
        return min(problem.batch * problem.heads_q * (problem.seqlen_q // QUERY_TILE), MOST_CORES, cores)

    def _operator(self) -> Any:
        return importlib.import_module(PACKAGE).pto_flash_attention


@hookimpl
def attnbench_backends() -> Iterable[Backend]:
    return [PtoFlashAttention()]
