"""kernels/cuda/flash_attention_sm80.cu without a GPU: the kernel's own source as C++, against float64.

cuda_emulation/emulation.h stands in for the device's instructions, and reports what a device would forgive. What is
launched is what the plugin would launch. A device's own instructions are test_jit_flash_gpu.py's.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from attnbench import jit
from attnbench.problem import Problem
from attnbench_plugins.jit_flash import cuda, cuda_sm80
from attnbench_plugins.jit_flash.cuda_sm80 import Config
from attnbench_plugins.masks import visible

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "kernels" / "cuda" / "flash_attention_sm80.cu"
EMULATION = Path(__file__).with_name("cuda_emulation") / "emulation.h"
MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
"""Memory that nobody touches takes none; in mmap since Python 3.13."""
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def problem(seqlen_q: int, seqlen_k: int, **fields) -> Problem:
    return Problem(seqlen_q=seqlen_q, seqlen_k=seqlen_k, **{"dtype": "fp16", "head_dim": 64, **fields})


# --- inputs -----------------------------------------------------------------------------------------------------------


def inputs(case: Problem, seed: int = 0) -> list[Tensor]:
    """Random tensors, with NaN all around them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (case.q_shape, case.k_shape, case.v_shape)
    return [placed(torch.randn(shape, generator=generator).to(DTYPES[case.dtype])) for shape in shapes]


def placed(tensor: Tensor, *, order: Sequence[int] = (0, 1, 2, 3), pad: int = 8, offset: int = 64) -> Tensor:
    """The same numbers in a buffer of NaN: dimensions in memory in this `order`, `pad` more columns in a row."""
    sizes = [tensor.shape[i] for i in order]
    room = torch.full((offset + math.prod(sizes[:3]) * (sizes[3] + pad) + 64,), math.nan, dtype=tensor.dtype)
    start = -(-room.data_ptr() // 16) * 16 - room.data_ptr()  # the offset tells how it is aligned
    rows = room[start // 2 + offset :][: math.prod(sizes[:3]) * (sizes[3] + pad)].view(*sizes[:3], sizes[3] + pad)
    made = rows[..., : sizes[3]].permute(*(list(order).index(i) for i in range(4)))
    return made.copy_(tensor)


def extent(tensor: Tensor) -> tuple[int, int]:
    """The first address of a tensor, and the one after its last."""
    reach = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()


# --- the kernel on a CPU ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """What the kernel is compiled for."""

    case: Problem
    config: Config
    copy: int = 16

    @property
    def macros(self) -> dict[str, int]:
        return cuda_sm80.macros(self.case, self.config, self.copy)


def compiled(source: Path, macros: dict[str, int]) -> ctypes.CDLL:
    base = jit.cpp_toolchain()
    flags = ("-O1", "-std=c++17", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
    # A long jump from a fiber to another is none that glibc's checks know.
    flags = (*flags, "-U_FORTIFY_SOURCE", "-x", "c++", f'-DEMULATION="{EMULATION}"')
    words = [f"-D{name}={value}" for name, value in macros.items()]
    library = jit.compile(source, toolchain=replace(base, flags=flags), flags=words).load()
    library.emulate.restype = ctypes.c_char_p
    return library


@cache
def kernel(macros: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
    return compiled(SOURCE, dict(macros))


class Workspace:
    """Where blocks meet, as the plugin lays it out: counters of zero, and NaN where a part will be."""

    def __init__(self, variant: Variant) -> None:
        sizes = cuda_sm80.workspace_bytes(variant.case, variant.config)
        self.counters, self.parts = (
            torch.zeros(sizes[0] // 4, dtype=torch.int32),
            torch.full((sizes[1] // 4,), math.nan),
        )


def run(
    variant: Variant,
    tensors: Sequence[Tensor],
    library: ctypes.CDLL | None = None,
    workspace: Workspace | None = None,
    order: Callable[[list[int]], Sequence[int]] | None = None,
) -> SimpleNamespace:
    """The kernel's output and log-sum-exp, and what the emulation has to say.

    `order` is the blocks'; as on a device, no tile has all its parts before another has some, unless it is given.
    """
    case, config = variant.case, variant.config
    met = workspace or Workspace(variant)
    out = torch.full(case.out_shape, math.nan, dtype=tensors[0].dtype)
    lse = torch.full(case.out_shape[:3], 7.0)
    params = cuda.strided_params(case, config, *tensors, out, lse)
    params.arrived, params.parts = met.counters.data_ptr(), met.parts.data_ptr()
    meets = (met.counters, met.parts) if config.parts > 1 else ()
    ends = [end for tensor in (*tensors, out, lse, *meets) for end in extent(tensor)]
    blocks = list(range(cuda_sm80.units(case, config) * config.parts))
    blocks = order(blocks) if order else sorted(blocks, key=lambda block: block % config.parts)
    ranges, conflicts = (ctypes.c_void_p * len(ends))(*ends), ctypes.c_int()
    library = library or kernel(tuple(variant.macros.items()))
    fault = library.emulate(
        *(ctypes.byref(params), len(blocks), (ctypes.c_uint32 * len(blocks))(*blocks)),
        *(config.shared_bytes(case.head_dim, case.head_dim_v), 3, 2, len(meets), ranges, ctypes.byref(conflicts)),
    )
    if not fault and met.counters.any():
        fault = b"counters are not ready for the next launch"
    return SimpleNamespace(out=out, lse=lse, fault=fault.decode(), conflicts=conflicts.value)


def attention(
    case: Problem, q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype, weights_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, step by step in `dtype`, with the weights rounded as the tensor cores take them."""
    group = case.heads_q // case.heads_kv
    q, k, v = q.to(dtype), k.to(dtype).repeat_interleave(group, 1), v.to(dtype).repeat_interleave(group, 1)
    scores = q @ k.mT * case.softmax_scale
    mask = visible(case, torch.device("cpu"))
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    top = scores.amax(-1, keepdim=True).nan_to_num(0, 0, 0)
    weights = torch.exp(scores - top)
    rounded = weights if weights_dtype is None else weights.to(weights_dtype).to(dtype)
    out = rounded @ v / weights.sum(-1, keepdim=True)
    return out if mask is None else out.masked_fill(~mask.any(-1, keepdim=True), 0), torch.logsumexp(scores, -1)


def wrong(variant: Variant, tensors: Sequence[Tensor] | None = None, library: ctypes.CDLL | None = None) -> str:
    """What is wrong with the output, the log-sum-exp, or how they were computed; empty where nothing is."""
    tensors = tensors or inputs(variant.case)
    found = run(variant, tensors, library)
    if found.fault:
        return found.fault
    truth, true_lse = attention(variant.case, *tensors, torch.float64)
    plain, _ = attention(variant.case, *tensors, torch.float32, found.out.dtype)
    ulp = torch.finfo(found.out.dtype).eps * 2.0 ** math.floor(math.log2(truth.abs().max().item() or 1.0))
    limit = 2 * (plain.double() - truth).abs().max().item() + ulp
    error = (found.out.double() - truth).abs().max().item()
    words = [] if error <= limit else [f"error {error:.3g}, limit {limit:.3g}"]
    near = (found.lse.double() - true_lse).abs() <= 1e-5 * (1 + true_lse.abs())
    if not torch.where(true_lse.isinf(), found.lse.double() == true_lse, near).all():
        words.append("lse is off")
    if found.conflicts:
        words.append(f"{found.conflicts} bank conflicts")
    return ", ".join(words)


# --- what it computes -------------------------------------------------------------------------------------------------

TALL = Config(128, 64, 4)
"""A warp has 32 rows, one stage."""
MIDDLE = Config(64, 64, 4, stages=2, q_registers=True)
FLAT = Config(32, 64, 2, 2, stages=2, q_registers=True)
LEAST = Config(16, 64, 1, 4, stages=2, q_registers=True)
"""Its warps have keys of their own."""


def split(config: Config, parts: int) -> Config:
    """Its keys between blocks."""
    return replace(config, parts=parts)


LENGTHS = [(1, 1), (1, 257), (17, 33), (33, 17), (64, 64), (65, 65), (70, 200), (130, 1)]
MASKS = [
    {"causal": causal, "window": window, "seqlen_q": q, "seqlen_k": k}
    for causal, window in ((True, None), (False, 1), (False, 65), (True, 40))
    for q, k in ((1, 200), (64, 64), (100, 200), (150, 70))
]
CASES: dict[str, list[Variant]] = {
    "lengths": [Variant(problem(*size), MIDDLE) for size in LENGTHS],
    "lengths, one stage": [Variant(problem(*size, dtype="bf16"), Config(64, 64, 4)) for size in LENGTHS],
    "lengths, split keys": [Variant(problem(*size, dtype="bf16"), LEAST) for size in LENGTHS],
    "lengths, three stages": [Variant(problem(*size), Config(32, 32, 2, stages=3)) for size in LENGTHS],
    "masks": [Variant(problem(**fields), MIDDLE) for fields in MASKS],
    "masks, one stage": [Variant(problem(**fields), Config(64, 32, 2)) for fields in MASKS],
    "masks, split keys": [Variant(problem(**fields, dtype="bf16"), FLAT) for fields in MASKS],
    "many heads, causal": [Variant(problem(40, 50, batch=3, heads_q=6, heads_kv=6, causal=True), FLAT)],
    "32 rows a warp": [Variant(problem(150, 230, head_dim=128), TALL)],
    "32 rows a warp, causal": [Variant(problem(150, 230, head_dim=128, causal=True, dtype="bf16"), TALL)],
    "96 keys, causal": [Variant(problem(150, 230, causal=True), Config(128, 96, 4))],
    "8 warps": [Variant(problem(130, 100, head_dim=256, causal=True), Config(128, 32, 8))],
    "head dims 8 and 8": [Variant(problem(40, 90, head_dim=8), Config(32, 64, 2))],
    "head dims 8 and 256": [Variant(problem(40, 90, head_dim=8, head_dim_v=256, dtype="bf16"), Config(64, 64, 4))],
    "head dims 256 and 8": [Variant(problem(40, 90, head_dim=256, head_dim_v=8, dtype="bf16"), Config(32, 64, 2))],
    "head dims 40 and 72": [Variant(problem(40, 90, head_dim=40, head_dim_v=72), replace(FLAT, stages=1))],
    "head dims 96 and 192": [Variant(problem(40, 90, head_dim=96, head_dim_v=192), Config(32, 32, 2, stages=2))],
    "grouped heads": [
        Variant(problem(*size, heads_q=6, heads_kv=2, batch=2, causal=True), FLAT) for size in ((1, 70), (13, 130))
    ],  # 10 queries of 3 heads fit into 32 rows, and two rows are nobody's
    "grouped heads, decoding": [
        Variant(problem(1, size, heads_q=16, heads_kv=2, head_dim=128), LEAST) for size in (3, 400)
    ],
    "grouped heads, many queries": [Variant(problem(70, 100, heads_q=4, heads_kv=2), MIDDLE)],
    # Some parts have no keys, at the lengths; with masks, some have none that a row sees.
    "lengths, 3 parts": [Variant(problem(*size), split(MIDDLE, 3)) for size in LENGTHS],
    "lengths, 3 parts, split keys": [Variant(problem(*size, dtype="bf16"), split(LEAST, 3)) for size in LENGTHS],
    "masks, 2 parts": [Variant(problem(**fields), split(Config(64, 32, 2), 2)) for fields in MASKS],
    "masks, 5 parts, split keys": [Variant(problem(**fields, dtype="bf16"), split(FLAT, 5)) for fields in MASKS],
    "many heads, causal, 2 parts": [
        Variant(problem(40, 150, batch=3, heads_q=6, heads_kv=6, causal=True), split(FLAT, 2))
    ],
    "32 rows a warp, 4 parts": [Variant(problem(150, 530, head_dim=128, causal=True, dtype="bf16"), split(TALL, 4))],
    "17 parts": [Variant(problem(40, 17 * 32 + 5), split(Config(32, 32, 2), 17))],  # asked for in two rounds
    "32 parts": [Variant(problem(20, 2100, dtype="bf16"), split(LEAST, 32))],
    "head dims 8 and 8, 3 parts": [Variant(problem(40, 190, head_dim=8), split(Config(32, 64, 2), 3))],
    "head dims 8 and 256, 2 parts": [
        Variant(problem(40, 190, head_dim=8, head_dim_v=256, dtype="bf16"), split(Config(64, 64, 4), 2))
    ],
    "head dims 40 and 72, 3 parts": [
        Variant(problem(40, 190, head_dim=40, head_dim_v=72), split(replace(FLAT, stages=1), 3))
    ],
    "grouped heads, 3 parts": [
        Variant(problem(*size, heads_q=6, heads_kv=2, batch=2, causal=True), split(FLAT, 3))
        for size in ((1, 70), (13, 130))
    ],
    "grouped heads, decoding, 4 parts": [
        Variant(problem(1, size, heads_q=16, heads_kv=2, head_dim=128), split(LEAST, 4)) for size in (3, 400)
    ],
}


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    """Every kernel once, two at a time."""
    every = {tuple(variant.macros.items()) for variants in (*CASES.values(), LAYOUTS.values()) for variant in variants}
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(kernel, every))


@pytest.mark.parametrize("name", CASES)
def test_against_float64(name: str) -> None:
    found = {variant.case.case_id: wrong(variant) for variant in CASES[name]}
    assert found == dict.fromkeys(found, "")


# --- how tensors lie --------------------------------------------------------------------------------------------------

OF_3_HEADS = problem(40, 90, heads_q=3, head_dim=40, batch=2, causal=True)
LAYOUTS = {
    copy: Variant(OF_3_HEADS, Config(32, 64, 2, stages=stages), copy)
    for copy, stages in ((16, 2), (8, 1), (4, 2), (2, 1))
}


@pytest.mark.parametrize(
    ("copy", "how"),
    [
        (16, {"order": (0, 2, 1, 3)}),
        (16, {"order": (2, 1, 0, 3), "pad": 24}),
        (8, {"pad": 4}),
        (8, {"offset": 68}),
        (4, {"pad": 2, "order": (0, 2, 1, 3)}),
        (4, {"offset": 66}),
        (2, {"pad": 1}),
        (2, {"offset": 67}),
        (2, {"pad": 3, "offset": 61, "order": (1, 2, 0, 3)}),
    ],
)
def test_any_strides_and_any_alignment(copy: int, how: dict) -> None:
    tensors = [placed(tensor, **how) for tensor in inputs(OF_3_HEADS)]
    places = [place for tensor in tensors for place in cuda._places(tensor)]
    assert cuda_sm80.copy_bytes(places) == copy
    assert wrong(LAYOUTS[copy], tensors) == ""


@pytest.mark.parametrize("which", [0, 1, 2])
def test_expanded_tensors(which: int) -> None:
    """Heads, batch elements and rows that are one and the same in memory."""
    tensors = inputs(OF_3_HEADS)
    tensors[which] = tensors[which][:1, :1, :1].expand(tensors[which].shape)
    assert wrong(LAYOUTS[16], tensors) == ""


def test_offsets_beyond_32_bits() -> None:
    step = 2**31 + 8
    try:
        room = mmap.mmap(-1, 2 * step + 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    except OSError as error:
        pytest.skip(f"no room for addresses: {error}")
    case = problem(2, 2, head_dim=40)
    kept = torch.frombuffer(room, dtype=torch.float16)
    tensors = [kept[64 * i :].as_strided(case.q_shape, (0, 0, step, 1)) for i in range(3)]
    for tensor, values in zip(tensors, inputs(case)):
        tensor.copy_(values)
    assert wrong(Variant(case, Config(32, 64, 2, stages=2)), tensors) == ""


# --- parts ------------------------------------------------------------------------------------------------------------

SPLIT = [
    Variant(problem(70, 500, heads_q=2, causal=True), split(MIDDLE, 3)),
    Variant(problem(70, 500, heads_q=2, causal=True, dtype="bf16"), split(LEAST, 3)),
]


@pytest.mark.parametrize("variant", SPLIT, ids=["a warp a row", "split keys"])
def test_in_whichever_order_blocks_run_the_bits_are_the_same(variant: Variant) -> None:
    tensors = inputs(variant.case)
    first = run(variant, tensors)
    assert first.fault == ""
    shuffled = [random.Random(seed).sample for seed in range(3)]
    for order in (list, lambda blocks: blocks[::-1], *(lambda blocks, s=s: s(blocks, len(blocks)) for s in shuffled)):
        found = run(variant, tensors, order=order)
        assert found.fault == ""
        assert torch.equal(found.out, first.out)
        assert torch.equal(found.lse, first.lse)


@pytest.mark.parametrize("variant", SPLIT, ids=["a warp a row", "split keys"])
def test_launches_share_a_workspace_one_after_the_other(variant: Variant) -> None:
    """What an earlier one has left there is not taken for this one's."""
    workspace = Workspace(variant)
    for seed in range(3):
        tensors = inputs(variant.case, seed)
        found, alone = (
            run(variant, tensors, workspace=workspace, order=lambda blocks: blocks[::-1]),
            run(variant, tensors),
        )
        assert found.fault == alone.fault == ""
        assert torch.equal(found.out, alone.out)
        assert torch.equal(found.lse, alone.lse)


# --- extreme numbers --------------------------------------------------------------------------------------------------


ALIKE = {
    "a warp a row": MIDDLE,
    "split keys": LEAST,
    "a warp a row, 2 parts": split(MIDDLE, 2),
    "split keys, 2 parts": split(LEAST, 2),
}


@pytest.mark.parametrize("config", ALIKE.values(), ids=ALIKE)
@pytest.mark.parametrize("factor", [1e-3, 1.0, 30.0, 4e3, 1e6, 1e16], ids="{:g}".format)
def test_logits_of_any_size(factor: float, config: Config) -> None:
    """Up to 10³², where products of a score and the scale keep nothing of the differences between scores."""
    case = problem(20, 150, dtype="bf16")
    q, k, v = inputs(case)
    assert wrong(Variant(case, config), [q * factor, k * factor, v]) == ""


def test_a_maximum_that_rises_in_every_block() -> None:
    case = problem(20, 300, dtype="bf16")
    q, k, v = inputs(case)
    q[..., 0] = 8.0
    k[..., 0] = torch.linspace(-40, 40, 300)
    for config in ALIKE.values():
        assert wrong(Variant(case, config), [q, k, v]) == ""


@pytest.mark.parametrize("config", [MIDDLE, FLAT, split(MIDDLE, 2), split(FLAT, 2)], ids=ALIKE)
def test_a_row_that_sees_no_key_is_zeros_whatever_is_hidden_from_it(config: Config) -> None:
    case = problem(100, 70, causal=True, dtype="fp16" if config.rows == 64 else "bf16")
    q, k, v = inputs(case)
    v[:, :, 0, 5], v[:, :, 1, 6], k[:, :, 2] = math.inf, math.nan, math.nan
    found = run(Variant(case, config), (q, k, v))
    assert found.fault == ""
    assert found.out[:, :, :30].eq(0).all()
    assert found.lse[:, :, :30].eq(-math.inf).all()
    assert found.out[:, :, 31:, 6].isnan().all()
    assert found.out[:, :, 30, 7].isfinite().all()


@pytest.mark.parametrize("config", ALIKE.values(), ids=ALIKE)
def test_nan_and_infinity_come_through(config: Config) -> None:
    case = problem(20, 150, dtype="bf16")
    q, k, v = inputs(case)
    q[0, 0, 3, 5], v[0, 0, -1, 11] = math.nan, math.inf
    found = run(Variant(case, config), (q, k, v))
    expected, _ = attention(case, q, k, v, torch.float64)
    expected[0, 0, 3] = math.nan
    assert found.fault == ""
    assert torch.equal(found.out.isnan(), expected.isnan())
    assert torch.equal(found.out.isinf(), expected.isinf())
    assert torch.equal(found.lse.isnan(), torch.zeros_like(found.lse).index_fill(2, torch.tensor(3), 1).bool())
    k[0, 0, 77, 0] = math.nan
    assert run(Variant(case, config), (q, k, v)).out.isnan().all()


@pytest.mark.parametrize("config", ALIKE.values(), ids=ALIKE)
@pytest.mark.parametrize("sign", [-1, 1])
def test_scores_of_infinity_are_not_hidden_keys(config: Config, sign: int) -> None:
    """Finite bf16 inputs can have them: plain attention has NaN there, too."""
    case = problem(20, 150, dtype="bf16")
    q, k, v = inputs(case)
    q[..., 0], k[..., 0] = 3e38, sign * 3e38
    found = run(Variant(case, config), (q, k, v))
    assert found.fault == ""
    assert found.out.isnan().all()


# --- what the emulation notices ---------------------------------------------------------------------------------------


def test_the_emulation_rounds_as_torch_does() -> None:
    generator = torch.Generator().manual_seed(0)
    floats = torch.randn(4000, generator=generator) * 2.0 ** torch.randint(-30, 20, (4000,), generator=generator)
    special = [0.0, -0.0, 1.0, 65519.0, 65520.0, 2.0**-24, 2.0**-25, 3 * 2.0**-25, 6.1e-5, math.inf, -math.inf]
    floats = torch.cat([floats, torch.tensor(special)])
    for dtype, variant in (("fp16", CASES["lengths"][0]), ("bf16", CASES["lengths, one stage"][0])):
        library = kernel(tuple(variant.macros.items()))
        found = [library.packed(ctypes.c_float(x), ctypes.c_float(0)) & 0xFFFF for x in floats.tolist()]
        assert found == [x & 0xFFFF for x in floats.to(DTYPES[dtype]).view(torch.int16).tolist()]


PLAIN = problem(70, 200, head_dim=128, causal=True)
PARTED, PARTED_LEAST = split(MIDDLE, 3), split(LEAST, 3)
WAIT = "copy_wait<STAGES == 1 ? 0 : STAGES - 2>();"
FAULTS = {
    "a wait is missing": (WAIT, "", MIDDLE),
    "a wait leaves one group too many": (WAIT, "copy_wait<1>();", MIDDLE),
    "no barrier before reading": (f"{WAIT}\n        __syncthreads();", WAIT, MIDDLE),
    "no barrier before V is read": ("copy_wait<0>();\n            __syncthreads();", "copy_wait<0>();", TALL),
    "no barrier before the output": ("__syncthreads();  // all have read what the output lies over", "", LEAST),
    "no barrier between the parts": ("__syncthreads();\n        add_warps", "add_warps", LEAST),
    "rows are read before all lanes wrote": ("    __syncwarp();\n", "", MIDDLE),
    "rows are not permuted": ("chunk ^ (row / (8 / SPAN<CHUNKS>) % SPAN<CHUNKS>)", "chunk", MIDDLE),
    "a fragment's step is wrong": ("step % STEPS * 32", "step % STEPS * 16", MIDDLE),
    "the last keys are dropped": ("tile.end = (high + KEYS - 1) / KEYS", "tile.end = high / KEYS", MIDDLE),
    "keys are read beyond the last": ("int(Mine::row(i)) < left", "int(Mine::row(i)) <= left", MIDDLE),
    "one key too many is seen": ("8 * n + e >= high", "8 * n + e > high", MIDDLE),
    "a block is not masked": ("key + WARP_KEYS <= high_key(p, first)", "key < high_key(p, first)", MIDDLE),
    "sums are not rescaled": ("sum[m][h] *= factor;", "", LEAST),
    "a warp's part has another's weight": ("sums[i] * weight", "sums[i]", LEAST),
    "a part's columns have another's weight": ("total[c] += o[i][c] * weight", "total[c] += o[i][c]", PARTED),
    "a part's sum has another's weight": ("states[i][1] * weight", "states[i][1]", PARTED_LEAST),
    "the last part is dropped": ("const int left = PARTS - round", "const int left = PARTS - 1 - round", PARTED),
    "parts lie over each other": ("parts + number % PARTS * PART_FLOATS", "parts", PARTED),
    "a part is read from another's place": ("(round * BATCH + i) * PART_FLOATS", "i / 2 * 2 * PART_FLOATS", PARTED),
    "tiles' parts lie over each other": ("p.parts + work * (PARTS * PART_FLOATS)", "p.parts", PARTED),
    "one arrival fewer is counted": ("arrived, PARTS - 1) == PARTS - 1", "arrived, PARTS - 2) == PARTS - 2", PARTED),
    "the last does not know that it is": ("arrived, PARTS - 1) == PARTS - 1", "arrived, PARTS - 1) == PARTS", PARTED),
    "the first adds up": ("arrived, PARTS - 1) == PARTS - 1", "arrived, PARTS - 1) == 0", PARTED),
    "counters are not at zero again": ("atomicInc(arrived, PARTS - 1)", "atomicInc(arrived, PARTS)", PARTED),
    "tiles count together": ("is_last(p.arrived + work)", "is_last(p.arrived)", PARTED_LEAST),
    "no barrier before counting": ("    __syncthreads();  // all have written", "    // all have written", PARTED),
    "no fence before counting": ("__threadfence();\n        last", "last", PARTED),
    "no fence after counting": ("PARTS - 1;\n        __threadfence();", "PARTS - 1;", PARTED),
    "only the first thread knows": ("return __syncthreads_or(last)", "return last", PARTED),
    "a part has a key block too few": (
        "blocks * (part + 1) / PARTS",
        "blocks * (part + 1) / PARTS - (part == 1)",
        PARTED,
    ),
    "a part has another's key block too": (
        "first + blocks * part / PARTS",
        "first + blocks * part / PARTS - (part == 2)",
        PARTED,
    ),
    "a part's last rows are dropped": (
        "if (at >= rows_of(p, tile)) continue",
        "if (at + 1 >= rows_of(p, tile)) continue",
        PARTED,
    ),
    "a part's last row is dropped": (
        "if (at >= rows_of(p, tile)) break",
        "if (at + 1 >= rows_of(p, tile)) break",
        PARTED_LEAST,
    ),
    "the sum so far keeps its weight": ("total[c] *= factor", "total[c] *= 1", split(LEAST, 17)),
}


def rising(config: Config) -> list[Tensor]:
    """Later keys outweigh earlier ones; of parts, not so far that a wrong one would not count."""
    tensors = inputs(PLAIN)
    most = 40 if config.parts == 1 else 10
    tensors[0][..., 0], tensors[1][..., 0] = 4.0, torch.linspace(-most, most, 200)
    return tensors


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_kernel_is_seen(name: str, tmp_path: Path) -> None:
    right, faulty, config = FAULTS[name]
    text = SOURCE.read_text()
    assert text.count(right) == 1
    source = tmp_path / SOURCE.name
    source.write_text(text.replace(right, faulty))
    variant = Variant(PLAIN, config)
    assert wrong(variant, rising(config), compiled(source, variant.macros)) != ""


@pytest.mark.parametrize("config", [TALL, MIDDLE, LEAST, PARTED, PARTED_LEAST, split(LEAST, 17)])
def test_without_a_fault_nothing_is(config: Config) -> None:
    assert wrong(Variant(PLAIN, config), rising(config)) == ""
