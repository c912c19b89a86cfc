"""jit_flash on a GPU, against float64: every shape, mask, layout and configuration that it claims.

A script in a process of its own does the work, since `auto` must be the CPU in the tests' own; each test asks for one
part of what it found. On a Hopper GPU every part runs twice: with its own kernel, and with the other, which takes any
strides, and any GPU from compute capability 8.0 on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

SCRIPT = r'''
import gc, itertools, json, math, random, traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
import torch
from attnbench import Problem
from attnbench_plugins.jit_flash import cuda, cuda_sm80
from attnbench_plugins.jit_flash.cuda import JitFlashCuda, current_gpu, current_sms
from attnbench_plugins.jit_flash.cuda_config import Config, choose, configs
from attnbench_plugins.masks import visible

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
DEVICE = torch.device("cuda:0")
CAPABILITY = torch.cuda.get_device_capability(0)
ARCH = "sm_{}{}".format(*CAPABILITY)
torch.zeros(1, device=DEVICE)
GPU = current_gpu()
PARTS = {}
STRIDED = False
"""Whether the kernel of any strides is to run where the other would do."""


def part(function):
    PARTS[function.__name__] = function
    return function


def prepared(case, q, k, v, lse=None, config=None):
    if STRIDED and config is None:
        config = cuda_sm80.choose(case, GPU)
    return JitFlashCuda().prepare(case, q, k, v, lse=lse, config=config)


def problem(seqlen_q, seqlen_k, **fields):
    return Problem(seqlen_q=seqlen_q, seqlen_k=seqlen_k, **{"dtype": "fp16", **fields})


def inputs(case, seed=0, scale=1.0):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    shapes = (case.q_shape, case.k_shape, case.v_shape)
    made = [torch.randn(shape, generator=generator, device=DEVICE) for shape in shapes]
    return [(tensor * scale).to(DTYPES[case.dtype]) for tensor in made]


def attention(case, q, k, v, dtype, weights_dtype=None):
    """Output and log-sum-exp, step by step in `dtype`, with the weights rounded as the tensor cores take them."""
    group = case.heads_q // case.heads_kv
    q, k, v = q.to(dtype), k.to(dtype).repeat_interleave(group, 1), v.to(dtype).repeat_interleave(group, 1)
    scores = q @ k.mT * case.softmax_scale
    mask = visible(case, DEVICE)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    lse = torch.logsumexp(scores, -1)
    top = scores.amax(-1, keepdim=True).nan_to_num(0, 0, 0)
    weights = torch.exp(scores - top)
    rounded = weights if weights_dtype is None else weights.to(weights_dtype).to(dtype)
    return (rounded @ v / weights.sum(-1, keepdim=True)).nan_to_num(0.0), lse


def fault(case, config=None, seed=0, tensors=None, scale=1.0):
    """What is wrong with the output or the log-sum-exp; empty where nothing is."""
    q, k, v = tensors or inputs(case, seed, scale)
    lse = torch.full(case.out_shape[:3], 7.0, device=DEVICE)
    call = prepared(case, q, k, v, lse=lse, config=config)
    call().fill_(math.nan)
    out = call()
    truth, true_lse = attention(case, q, k, v, torch.float64)
    plain, _ = attention(case, q, k, v, torch.float32, out.dtype)
    ulp = torch.finfo(out.dtype).eps * 2.0 ** math.floor(math.log2(truth.abs().max().item() or 1.0))
    limit = 2 * (plain.double() - truth).abs().max().item() + ulp
    error = (out.double() - truth).abs().max().item()
    words = []
    if not error <= limit:
        words.append(f"error {error:.3g}, limit {limit:.3g}")
    near = (lse.double() - true_lse).abs() <= 1e-5 * (1 + true_lse.abs())
    if not torch.where(true_lse.isinf(), lse.double() == true_lse, near).all():
        words.append("lse is off")
    return f"{case.case_id} {config or ''}: {', '.join(words)}" if words else ""


def faults(cases):
    cases = [case if isinstance(case, tuple) else (case, None) for case in cases]
    sms = 0 if STRIDED else current_sms()

    def compiled(pair):
        case, config = pair
        config = config or (cuda_sm80.choose(case, GPU) if STRIDED else choose(case, sms))
        if isinstance(config, Config):
            return cuda.cubin(case, config)
        return cuda.strided_cubin(case, config, 16, ARCH)

    with ThreadPoolExecutor(16) as pool:  # they compile beside each other
        list(pool.map(compiled, cases))
    return [words for words in (fault(*pair) for pair in cases) if words]


@part
def lengths():
    sizes = [(1, 1), (1, 257), (17, 33), (33, 17), (64, 64), (65, 65), (128, 1024), (129, 127), (257, 1), (600, 500)]
    return faults(problem(*size, dtype=dtype) for size in sizes for dtype in DTYPES)


@part
def masks():
    sizes = [(1, 300), (64, 64), (100, 300), (300, 100), (257, 1025)]
    fields = itertools.product((False, True), (None, 1, 65))
    return faults(
        problem(*size, causal=causal, window=window, heads_q=3)
        for size, (causal, window) in itertools.product(sizes, fields)
        if causal or window
    )


@part
def head_dims():
    dims = [(8, 8), (32, 32), (40, 64), (64, 40), (72, 200), (96, 96), (128, 256), (192, 128), (248, 248), (256, 256)]
    return faults(problem(70, 300, head_dim=d, head_dim_v=e, dtype=t) for (d, e), t in itertools.product(dims, DTYPES))


@part
def grouped_heads():
    heads = [(2, 1), (6, 2), (32, 8), (7, 1), (70, 1), (12, 4)]
    sizes = [(1, 700), (5, 300), (100, 200)]
    return faults(
        problem(*size, heads_q=q, heads_kv=kv, batch=2, causal=causal)
        for (q, kv), size, causal in itertools.product(heads, sizes, (False, True))
    )


@part
def configurations():
    cases = [
        problem(200, 2100),
        problem(200, 2100, causal=True, dtype="bf16"),
        problem(100, 1100, head_dim=64, window=300),
        problem(100, 1100, head_dim=256),
        problem(100, 1100, head_dim=96, head_dim_v=192),
        problem(3, 1500, heads_q=8, heads_kv=2),
    ]
    if STRIDED:
        rooms = [cuda_sm80.Gpu(GPU.sms, room, room + 1024) for room in (101_376, 166_912)]
        whole = {(case, config) for case in cases for room in rooms for config in cuda_sm80.configs(case, room)}
        parts = {(case, replace(config, parts=3)) for case, config in whole}
        more = [replace(config, parts=parts) for config in cuda_sm80.configs(cases[0], GPU) for parts in (17, 32)]
        return faults(whole | parts | {(cases[0], config) for config in more})
    sms = current_sms()
    chosen = [(case, config) for case in cases for config in configs(case, sms)]
    few = random.Random(0).sample(chosen, 120)
    fields = itertools.product((64, 128, 256), (False, True))
    many = [problem(700, 1300, batch=5, heads_q=12, head_dim=d, causal=causal) for d, causal in fields]
    return faults([*few, *((case, config) for case in many for config in configs(case, sms) if config.parts == 1)])


@part
def tiles_in_turn():
    """Blocks go on to tiles of one key block or two, with windows, of several heads, with queries held either way."""
    if STRIDED:
        return []
    kept, read, few = (Config(*sizes, persistent=True) for sizes in ((128, 128, 2), (128, 64, 3), (64, 64, 4)))
    many = {"batch": 8, "heads_q": 40}
    found = faults([
        *((problem(128, 128, causal=True, **many), kept), (problem(300, 300, causal=True, **many), kept)),
        *((problem(300, 100, head_dim_v=d, **many), config) for d, config in ((128, kept), (256, read))),
        (problem(300, 500, head_dim=64, **many), Config(128, 176, 4, persistent=True)),
        *((problem(700, 1500, causal=True, window=window, **many), kept) for window in (1, 200)),
        (problem(700, 1500, window=200, **many), kept),
        (problem(1, 300, batch=64, heads_q=32, heads_kv=8), few),
        (problem(5, 300, batch=64, heads_q=32, heads_kv=8, causal=True), few),
    ])
    for d, config in ((128, kept), (256, read)):
        case = problem(512, 1000, head_dim_v=d, heads_q=50)
        q, k, v = inputs(case)
        q[0, 3, 7, 5] = math.nan
        rows = prepared(case, q, k, v, config=config)().isnan().all(-1)
        if rows.nonzero().tolist() != [[0, 3, 7]]:
            found.append(f"{config}: NaN")
    return found


@part
def layouts():
    found = []
    case = problem(130, 300, heads_q=4, heads_kv=2, batch=3)
    q, k, v = inputs(case)
    interleaved = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (q, k, v)]  # BSHD in memory
    padded = []
    for tensor in (q, k, v):
        room = torch.full((*tensor.shape[:3], 136), math.nan, dtype=tensor.dtype, device=DEVICE)
        room[..., :128] = tensor
        padded.append(room[..., :128])
    spaced = [torch.stack([tensor, torch.full_like(tensor, math.nan)], 3)[:, :, :, 0] for tensor in (q, k, v)]
    for tensors in (interleaved, padded, spaced):
        found.append(fault(case, tensors=tensors))
    one_head = problem(64, 64)
    q, k, v = inputs(one_head)
    odd = q.clone().as_strided(q.shape, (3, 5, 128, 1))  # of dimensions with one element
    found.append(fault(one_head, tensors=[odd, k, v]))
    return [words for words in found if words]


@part
def extremes():
    """Also where blocks go on to the next tile, and weigh by a score that later ones may exceed by far."""
    found = []
    many, kept = {"batch": 2, "heads_q": 40}, Config(128, 128, 2, persistent=True)
    in_turn = [
        (problem(200, 900, **many), kept),
        (problem(500, 900, causal=True, dtype="bf16", **many), kept),
        (problem(500, 900, causal=True, window=200, **many), kept),
        (problem(200, 900, head_dim_v=256, **many), Config(128, 64, 3, persistent=True)),
        (problem(200, 900, head_dim=64, **many), Config(128, 176, 4, persistent=True)),
        (problem(100, 900, batch=8, heads_q=40, heads_kv=8), kept),  # five heads of 25 queries in 128 rows
    ]
    for case, config in [(problem(100, 900), None), *([] if STRIDED else in_turn)]:
        for scale in (30.0, 1e-3):
            found.append(fault(case, config, tensors=[tensor * scale for tensor in inputs(case)]))
        q, k, v = inputs(case)
        found.append(fault(case, config, tensors=[q, k[:, :, :1].expand(k.shape).contiguous(), v]))  # equal keys
        for steepness in (4, 60):  # the maximum rises in every block
            rising = k * torch.linspace(0, steepness, 900, device=DEVICE).to(k.dtype)[:, None]
            found.append(fault(case, config, tensors=[q, rising, v]))
        q[..., 0], k[..., 0] = 200.0, -200.0
        k[:, :, 450, 0] = 200.0  # one key has all the weight
        found.append(fault(case, config, tensors=[q, k, v]))
    return [words for words in found if words]


@part
def infinities():
    """In V, also where parts do not divide evenly among those that add them up."""
    found = []
    case = problem(1, 2400)
    uneven = [cuda_sm80.Config(16, 64, 1, 4, 2, parts=7)] if STRIDED else [Config(64, 64, 4, n) for n in (9, 19)]
    for config in uneven:
        q, k, v = inputs(case)
        for key in range(0, 2400, 130):
            one = v.clone()
            one[0, 0, key, 0] = math.inf
            out = prepared(case, q, k, one, config=config)()
            if not (out[..., 0].isposinf() and out[..., 1:].isfinite().all()):
                found.append(f"{config}, key {key}: {out[..., :2]}")
    return found


@part
def bits():
    """Ten runs of the same give the same bits, split or not."""
    found = []
    of_any_strides = [
        *(cuda_sm80.Config(128, 64, 4), cuda_sm80.Config(16, 64, 1, 4, 2)),
        *(cuda_sm80.Config(64, 64, 4, stages=2, parts=8), cuda_sm80.Config(16, 64, 1, 4, 2, parts=32)),
    ]
    of_tma = [
        *(Config(64, 64, 4, 8, 2), Config(128, 128, 2, 7), Config(128, 128, 2), Config(128, 64, 3, persistent=True)),
        *(Config(128, 128, 2, 32), Config(64, 64, 4, 8, 2, 2)),
        *(Config(64, 64, 4, 3, 1, 2), Config(128, 128, 2, persistent=True)),
    ]
    for config in of_any_strides if STRIDED else of_tma:
        persistent = isinstance(config, Config) and config.persistent
        fields = {"heads_q": 50, "causal": config.keys == 128, "head_dim_v": 128 if config.keys == 128 else 256}
        fields = fields if persistent else {}
        case = problem(512, 1000 if persistent else 4096, **fields)
        call = JitFlashCuda().prepare(case, *inputs(case), config=config)
        first = call().clone()
        found += [f"{config} differs" for _ in range(10) if not torch.equal(call(), first)]
    if not STRIDED:
        # Rows of a tile that hold no query keep what others have left in shared memory, and may not matter.
        case, config = problem(100, 1000, batch=8, heads_q=40, heads_kv=8), Config(128, 128, 2, persistent=True)
        call = prepared(case, *inputs(case), config=config)
        full = problem(256, 1000, batch=2, heads_q=80)  # whose tiles have 128 rows
        q, k, v = inputs(full)
        litter = [prepared(full, q * scale, k, v, config=config) for scale in (math.nan, 30.0)]
        first = call().clone()
        for leave in litter * 3:
            leave()
            found += [] if torch.equal(call(), first) else [f"{config} depends on what was there before"]
    return found


@part
def streams():
    """Two at once on streams of their own, again and again."""
    case = problem(256, 4096)
    pairs = [inputs(case, seed) for seed in (1, 2)]
    calls = [prepared(case, *tensors) for tensors in pairs]
    right = [call().clone() for call in calls]
    made = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    found = []
    for _ in range(50):
        outs = []
        for call, stream in zip(calls, made):
            with torch.cuda.stream(stream):
                call().fill_(math.nan)
                outs.append(call())
        torch.cuda.synchronize()
        found += [f"{i} differs" for i, pair in enumerate(zip(outs, right)) if not torch.equal(*pair)]
    return found


@part
def in_flight():
    """One prepared call on two streams at once, and two graphs of it: nothing that blocks meet in is shared."""
    found = []
    one_head, heads = problem(512, 4096), problem(512, 1024, heads_q=50)
    memory = Config(64, 64, 4, 16)  # of which two do not fit at once
    of_tma = ((one_head, memory), (heads, Config(128, 128, 2, persistent=True)))
    strided = ((one_head, cuda_sm80.Config(16, 64, 1, 4, 2, parts=8)), (heads, cuda_sm80.Config(64, 64, 4, parts=3)))
    for case, config in strided if STRIDED else of_tma:
        call = prepared(case, *inputs(case), config=config)
        right = call().clone()
        made = [torch.cuda.Stream() for _ in range(2)]
        captured = []
        for _ in made:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = call()
            captured.append(graph.replay)
        torch.cuda.synchronize()
        for turn in range(200):
            for stream, replay in zip(made, captured):
                with torch.cuda.stream(stream):
                    replay() if turn % 2 else call()
            if turn % 20 == 19:
                torch.cuda.synchronize()
                found += [] if torch.equal(out, right) else [f"{config} differs"]
                out.fill_(math.nan)
                torch.cuda.synchronize()
    return found


@part
def threads():
    """Called first in a thread in which torch has done nothing."""
    case = problem(64, 300)
    call = prepared(case, *inputs(case))
    right = call().clone()
    call().fill_(math.nan)
    torch.cuda.synchronize()
    with ThreadPoolExecutor(1) as pool:
        out = pool.submit(call).result()
    found = [] if torch.equal(out, right) else ["another thread's output differs"]
    other = problem(64, 3000, head_dim=32)  # whose kernel is not loaded yet
    with ThreadPoolExecutor(1) as pool:
        found.append(pool.submit(fault, other, None if STRIDED else Config(64, 64, 3, 5)).result())
    return [words for words in found if words]


@part
def graphs():
    """A captured call computes what the inputs hold when it is replayed."""
    case = problem(128, 2048)
    q, k, v = inputs(case)
    call = prepared(case, q, k, v)
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    others = inputs(case, 5)
    for tensor, other in zip((q, k, v), others):
        tensor.copy_(other)
    out.fill_(math.nan)
    graph.replay()
    expected = prepared(case, *others)()
    found = [] if torch.equal(out, expected) else ["a replay does not read the inputs"]
    # The graph and the output are kept, and the call is not: what blocks meet in must not be given away.
    of_any_strides = (cuda_sm80.Config(16, 64, 1, 4, 2, parts=8), cuda_sm80.Config(64, 64, 4))
    for config in of_any_strides if STRIDED else (Config(64, 64, 4, 8), Config(128, 128, 2, persistent=True)):
        case = problem(512, 2048, heads_q=1 if config.parts > 1 else 50)
        tensors = inputs(case)
        call = prepared(case, *tensors, config=config)
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call()
        right = out.clone()
        del call
        gc.collect()
        torch.cuda.empty_cache()
        sizes = [1 << n for n in range(2, 22)] * 3
        others = [torch.full((size,), 0x5A5A5A5A, dtype=torch.int32, device=DEVICE) for size in sizes]
        out.fill_(math.nan)
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
        found += [] if torch.equal(out, right) else [f"{config}: a graph without its call differs"]
        found += ["others' memory was written"] * (not all((other == 0x5A5A5A5A).all() for other in others))
    return found


@part
def large():
    """Offsets beyond 2³¹ elements, and more heads than a grid's second dimension has."""
    found = []
    case = problem(1, 1, batch=70_000, heads_q=2, head_dim=64)
    q, k, v = inputs(case)
    if not torch.equal(prepared(case, q, k, v)(), v):  # of one key
        found.append(case.case_id)
    keys = (1 << 24) + 192
    case = problem(64, keys)
    shapes = (case.q_shape, case.k_shape, case.v_shape)
    q, k, v = (torch.zeros(shape, dtype=torch.float16, device=DEVICE) for shape in shapes)
    k[:, :, -1], q[:] = 4.0, 4.0  # the last key has all the weight
    v[:, :, -1] = 3.0
    out = prepared(case, q, k, v)()
    if not torch.equal(out, torch.full_like(out, 3.0)):
        found.append(case.case_id)
    return found


@part
def odd_layouts():
    """What TMA does not take: rows of an odd number of elements, any first address, strides of zero."""
    found = []
    for causal, dims in ((True, (128, 128)), (False, (40, 72))):
        case = problem(130, 300, heads_q=4, heads_kv=2, batch=3, head_dim=dims[0], head_dim_v=dims[1], causal=causal)
        tensors = inputs(case)
        for pad, offset, order in itertools.product((0, 1, 2, 4), (0, 1, 2, 4), ((0, 1, 2, 3), (0, 2, 1, 3))):
            if pad == offset == 0:
                continue
            odd = []
            for tensor in tensors:
                sizes = [tensor.shape[i] for i in order]
                room = torch.full((offset + math.prod(sizes[:3]) * (sizes[3] + pad),), math.nan, device=DEVICE)
                rows = room.to(tensor.dtype)[offset:].view(*sizes[:3], sizes[3] + pad)[..., : sizes[3]]
                odd.append(rows.permute(*(order.index(i) for i in range(4))).copy_(tensor))
            found.append(fault(case, tensors=odd))
        for which, one in itertools.product(range(3), (0, 1, 2)):
            expanded = list(tensors)
            expanded[which] = expanded[which].narrow(one, 0, 1).expand(expanded[which].shape)
            found.append(fault(case, tensors=expanded))
    return [words for words in found if words]


@part
def huge():
    """Logits up to 10³², scores that are infinite, and NaN; the kernel for TMA gives NaN beyond 2²⁸."""
    found = []
    of_tma = (Config(64, 64, 4, 5, 2), Config(128, 128, 2), Config(64, 64, 4, 7, 1, 2))
    of_any_strides = (
        *(cuda_sm80.Config(128, 64, 4), cuda_sm80.Config(16, 64, 1, 4, 2)),
        *(cuda_sm80.Config(128, 64, 4, parts=3), cuda_sm80.Config(16, 64, 1, 4, 2, parts=5)),
    )
    for config in of_any_strides if STRIDED else of_tma:
        case = problem(100, 900, dtype="bf16")
        for scale in (1e3, 1e6, 1e16):
            q, k, v = inputs(case)
            if STRIDED or scale == 1e3:
                found.append(fault(case, config, tensors=[q * scale, k * scale, v]))
            elif not prepared(case, q * scale, k * scale, v, config=config)().isnan().all():
                found.append(f"{config}: logits of {scale}² are not NaN")
        for sign in (1, -1):
            q, k, v = inputs(case)
            q[..., 0], k[..., 0] = 3e38, sign * 3e38
            if not prepared(case, q, k, v, config=config)().isnan().all():
                found.append(f"{config}: infinite scores")
        q, k, v = inputs(case)
        q[0, 0, 3, 5] = math.nan
        rows = prepared(case, q, k, v, config=config)().isnan().all(-1).flatten()
        if not torch.equal(rows, torch.arange(100, device=DEVICE) == 3):
            found.append(f"{config}: NaN")
    return [words for words in found if words]


@part
def refused():
    """What a kernel does not take is refused before anything is launched."""
    case = problem(64, 64)
    q, k, v = inputs(case)
    found = []
    unaligned = torch.empty(q.numel() + 1, dtype=q.dtype, device=DEVICE)[1:].view(q.shape)
    for wrong, config in ((q.mT.contiguous().mT, None), (unaligned, Config(64, 64, 4))):
        try:
            JitFlashCuda().prepare(case, wrong, k, v, config=config)
            found.append(f"took strides {wrong.stride()} at {wrong.data_ptr() % 16}")
        except ValueError:
            pass
    return found


results = {}
for STRIDED, name in itertools.product((False, True), PARTS):
    if not STRIDED and CAPABILITY != (9, 0):
        continue
    key = f"{name}, any strides" if STRIDED else name
    try:
        results[key] = PARTS[name]()
    except Exception:
        results[key] = [traceback.format_exc()]
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
print(json.dumps(results))
'''

PARTS = (
    *(
        "lengths",
        "masks",
        "head_dims",
        "grouped_heads",
        "configurations",
        "tiles_in_turn",
        "layouts",
        "extremes",
        "infinities",
        "bits",
    ),
    "streams",
    *("in_flight", "threads", "graphs", "large", "odd_layouts", "huge", "refused"),
)


def test_each_part_of_the_script_is_a_test() -> None:
    assert tuple(SCRIPT.split("@part\ndef ")[i].partition("(")[0] for i in range(1, len(PARTS) + 1)) == PARTS
    assert SCRIPT.count("@part\n") == len(PARTS)


CAPABILITY = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
"""Asked before the tests' own process hides its GPUs."""


@pytest.fixture(scope="module")
def found() -> dict[str, list[str]]:
    env = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=env, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(CAPABILITY != (9, 0), reason="it computes on a Hopper GPU, and torch sees none")
@pytest.mark.parametrize("part", PARTS)
def test_against_float64(found: dict[str, list[str]], part: str) -> None:
    assert found[part] == []


@pytest.mark.skipif(CAPABILITY < (8, 0), reason="it computes on a GPU from Ampere on, and torch sees none")
@pytest.mark.parametrize("part", PARTS)
def test_the_kernel_of_any_strides_against_float64(found: dict[str, list[str]], part: str) -> None:
    assert found[f"{part}, any strides"] == []
