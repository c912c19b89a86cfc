"""ggml's flash attention on a CPU, through its C interface. Knows no model and no Python binding of it.

It is the ggml that llama.cpp is made of, from the package xllamacpp, whose one library has all of it. Tensors are
ggml's in torch's memory, dimensions the other way round: nothing is copied but where the dtype asks for it.

ggml has two kernels (ops.cpp). For 64 queries or more a head, keys and values in fp32 or fp16, it multiplies tiles in
fp32; for fewer, it goes through the keys one by one for each query, and sums in fp16 where the values are. Times with
ggml 0.26.0 on one core of an AMD EPYC (AVX2), one head of size 128, 4096 keys, in ms of that core's time:

    queries               1     2     8    16    32    63    64   128
    fp32               0.20  0.39   1.6   3.3   6.7  13.4   3.2   6.4
    fp16               0.16  0.30   1.2   2.5   5.1  10.2   3.4   7.0
    fp16, values fp32  0.18  0.35   1.4   2.9   6.0  12.0
    bf16               0.25  0.49   2.0   4.1   8.2  16.2  16.4  32.5

So 16 to 63 queries are padded to 64; bf16 is cast for the tiles; and where fp16 is not in tiles, its values are cast,
since sums in fp16 are off by several times what attnbench allows from some 256 keys on. All of that is in the graph,
and so in the time.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import platform
import weakref
from collections.abc import Callable, Iterable
from ctypes import c_bool, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from attnbench import Backend, Problem, hookimpl
from attnbench.problem import DeviceKind
from attnbench_plugins.folding import fold, folded_visible
from attnbench_plugins.masks import visible
from attnbench_plugins.packages import missing

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TILE = 64
"""Queries a head from which ggml takes its kernel of tiles."""
PADDED_FROM = 16
"""Queries from which the kernel of tiles is as fast on 64: see the table above."""
MOST_KEYS_IN_FP32 = 1024
"""The error is 0.4 to 1 of what attnbench allows there, 0.4 to 1.6 with 2048 keys and 1.4 to 2.6 with 8192."""
F32, F16, BF16 = 0, 1, 30
"""Of ggml's enum ggml_type."""
PRECISION_F32 = 10
"""Of its enum ggml_prec."""
CONTEXT_BYTES = 1 << 20
"""For the descriptions of tensors and the graph; data are elsewhere."""


class Ggml(Backend):
    """Forward attention by a graph of one op, with casts around it where the dtype needs them."""

    name = "ggml"
    device: DeviceKind = "cpu"
    summary = "ggml_flash_attn_ext, llama.cpp's attention (its CPU backend)"
    homepage = "https://github.com/ggml-org/ggml"
    libraries = MappingProxyType({"xllamacpp": "2026.10.11549"})

    def unavailable(self) -> str | None:
        reason: str | None = missing("xllamacpp", "ggml")
        return reason or no_avx2()

    def unsupported(self, problem: Problem) -> str | None:
        if problem.direction != "fwd":
            return "forward only"
        if problem.dtype == "fp32" and problem.seqlen_q > 1 and most_visible(problem) > MOST_KEYS_IN_FP32:
            return f"up to {MOST_KEYS_IN_FP32} keys a query in fp32: ggml adds them up one by one, too inexact for more"
        return None

    def prepare(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        import torch

        out = torch.empty(problem.out_shape, dtype=q.dtype)
        graph = Graph(torch.get_num_threads())
        attention(graph, problem, q, k, v, out)

        def call() -> Tensor:
            graph.compute()
            return out

        call()
        return call

    def parallel_units(self, problem: Problem) -> int:
        import torch

        return torch.get_num_threads()


def no_avx2() -> str | None:
    """That this processor lacks what the package's library is compiled for; it would end the process there."""
    import torch

    lacks = platform.machine() in ("x86_64", "AMD64") and torch.backends.cpu.get_cpu_capability() == "DEFAULT"
    return "xllamacpp is compiled for processors with AVX2" if lacks else None


def most_visible(problem: Problem) -> int:
    """The most keys that one query sees: under a causal mask the last, under a window the one nearest to the middle."""
    last, shift = problem.seqlen_q - 1, problem.seqlen_k - problem.seqlen_q
    middle = min(max((problem.seqlen_k - 1) // 2 - shift, 0), last)
    return max(high - low for low, high in map(problem.key_range, (last, middle)))


def attention(graph: Graph, problem: Problem, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    """Give a graph all that makes the output of a problem. Raises ValueError where a tensor is not contiguous.

    Every key head is an element of the batch, and the queries that read it are one head, whose output is then in place.
    Single queries keep their heads: for those ggml divides the keys among its threads.
    """
    import torch

    folded = [fold(problem, tensor).flatten(0, 1).unsqueeze(1) for tensor in (q, k, v, out)]
    queries, keys, values, written = (q, k, v, out.transpose(1, 2)) if problem.seqlen_q == 1 else folded
    rows = queries.shape[2]
    padding = TILE - rows if PADDED_FROM <= rows < TILE else 0
    tiled = rows + padding >= TILE
    seen = visible(problem, q.device) if problem.seqlen_q == 1 else folded_visible(problem, q.device)
    mask = None
    if seen is not None:
        mask = torch.zeros(1, 1, rows + padding, problem.seqlen_k, dtype=torch.float16)
        mask[0, 0, :rows].masked_fill_(~seen, -torch.inf)
    q32 = graph.pad(graph.cast(graph.tensor(queries), queries.dtype, F32), padding)
    own = [graph.tensor(keys), graph.tensor(values)]
    if tiled and keys.dtype == torch.bfloat16:
        own = [graph.cast(x, keys.dtype, F32) for x in own]
    elif not tiled and keys.dtype == torch.float16:
        own[1] = graph.cast(own[1], values.dtype, F32)
    added = None if mask is None else graph.tensor(mask)
    attended = graph.attend(q32, own[0], own[1], added, problem.softmax_scale)
    if padding:
        width = problem.head_dim_v * 4
        sizes, strides = (problem.head_dim_v, 1, rows, len(written)), (width, width, TILE * width)
        attended = graph.view(attended, sizes, strides)
    if padding or out.dtype != torch.float32:
        graph.end(graph.copy(attended, graph.tensor(written)))
    else:
        graph.place(attended, out)
        graph.end(attended)


class Graph:
    """A ggml graph, and what it needs to be computed with so many threads. Frees what is ggml's with itself."""

    def __init__(self, threads: int) -> None:
        self._ggml = ggml()
        self._backend = self._ggml.ggml_backend_cpu_init()
        self._ggml.ggml_backend_cpu_set_n_threads(self._backend, threads)
        self._context = self._ggml.ggml_init(_InitParams(CONTEXT_BYTES, None, True))
        self._graph: int | None = None
        self._buffers: list[int] = []
        self._owners: list[Tensor] = []
        """Tensors whose memory the graph reads or writes."""
        weakref.finalize(self, _free, self._ggml, self._context, self._buffers, self._backend)

    def tensor(self, tensor: Tensor) -> int:
        """A ggml tensor in the memory of a contiguous one of four dimensions."""
        sizes = (c_int64 * 4)(*reversed(tensor.shape))
        made: int = self._ggml.ggml_new_tensor(self._context, _element_type(tensor.dtype), 4, sizes)
        self.place(made, tensor)
        return made

    def place(self, made: int, tensor: Tensor) -> None:
        """Have a ggml tensor lie where a torch tensor does."""
        buffer = self._ggml.ggml_backend_cpu_buffer_from_ptr(tensor.data_ptr(), tensor.nbytes)
        self._buffers.append(buffer)
        self._owners.append(tensor)
        _require_done(self._ggml.ggml_backend_tensor_alloc(buffer, made, tensor.data_ptr()), "place a tensor")

    def cast(self, tensor: int, dtype: torch.dtype, to: int) -> int:
        return tensor if _element_type(dtype) == to else int(self._ggml.ggml_cast(self._context, tensor, to))

    def pad(self, tensor: int, rows: int) -> int:
        return int(self._ggml.ggml_pad(self._context, tensor, 0, rows, 0, 0)) if rows else tensor

    def view(self, tensor: int, sizes: tuple[int, int, int, int], strides: tuple[int, int, int]) -> int:
        return int(self._ggml.ggml_view_4d(self._context, tensor, *sizes, *strides, 0))

    def copy(self, tensor: int, target: int) -> int:
        return int(self._ggml.ggml_cpy(self._context, tensor, target))

    def attend(self, q: int, k: int, v: int, mask: int | None, scale: float) -> int:
        """(batch, length, heads, dim) in fp32, as torch counts dimensions."""
        made: int = self._ggml.ggml_flash_attn_ext(self._context, q, k, v, mask, scale, 0.0, 0.0)
        self._ggml.ggml_flash_attn_ext_set_prec(made, PRECISION_F32)
        return made

    def end(self, tensor: int) -> None:
        """All is there: this is what the graph is to make. What has no memory yet gets it."""
        if buffer := self._ggml.ggml_backend_alloc_ctx_tensors(self._context, self._backend):  # none where all has
            self._buffers.append(buffer)
        self._graph = self._ggml.ggml_new_graph(self._context)
        self._ggml.ggml_build_forward_expand(self._graph, tensor)

    def compute(self) -> None:
        _require_done(self._ggml.ggml_backend_graph_compute(self._backend, self._graph), "compute its graph")


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "ggml_init": (c_void_p, _InitParams),
    "ggml_free": (None, c_void_p),
    "ggml_new_tensor": (c_void_p, c_void_p, c_int, c_int, ctypes.POINTER(c_int64)),
    "ggml_cast": (c_void_p, c_void_p, c_void_p, c_int),
    "ggml_pad": (c_void_p, c_void_p, c_void_p, *[c_int] * 4),
    "ggml_view_4d": (c_void_p, c_void_p, c_void_p, *[c_int64] * 4, *[c_size_t] * 4),
    "ggml_cpy": (c_void_p, c_void_p, c_void_p, c_void_p),
    "ggml_flash_attn_ext": (c_void_p, *[c_void_p] * 5, *[c_float] * 3),
    "ggml_flash_attn_ext_set_prec": (None, c_void_p, c_int),
    "ggml_new_graph": (c_void_p, c_void_p),
    "ggml_build_forward_expand": (None, c_void_p, c_void_p),
    "ggml_backend_cpu_init": (c_void_p,),
    "ggml_backend_cpu_set_n_threads": (None, c_void_p, c_int),
    "ggml_backend_cpu_buffer_from_ptr": (c_void_p, c_void_p, c_size_t),
    "ggml_backend_tensor_alloc": (c_int, c_void_p, c_void_p, c_void_p),
    "ggml_backend_alloc_ctx_tensors": (c_void_p, c_void_p, c_void_p),
    "ggml_backend_graph_compute": (c_int, c_void_p, c_void_p),
    "ggml_backend_buffer_free": (None, c_void_p),
    "ggml_backend_free": (None, c_void_p),
}
"""What each function returns and takes."""


@functools.cache
def ggml() -> ctypes.CDLL:
    """The library, with the types of what is called of it."""
    spec = importlib.util.find_spec("xllamacpp")
    folders = (spec and spec.submodule_search_locations) or []
    path = next(file for folder in folders for file in Path(folder).glob("xllamacpp.*so"))
    library = ctypes.CDLL(str(path))
    for name, (returned, *taken) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = returned, taken
    return library


def _free(library: ctypes.CDLL, context: int, buffers: list[int], backend: int) -> None:
    library.ggml_free(context)
    for buffer in buffers:
        library.ggml_backend_buffer_free(buffer)
    library.ggml_backend_free(backend)


def _require_done(status: int, what: str) -> None:
    if status != 0:
        raise RuntimeError(f"ggml could not {what}: status {status}")


def _element_type(dtype: torch.dtype) -> int:
    import torch

    return {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16}[dtype]


@hookimpl
def attnbench_backends() -> Iterable[Backend]:
    return [Ggml()]
