"""Owns jit_flash on Ascend NPUs: compiles kernels/ascend/flash_pto.cpp for a problem and launches it.

Knows nothing of the kernel's insides. Nothing of it was run on hardware yet.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from typing import TYPE_CHECKING

from attnbench import jit, settings
from attnbench.backend import Backend
from attnbench.problem import DeviceKind, Problem

if TYPE_CHECKING:
    from torch import Tensor

TORCH_DEVICE = "npu"
"""Where tensors must lie: the kernel gets their addresses."""
ROWS, KEYS = 128, (128, 256)
"""Of a unit of work, as in the kernel, which is compiled for one number of keys."""
UNIT_COST, START_COST = {128: 0.54, 256: 1.0}, {128: 1.3, 256: 1.8}
"""What a unit, and filling the pipeline, takes beside a unit of 256 keys, by the PTO library's cost model."""
HEAD_DIMS = (64, 128)
MAX_BLOCKS = 32
"""As in the kernel."""
LEAST_CORES = 20
"""Of any Ascend 910B: what is taken of a device whose cores nobody knows. More blocks than cores would wait for each
other for ever."""
MAX_SEQLEN = 1 << 20
"""Units of a head, positions and their differences fit into 32 bits."""
ARCH_950, NAME_950 = "dav-3510", re.compile("950|910_95")
"""Of an Ascend 950, A5, and what stands in its name."""
NAME_910 = re.compile("910B|910C|910_93")
"""In the names of those with jit.PTO_ARCH."""
MIN_SCALE, MAX_SCALE = 1e-20, 10.0
"""Times a hidden score, −1e37, it is a finite float and far below any other."""


@dataclass(frozen=True)
class Work:
    """How a problem is cut into units of `keys` keys, and these into blocks."""

    keys: int
    units: int
    blocks: int
    """Cube cores, two vector cores with each."""

    @classmethod
    def of(cls, problem: Problem, keys: int, cores: int) -> Work:
        units = 0
        for tile in range(problem.seqlen_q // ROWS):
            seen = problem.seqlen_k
            if problem.causal:
                seen = min(seen, (tile + 1) * ROWS + problem.seqlen_k - problem.seqlen_q)
            units += max(-(-seen // keys), 1)
        units *= problem.batch * problem.heads_q
        return cls(keys, units, min(units, cores, MAX_BLOCKS))

    @property
    def cost(self) -> float:
        """Of the block that has most to do, in units of 256 keys."""
        return START_COST[self.keys] + -(-self.units // self.blocks) * UNIT_COST[self.keys]


def choose(problem: Problem, cores: int) -> Work:
    """The work that is done first; of equals that with fewer units."""
    work = [Work.of(problem, keys, cores) for keys in KEYS if problem.seqlen_k % keys == 0]
    return min(work, key=lambda found: (found.cost, found.units))


class JitFlashNpu(Backend):
    """Forward attention on contiguous fp16 tensors, query tiles and key ranges shared out over all cores."""

    name = "jit_flash"
    device: DeviceKind = "npu"
    summary = "JIT-compiled PTO flash attention (not yet run on hardware)"

    @property
    def sources(self) -> Sequence[str]:  # type: ignore[override]
        return [str(files("attnbench_kernels") / "ascend")]

    def unavailable(self) -> str | None:
        from attnbench.devices import device

        missing = [device(self.device).unavailable(), jit.missing(jit.pto_toolchain)]
        written_for = f"the kernel is for {jit.PTO_ARCH} (Ascend 910B and 910C)"
        named = settings.npu_arch()
        if named not in (None, jit.PTO_ARCH):
            missing.append(f"{written_for}: unset NPU_ARCH={named}")
        elif missing[0] is None and (of_device := arch()) != jit.PTO_ARCH:
            other = f"{written_for}, not for {of_device}: pto_demo_flash compiles the PTO library's own"
            missing.append(other if of_device else f"{written_for}, and {unknown_arch()}")
        return "; ".join(filter(None, missing)) or None

    def unsupported(self, problem: Problem) -> str | None:
        if problem.direction != "fwd":
            return f"direction {problem.direction}: the kernel only runs forward"
        if problem.window is not None:
            return "no sliding window"
        dtype = problem.resolve(self.device).dtype
        if dtype != "fp16":
            return f"the kernel takes fp16, not {dtype}"
        if problem.head_dim not in HEAD_DIMS or problem.head_dim_v != problem.head_dim:
            return "head sizes 64 and 128, the same for q, k and v"
        for name in ("seqlen_q", "seqlen_k"):
            if getattr(problem, name) % ROWS or getattr(problem, name) > MAX_SEQLEN:
                return f"{name} {getattr(problem, name)} is no multiple of {ROWS} up to {MAX_SEQLEN}"
        if not MIN_SCALE <= problem.softmax_scale <= MAX_SCALE:
            return f"softmax_scale {problem.softmax_scale:g} is not between {MIN_SCALE:g} and {MAX_SCALE:g}"
        if problem.batch * problem.heads_q >= 1 << 31:
            return "2³¹ heads in all, or more"
        return None

    def prepare(
        self, problem: Problem, q: Tensor, k: Tensor, v: Tensor, *, fp32_out: bool = False
    ) -> Callable[[], Tensor]:
        """Compile the kernel, allocate output and workspace, and wait for a first launch.

        The output is contiguous, fp16 or with `fp32_out` fp32, and the same tensor at each call, which launches on the
        current stream of the device that was the current one here; calls on two streams at a time would share the
        workspace. Raises ValueError where a tensor is not what the problem says, CompileError, and RuntimeError where
        the launch fails.
        """
        import torch

        if reason := self.unsupported(problem):
            raise ValueError(reason)
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            require(problem, name, tensor)
        work = choose(problem, cores())
        library = _library(problem.head_dim, work.keys, fp32_out)
        out = torch.empty(problem.out_shape, dtype=torch.float32 if fp32_out else torch.float16, device=q.device)
        workspace = torch.empty(library.flash_workspace(work.blocks), dtype=torch.uint8, device=q.device)
        arguments = (
            *(tensor.data_ptr() for tensor in (q, k, v, out, workspace)),
            *(problem.batch * problem.heads_q, problem.heads_q, problem.heads_kv),
            *(problem.seqlen_q, problem.seqlen_k, int(problem.causal), work.blocks, problem.softmax_scale),
        )
        launch, stream_of = library.flash_launch, current_stream

        def attend(_owners: tuple[Tensor, ...] = (q, k, v, workspace)) -> Tensor:
            if status := launch(stream_of(), *arguments):
                raise RuntimeError(f"the kernel was not launched: status {status}")
            return out

        attend()
        synchronize()  # what the device itself does not take, it says no earlier
        return attend

    def parallel_units(self, problem: Problem) -> int:
        """The cube cores that have a part of it."""
        return choose(problem, cores()).blocks


def require(problem: Problem, name: str, tensor: Tensor) -> None:
    """Raise ValueError where a kernel that gets but an address could not read a tensor as the problem has it."""
    import torch

    if tensor.shape != getattr(problem, f"{name}_shape") or tensor.dtype != torch.float16:
        raise ValueError(f"{name} is {tuple(tensor.shape)} of {tensor.dtype}, not what {problem.case_id} has")
    if tensor.device.type != TORCH_DEVICE:
        raise ValueError(f"{name} is on {tensor.device}, not on an NPU")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous: its strides are {tensor.stride()}")
    if tensor.is_neg():  # a view whose numbers are not those in memory
        raise ValueError(f"{name} is a negated view: resolve_neg() it")
    if tensor.data_ptr() % 32:
        raise ValueError(f"{name} must start at a multiple of 32 bytes")


def current_stream() -> int:
    """The current stream's handle, to be fetched in every call: reading it drains torch_npu's task queue, which a
    launch past it would overtake."""
    import torch

    return int(torch.npu.current_stream().npu_stream)  # type: ignore[attr-defined]


def synchronize() -> None:
    import torch

    torch.npu.synchronize()  # type: ignore[attr-defined]


def cores() -> int:
    """The current device's cube cores; no more than it has, where that is not known."""
    from attnbench.devices import device

    return device("npu").info().cores or LEAST_CORES


def arch() -> str | None:
    """NPU_ARCH, else that of the current device, as CANN's compiler calls it; None where that is not known."""
    from attnbench.devices import device

    name = device("npu").info().name
    known = ARCH_950 if NAME_950.search(name) else jit.PTO_ARCH if NAME_910.search(name) else None
    return settings.npu_arch() or known


def unknown_arch() -> str:
    """Why nothing is compiled for the current device, and what to do."""
    from attnbench.devices import device

    return f"that of {device('npu').info().name} is not known: set NPU_ARCH if it is one of them"


def _library(head_dim: int, keys: int, fp32_out: bool) -> ctypes.CDLL:
    """Raises CompileError."""
    flags = (f"-DHEAD_DIM={head_dim}", f"-DKEYS={keys}", f"-DOUT_FP32={int(fp32_out)}")
    with as_file(files("attnbench_kernels") / "ascend") as folder:
        toolchain = jit.pto_toolchain(jit.PTO_ARCH)
        library = jit.compile(folder / "flash_pto.cpp", toolchain=toolchain, flags=flags).load()
    library.flash_workspace.restype = ctypes.c_int64
    library.flash_workspace.argtypes = [ctypes.c_int]
    library.flash_launch.restype = ctypes.c_int
    library.flash_launch.argtypes = [*[ctypes.c_void_p] * 6, *[ctypes.c_int] * 7, ctypes.c_float]
    return library
