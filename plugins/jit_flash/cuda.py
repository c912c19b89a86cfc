"""Owns jit_flash on NVIDIA GPUs: compiles a kernel of kernels/cuda/ for a problem and launches it.

flash_attention_sm90.cu is for Hopper and tensors that TMA takes, flash_attention_sm80.cu for all else. Knows nothing of
their insides; their configurations are cuda_config.py's and cuda_sm80.py's.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING

from attnbench import jit
from attnbench.backend import Backend
from attnbench.problem import DeviceKind, Problem
from attnbench_plugins.jit_flash import cuda_driver, cuda_sm80
from attnbench_plugins.jit_flash.cuda_config import (
    SHARED_BYTES,
    Config,
    choose,
    packed_heads,
    rounded,
    units,
    workspace_bytes,
)
from attnbench_plugins.jit_flash.cuda_driver import Kernel, Launch, NoContext, capture_of, tensor_map
from attnbench_plugins.jit_flash.cuda_workspace import Workspaces

if TYPE_CHECKING:
    from torch import Tensor

ARCH, CAPABILITY = "sm_90a", (9, 0)
"""Whose instructions flash_attention_sm90.cu uses (wgmma, TMA); other devices have none or others."""
LEAST_CAPABILITY = (8, 0)
"""Whose instructions flash_attention_sm80.cu uses; later devices have them too."""
MAX_HEAD_DIM = 256
MAX_SEQLEN = 1 << 29
"""Positions and their differences fit into 32 bits."""
MAX_BLOCKS = (1 << 31) - 1
"""Of a grid, and the kernel's divisions hold below that."""
MIN_SCALE, MAX_SCALE = 1e-38, 1e6
"""The first, times log2(e), is a normal float. Scores are rounded before their maximum is subtracted: up to the last,
normal inputs give what they should (docs/kernels/cuda.md says what is too large)."""
LOG2_E = 1.4426950408889634
CAUSAL_WAVE = 4
"""Heads whose tiles are dealt out together, longest first: 1 and 2 were up to 3% slower, 8 up to 8% (64 and 16 heads of
4096 and 16384 queries), by blocks of one tile each."""


class Divisor(ctypes.Structure):
    """Divisor in the kernel."""

    _fields_ = (("value", ctypes.c_uint32), ("factor", ctypes.c_uint32), ("shift", ctypes.c_uint32))

    @classmethod
    def of(cls, value: int) -> Divisor:
        """For dividends below 2³¹ (Granlund and Montgomery, Division by Invariant Integers using Multiplication)."""
        shift = (value - 1).bit_length()
        return cls(value, (((1 << shift) - value) << 32) // value + 1, shift)


class Params(ctypes.Structure):
    """Params in the kernel, which says what the fields mean."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("out", "lse")),
        *((name, Divisor) for name in ("tiles", "groups", "key_groups", "wave", "last_wave")),
        ("all_groups", ctypes.c_uint32),
        ("tiles_in_all", ctypes.c_uint32),
        *((name, ctypes.c_void_p) for name in ("taken", "launches", "parts")),
        *((name, ctypes.c_int32) for name in ("seqlen_q", "seqlen_k", "head_dim_v", "ahead", "behind")),
        ("scale_log2", ctypes.c_float),
    )


class Strided(ctypes.Structure):
    """Strided in flash_attention_sm80.cu."""

    _fields_ = (("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "head", "row")))

    @classmethod
    def of(cls, tensor: Tensor) -> Strided:
        return cls(tensor.data_ptr(), *tensor.stride()[:3])


class StridedParams(ctypes.Structure):
    """Params in flash_attention_sm80.cu."""

    _fields_ = (
        *((name, Strided) for name in ("q", "k", "v")),
        *((name, ctypes.c_void_p) for name in ("out", "lse")),
        *((name, Divisor) for name in ("tiles", "groups", "key_groups", "wave", "last_wave")),
        ("all_groups", ctypes.c_uint32),
        *((name, ctypes.c_int32) for name in ("seqlen_q", "seqlen_k", "ahead", "behind")),
        ("scale_log2", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("arrived", "parts")),
    )


class JitFlashCuda(Backend):
    """Forward attention on fp16 and bf16 tensors whose last dimension is contiguous."""

    name = "jit_flash"
    device: DeviceKind = "cuda"
    summary = "JIT-compiled CUDA flash attention (sm_90a; sm_80 and up)"

    @property
    def sources(self) -> Sequence[str]:  # type: ignore[override]
        return [str(files("attnbench_kernels") / "cuda")]

    def unavailable(self) -> str | None:
        from attnbench.devices import device

        if absent := device(self.device).unavailable():
            return absent
        import torch

        capability = torch.cuda.get_device_capability()
        if capability < LEAST_CAPABILITY:
            needed, there = (".".join(map(str, pair)) for pair in (LEAST_CAPABILITY, capability))
            return f"the kernels are for compute capability {needed} (Ampere) and up, and this GPU has {there}"
        return jit.missing(_toolchain)

    def unsupported(self, problem: Problem) -> str | None:
        if problem.direction != "fwd":
            return f"direction {problem.direction}: the kernel only runs forward"
        if problem.dtype == "fp32":
            return "fp32: the kernel takes fp16 and bf16"
        for name in ("head_dim", "head_dim_v"):
            if getattr(problem, name) % 8 or getattr(problem, name) > MAX_HEAD_DIM:
                return f"{name} {getattr(problem, name)} is no multiple of 8 up to {MAX_HEAD_DIM}"
        if not MIN_SCALE <= problem.softmax_scale <= MAX_SCALE:
            return f"softmax_scale {problem.softmax_scale:g} is not between {MIN_SCALE:g} and {MAX_SCALE:g}"
        if max(problem.seqlen_q, problem.seqlen_k) > MAX_SEQLEN:
            return f"more than {MAX_SEQLEN} queries or keys"
        if problem.batch * problem.heads_q * -(-problem.seqlen_q // 64) * 4 > MAX_BLOCKS:
            return "more blocks than a grid may have"
        return None

    def prepare(
        self,
        problem: Problem,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lse: Tensor | None = None,
        config: Config | cuda_sm80.Config | None = None,
    ) -> Callable[[], Tensor]:
        """Compile a kernel, encode tensor maps where it takes such, allocate the output.

        The output is contiguous and the same tensor at each call, which launches on the current stream. A graph that
        has recorded a call may be replayed as long as the call or this tensor is kept, and not just a view of it. A
        contiguous `lse` of (batch, heads_q, seqlen_q) in fp32 gets log Σ exp(softmax_scale · q · k) of each query, and
        -inf where it sees no key. `config`, whose class says which kernel, is the fastest by a model unless given.
        Raises ValueError where a tensor is not what the problem says or not laid out as a given configuration's kernel
        wants it, CompileError and DriverError.
        """
        import torch

        if reason := self.unsupported(problem):
            raise ValueError(reason)
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[problem.dtype]
        for name, tensor in {"q": q, "k": k, "v": v}.items():
            _require(problem, name, tensor, dtype, q.device)
        if lse is not None and not (
            lse.shape == problem.out_shape[:3]
            and lse.dtype == torch.float32
            and lse.is_contiguous()
            and lse.device == q.device
        ):
            raise ValueError(f"lse must be contiguous, of {problem.out_shape[:3]} in torch.float32, on {q.device}")
        out = torch.empty(problem.out_shape, dtype=dtype, device=q.device)
        index = q.device.index
        with torch.cuda.device(index):
            torch.cuda.synchronize()  # which gives this thread the device's context
            config = config or _chosen(problem, q, k, v)
            if isinstance(config, Config):
                launch = _launch(problem, config, q, k, v, out, lse)
            else:
                launch = _launch_strided(problem, config, q, k, v, out, lse)
        stream_of, current = torch._C._cuda_getCurrentRawStream, torch._C._cuda_getDevice
        capturing = torch._C._cuda_isCurrentStreamCapturing
        separate = config.has_workspace

        def attend(_owners: tuple[Tensor | None, ...] = (q, k, v, lse)) -> Tensor:
            try:
                if current() == index and not (separate and capturing()):
                    launch(stream_of(index))
                    return out
            except NoContext:  # of a thread in which torch has done nothing yet
                torch.cuda.synchronize(index)
            with torch.cuda.device(index):
                stream = stream_of(index)
                launch(stream, capture_of(stream) if separate else 0)
            return out

        return attend

    def parallel_units(self, problem: Problem) -> int:
        """The SMs that have a block of it."""
        import torch

        torch.cuda.synchronize()  # which gives this thread the device's context
        if torch.cuda.get_device_capability() != CAPABILITY:
            gpu = current_gpu()
            strided = cuda_sm80.choose(problem, gpu)
            return int(min(cuda_sm80.units(problem, strided) * strided.parts, gpu.sms))
        sms = current_sms()
        config = choose(problem, sms)
        return int(min(units(problem, config) * config.parts, sms))


def _require(problem: Problem, name: str, tensor: Tensor, dtype: object, device: object) -> None:
    """Raise ValueError where the kernel could not read a tensor as the problem has it."""
    # The kernel only gets addresses: a tensor smaller than the problem would be read past its end.
    if tensor.shape != getattr(problem, f"{name}_shape") or tensor.dtype != dtype:
        raise ValueError(f"{name} is {tuple(tensor.shape)} of {tensor.dtype}, not what {problem.case_id} has")
    if tensor.device.type != "cuda":
        raise ValueError(f"{name} is on {tensor.device}, not on a GPU")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, and q on {device}")
    if tensor.is_neg():  # a view whose numbers are not those in memory
        raise ValueError(f"{name} is a negated view: resolve_neg() it")
    if tensor.stride(-1) != 1:
        raise ValueError(f"the last dimension of {name} must be contiguous: its stride is {tensor.stride(-1)}")


def _chosen(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Config | cuda_sm80.Config:
    """On the current device. Raises CompileError and DriverError."""
    import torch

    if torch.cuda.get_device_capability() == CAPABILITY and all(map(_suits_tma, (q, k, v))):
        return choose(problem, current_sms())
    return cuda_sm80.choose(problem, current_gpu())


def _places(tensor: Tensor) -> list[int]:
    """Bytes at multiples of which a tensor's rows begin: its address, and the strides of what there is more of."""
    steps = [step * tensor.element_size() for size, step in zip(tensor.shape[:3], tensor.stride()[:3]) if size > 1]
    return [tensor.data_ptr(), *steps]


def _suits_tma(tensor: Tensor) -> bool:
    start, *steps = _places(tensor)
    return start % 16 == 0 and all(step > 0 and step % 16 == 0 for step in steps)


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """In elements; where there is only one of something, its stride is none that TMA would refuse."""
    return tuple(step if size > 1 else 8 for size, step in zip(tensor.shape, tensor.stride()))


def _launch(
    problem: Problem, config: Config, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None
) -> Launch:
    """Raises DriverError, and ValueError where TMA does not take a tensor."""
    for name, tensor in {"q": q, "k": k, "v": v}.items():
        if not _suits_tma(tensor):
            where = "at multiples of 16 bytes"
            raise ValueError(f"{name} must start, and its rows, heads and batch elements follow, {where}")
    bf16 = problem.dtype == "bf16"
    heads = packed_heads(problem, config.rows)
    queries, groups = config.rows // heads, problem.heads_q // heads
    batch_stride, head_stride, row_stride, _ = _strides(q)
    q_shape = (problem.batch, groups, problem.seqlen_q, heads, problem.head_dim)
    q_strides = (batch_stride, head_stride * heads, row_stride, head_stride, 1)
    maps = [tensor_map(q.data_ptr(), q_shape, q_strides, (1, 1, queries, heads, 64), bf16=bf16)]
    for tensor in (k, v):
        box = (1, 1, config.keys, 64)
        maps.append(tensor_map(tensor.data_ptr(), tensor.shape, _strides(tensor), box, bf16=bf16))
    if config.persistent and (reason := config.cannot_go_on(problem)):  # it would wait for ever
        raise ValueError(f"{config}: {reason}")
    params = Params(**_fields(problem, config.rows, out, lse), head_dim_v=problem.head_dim_v)
    shared_bytes = config.shared_bytes(problem.head_dim, problem.head_dim_v)
    if shared_bytes is None:
        raise ValueError(f"{config} takes more shared memory than there is")
    launched = units(problem, config)
    sms = current_sms()
    if config.parts > 1 and launched * config.parts > sms:  # they would wait for those that cannot start
        raise ValueError(f"{config}: {launched} tiles of {config.parts} parts are more than the {sms} SMs")
    if config.parts > 1:  # the kernel finds its tile by the grid
        grid = (launched * config.parts // (problem.batch * groups), groups, problem.batch)
    else:
        grid = (min(launched, sms) if config.persistent else launched, 1, 1)
    params.tiles_in_all = launched
    workspaces = Workspaces(*workspace_bytes(problem, config))
    # A graph needs them as long as it is replayed, and whoever replays it keeps the output, but maybe not the call.
    out.attnbench_workspaces = workspaces  # type: ignore[attr-defined]

    def arguments() -> Sequence[object]:
        own = Params.from_buffer_copy(params)
        counters, parts = workspaces.another()
        if config.persistent:
            own.taken = counters
        else:
            own.launches, own.parts = counters, parts
        return (*maps, own)

    return Launch(
        _kernel(cubin(problem, config), "flash_attention", shared_bytes, q.device.index),
        grid=grid,
        threads=config.threads,
        cooperative=config.parts > 1,
        shared_bytes=shared_bytes,
        arguments=arguments,
    )


def _launch_strided(
    problem: Problem, config: cuda_sm80.Config, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None
) -> Launch:
    """Raises DriverError, and ValueError where there are more blocks than a grid may have."""
    import torch

    blocks = cuda_sm80.units(problem, config) * config.parts
    if blocks > MAX_BLOCKS:
        raise ValueError(f"{config}: {blocks} blocks are more than a grid may have")
    copy = cuda_sm80.copy_bytes(place for tensor in (q, k, v) for place in _places(tensor))
    shared_bytes = config.shared_bytes(problem.head_dim, problem.head_dim_v)
    path = strided_cubin(problem, config, copy, "sm_{}{}".format(*torch.cuda.get_device_capability()))
    params = strided_params(problem, config, q, k, v, out, lse)
    workspaces = Workspaces(*cuda_sm80.workspace_bytes(problem, config))
    out.attnbench_workspaces = workspaces  # type: ignore[attr-defined]  # as in _launch

    def arguments() -> Sequence[object]:
        own = StridedParams.from_buffer_copy(params)
        own.arrived, own.parts = workspaces.another()
        return (own,)

    return Launch(
        _kernel(path, "flash_attention", shared_bytes, q.device.index),
        grid=(blocks, 1, 1),
        threads=config.threads,
        shared_bytes=shared_bytes,
        arguments=arguments,
    )


def strided_params(
    problem: Problem, config: cuda_sm80.Config, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None
) -> StridedParams:
    """What flash_attention_sm80.cu is launched with, but for where its blocks meet."""
    tensors = {name: Strided.of(tensor) for name, tensor in {"q": q, "k": k, "v": v}.items()}
    return StridedParams(**tensors, **_fields(problem, config.rows, out, lse))


def _fields(problem: Problem, rows: int, out: Tensor, lse: Tensor | None) -> dict[str, object]:
    """Fields that both kernels' parameters have."""
    heads = packed_heads(problem, rows)
    groups = problem.heads_q // heads
    all_groups = problem.batch * groups
    wave = min(CAUSAL_WAVE, all_groups) if problem.causal else 1
    far = problem.seqlen_q + problem.seqlen_k
    window = far if problem.window is None else min(problem.window, far)
    return {
        "out": out.data_ptr(),
        "lse": None if lse is None else lse.data_ptr(),
        "tiles": Divisor.of(-(-problem.seqlen_q // (rows // heads))),
        "groups": Divisor.of(groups),
        "key_groups": Divisor.of(groups // problem.heads_kv),
        "wave": Divisor.of(wave),
        "last_wave": Divisor.of(all_groups % wave or wave),
        "all_groups": all_groups,
        "seqlen_q": problem.seqlen_q,
        "seqlen_k": problem.seqlen_k,
        "ahead": 1 if problem.causal else window,
        "behind": window - 1,
        "scale_log2": problem.softmax_scale * LOG2_E,
    }


def macros(problem: Problem, config: Config) -> dict[str, int]:
    """What the source is compiled with; its head says what they mean."""
    return {
        "D": rounded(problem.head_dim),
        "DV": config.columns(problem.head_dim_v),
        "SPLIT_V": config.split_v,
        "BF16": int(problem.dtype == "bf16"),
        "MASKED": int(problem.causal or problem.window is not None),
        "WINDOW": int(problem.window is not None),
        "ROWS": config.rows,
        "KEYS": config.keys,
        "STAGES": config.stages,
        "SHARED_ROWS": config.shared_rows,
        "PARTS": config.parts,
        "PERSISTENT": int(config.persistent),
        "PACK": packed_heads(problem, config.rows),
        "SHARED_BYTES": config.shared_bytes(problem.head_dim, problem.head_dim_v) or SHARED_BYTES,
    }


def cubin(problem: Problem, config: Config) -> Path:
    """The kernel for a problem's head sizes, dtype and masks, and a configuration. Raises CompileError."""
    return _compiled(
        "flash_attention_sm90.cu", [f"-D{name}={value}" for name, value in macros(problem, config).items()]
    )


def strided_cubin(problem: Problem, config: cuda_sm80.Config, copy: int, arch: str) -> Path:
    """The kernel of any strides, for devices of `arch`. Raises CompileError."""
    flags = [f"-D{name}={value}" for name, value in cuda_sm80.macros(problem, config, copy).items()]
    return _compiled("flash_attention_sm80.cu", flags, arch)


def _compiled(source: str, flags: Sequence[str] = (), arch: str = ARCH) -> Path:
    with as_file(files("attnbench_kernels") / "cuda") as folder:
        return jit.compile(folder / source, toolchain=_toolchain(arch), flags=flags).path


def _toolchain(arch: str = ARCH) -> jit.Toolchain:
    """NVRTC, which compiles the kernel in half of nvcc's time and comes with torch; else nvcc.

    Raises ToolchainMissing, with what to install, where there is neither.
    """
    try:
        return jit.nvrtc_toolchain(arch)
    except jit.ToolchainMissing as error:
        with contextlib.suppress(jit.ToolchainMissing):
            return jit.cuda_toolchain(arch, cubin=True)
        raise error


@lru_cache
def _kernel(path: Path, function: str, shared_bytes: int, device: int) -> Kernel:
    """Loaded once a device, whose context is the current one."""
    kernel = Kernel(path, function)
    kernel.allow(shared_bytes)
    return kernel


def current_gpu() -> cuda_sm80.Gpu:
    """The current context's. Raises DriverError."""
    names = cuda_driver.SM_COUNT, cuda_driver.SHARED_BYTES_OF_BLOCK, cuda_driver.SHARED_BYTES_OF_SM
    return cuda_sm80.Gpu(*map(cuda_driver.attribute, names))


def current_sms() -> int:
    """The current context's device has so many. Raises DriverError."""
    return int(cuda_driver.attribute(cuda_driver.SM_COUNT))
