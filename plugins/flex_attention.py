"""torch's flex_attention: a kernel that torch.compile writes for the problem's mask, in Triton on a GPU, C++ on a CPU.

Blocks of keys that the mask hides altogether are skipped, so a causal mask or a window saves its share of the work.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnbench import Backend, Problem, hookimpl
from attnbench.problem import DeviceKind
from attnbench_plugins.masks import hides

if TYPE_CHECKING:
    from torch import Tensor

LEAST_HEAD_DIM = 16
"""What Triton's products of matrices need; in C++ smaller ones compile, and give wrong values."""
MOST_DECODING_ROWS = 128
"""Queries times the query heads of a key head."""
RECOMPILATIONS = 256
"""torch compiles a function anew for at most eight shapes unless it is told otherwise; a suite has more."""

CPU_BLOCK, LEAST_CPU_BLOCK = 64, 16
"""Queries and keys in a block of the mask, which on a CPU are the tile as well; a tile of queries is one thread's.

With torch 2.13.0 on one core of an AMD EPYC (AVX2), fp32, head size 128, in ms of that core's time:

    queries × keys    16×64  16×512   64×64  64×128  64×512  128×64  128×128  128×512
    256×1024            4.4     4.5     3.7     4.4     4.1     3.8      4.3      4.0
    1024×1024 causal    9.8    14.7     8.6     9.2    13.1     9.4      9.7     13.5
"""

MaskMod = Callable[[Any, Any, Any, Any], Any]


class FlexAttention(Backend):
    """torch.compile(flex_attention) with a block mask, compiled in `prepare` for the shape."""

    name = "flex_attention"
    summary = "torch.nn.attention.flex_attention, compiled with a block mask"
    homepage = "https://docs.pytorch.org/docs/stable/nn.attention.flex_attention.html"

    def __init__(self, device: DeviceKind) -> None:
        self.device = device

    def unavailable(self) -> str | None:
        from attnbench.devices import device

        reason = device(self.device).unavailable()
        if reason is None and self.device == "cpu":
            return _no_cpp()
        if reason is None and importlib.util.find_spec("triton") is None:
            return "triton is not installed: pip install 'attnbench[triton]'"
        return reason

    def unsupported(self, problem: Problem) -> str | None:
        if problem.direction != "fwd":
            return "forward only"
        if min(problem.head_dim, problem.head_dim_v) < LEAST_HEAD_DIM:
            return f"head sizes of at least {LEAST_HEAD_DIM}"
        return None

    def prepare(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        import torch
        import torch._dynamo
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        config: Any = torch._dynamo.config
        config.recompile_limit = config.accumulated_recompile_limit = RECOMPILATIONS
        visible, options = mask_mod(problem), kernel_options(problem) if self.device == "cuda" else None
        sizes: dict[str, Any] = {}
        if self.device == "cpu":
            # Without a block mask all queries of a head would be one tile, and so one thread's.
            visible, sizes = visible or all_visible, {"BLOCK_SIZE": cpu_blocks(problem, torch.get_num_threads())}
        lengths = (problem.seqlen_q, problem.seqlen_k)
        blocks = None if visible is None else create_block_mask(visible, None, None, *lengths, device=q.device, **sizes)
        scale, grouped = problem.softmax_scale, problem.heads_q != problem.heads_kv

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
            return flex_attention(q, k, v, block_mask=blocks, scale=scale, enable_gqa=grouped, kernel_options=options)

        # fullgraph: where torch cannot compile it, it raises, and does not take its slow way without a word.
        compiled: Any = torch.compile(attend, dynamic=False, fullgraph=True)

        def call() -> Tensor:
            with torch.no_grad():  # with gradients it writes the log-sum-exp, too
                output: Tensor = compiled(q, k, v)
            return output

        call()
        return call

    def parallel_units(self, problem: Problem) -> int | None:
        if self.device != "cpu":
            return None
        import torch

        return torch.get_num_threads()


def kernel_options(problem: Problem) -> Any:
    """Of the Triton kernel. For fewer than 128 queries torch takes its kernel for decoding, which has no tile for many
    rows of a key head."""
    rows = problem.seqlen_q * problem.heads_q // problem.heads_kv
    grouped = problem.heads_q != problem.heads_kv
    return {"FORCE_USE_FLEX_ATTENTION": True} if grouped and rows > MOST_DECODING_ROWS else None


def cpu_blocks(problem: Problem, threads: int) -> tuple[int, int]:
    """How many queries and keys are in a tile on a CPU: CPU_BLOCK, or fewer queries where threads would be idle."""
    queries = CPU_BLOCK
    while queries > LEAST_CPU_BLOCK and problem.batch * problem.heads_q * -(-problem.seqlen_q // queries) < threads:
        queries //= 2
    return (queries, CPU_BLOCK)


def _no_cpp() -> str | None:
    """Why torch can compile no C++ for this CPU: it takes the compiler that CXX names, else g++."""
    import torch

    compiler = os.environ.get("CXX") or "g++"
    if shutil.which(compiler) is None:
        return f"torch compiles it with {compiler}, which is not there: apt-get install g++, or set CXX"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "torch compiles it with Python's headers, which are not there: apt-get install python3-dev"
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return "torch writes it for x86 processors with AVX2 alone"
    return None


def all_visible(batch: Any, head: Any, query: Any, key: Any) -> Any:
    """The mask that hides nothing."""
    return key >= 0


def mask_mod(problem: Problem) -> MaskMod | None:
    """Which key a query sees, as flex_attention asks for it; None where every query sees all."""
    if not hides(problem):
        return None
    shift, causal, window = problem.seqlen_k - problem.seqlen_q, problem.causal, problem.window

    def visible(batch: Any, head: Any, query: Any, key: Any) -> Any:
        row = query + shift
        near = key > row - window if window is not None else key >= 0
        return near & (key <= row if causal else key < row + window)

    return visible


@hookimpl
def attnbench_backends() -> Iterable[Backend]:
    return [FlexAttention("cpu"), FlexAttention("cuda")]
