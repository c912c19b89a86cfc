"""jit_flash on a CPU, against float64: every shape, mask, dtype and stride it claims, and inputs made to break it."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import mmap
import os
import platform
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files

import pytest
import torch
from torch import Tensor

from attnbench import jit
from attnbench.problem import Problem
from attnbench_plugins.jit_flash import attnbench_backends, cpu
from attnbench_plugins.jit_flash.cpu import ISAS, MAX_HEAD_DIM, JitFlashCpu

pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SOURCE = files("attnbench_kernels") / "cpu" / "flash_attention.cpp"
TILE = 256
"""The kernel's; sizes around it are tried."""
MISSING = {isa.name: [need for need in isa.needs if need not in jit.cpu_features().split()] for isa in ISAS}
if platform.machine() != "x86_64":
    del MISSING["portable"]  # -march=x86-64 forces it; elsewhere it is what is left


@pytest.fixture(autouse=True, params=[name for name, lacks in MISSING.items() if not lacks])
def isa(request, monkeypatch) -> str:
    """Each path of the kernel that this CPU can take."""
    monkeypatch.setenv("ATTNBENCH_CPU_ISA", request.param)
    return request.param


@pytest.fixture(scope="session", autouse=True)
def cache_dir(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATTNBENCH_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def threads():
    """Sets torch's number of threads, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def problem(seqlen_q: int, seqlen_k: int, **fields) -> Problem:
    return Problem(seqlen_q=seqlen_q, seqlen_k=seqlen_k, **{"head_dim": 64, "dtype": "fp32", **fields})


def inputs(case: Problem, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (case.q_shape, case.k_shape, case.v_shape)
    return tuple(torch.randn(shape, generator=generator).to(DTYPES[case.dtype]) for shape in shapes)


def scores_of(case: Problem, q: Tensor, k: Tensor, dtype: torch.dtype) -> Tensor:
    """Scaled scores in `dtype`, -inf where key_range hides the key."""
    q, k = q.to(dtype), k.to(dtype).repeat_interleave(case.heads_q // case.heads_kv, 1)
    hidden = torch.ones(case.seqlen_q, case.seqlen_k, dtype=torch.bool)
    for row in range(case.seqlen_q):
        low, high = case.key_range(row)
        hidden[row, low:high] = False
    return (q @ k.mT * case.softmax_scale).masked_fill(hidden, -math.inf)


def attention(case: Problem, q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """Attention step by step in `dtype`."""
    v = v.to(dtype).repeat_interleave(case.heads_q // case.heads_kv, 1)
    return torch.softmax(scores_of(case, q, k, dtype), -1).nan_to_num(0.0) @ v


def verify(case: Problem, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    """The error against float64 is at most twice that of plain fp32 attention, plus an ulp of the largest output.

    For fp16 and bf16 the ulp is theirs: the arithmetic is fp32 there too.
    """
    assert out.shape == case.out_shape
    assert out.dtype == DTYPES[case.dtype]
    truth = attention(case, q, k, v, torch.float64)
    plain = attention(case, q, k, v, torch.float32)
    ulp = torch.finfo(out.dtype).eps * 2.0 ** math.floor(math.log2(truth.abs().max().item() or 1.0))
    error = (out.double() - truth).abs().max().item()
    assert error <= 2 * (plain.double() - truth).abs().max().item() + ulp


def check(case: Problem, *tensors: Tensor) -> Tensor:
    q, k, v = tensors or inputs(case)
    out = JitFlashCpu().prepare(case, q, k, v)()
    verify(case, q, k, v, out)
    return out


LENGTHS = [(64, 64), (128, 1024), (1, 1), (1, 257), (17, 33), (33, 17), (65, 65), (257, 1), (257, 193), (600, 500)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), LENGTHS)
def test_lengths(seqlen_q, seqlen_k, dtype):
    check(problem(seqlen_q, seqlen_k, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "dims", [(1, 1), (1, 64), (40, 40), (64, 64), (128, 128), (256, 256), (192, 128), (64, 7), (31, 256)]
)
def test_head_dims(dims, dtype):
    check(problem(70, 130, head_dim=dims[0], head_dim_v=dims[1], dtype=dtype))


@pytest.mark.parametrize("remainder", range(12))
def test_every_remainder_of_rows_in_registers(remainder):
    check(problem(65, 144 + remainder, head_dim_v=12 + remainder))


@pytest.mark.parametrize("seqlen_q", [1, 2, 3, 7, 8, 9, 15, 16, 17])
@pytest.mark.parametrize("heads", [(1, 1), (8, 2)])
def test_few_rows(seqlen_q, heads):
    """Decoding: few enough rows are not packed, and heads that share their keys are taken together."""
    for dtype, dims in (("fp32", (64, 64)), ("bf16", (40, 24)), ("fp16", (31, 257 - 31))):
        heads_q, heads_kv = heads
        check(
            problem(
                seqlen_q, 203, heads_q=heads_q, heads_kv=heads_kv, head_dim=dims[0], head_dim_v=dims[1], dtype=dtype
            )
        )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 5, 40])
@pytest.mark.parametrize(("seqlen_q", "heads"), [(2, (1, 1)), (3, (4, 2)), (7, (1, 1)), (4, (8, 4)), (8, (1, 1))])
def test_few_rows_see_different_keys(seqlen_q, heads, window, causal):
    """Rows of one block of keys, each with a range of its own; what all of them hide may be anything."""
    heads_q, heads_kv = heads
    for dtype in DTYPES:
        case = problem(
            seqlen_q, 203, heads_q=heads_q, heads_kv=heads_kv, window=window, causal=causal, head_dim=72, dtype=dtype
        )
        q, k, v = inputs(case)
        ranges = [case.key_range(row) for row in range(seqlen_q)]
        seen = slice(min(low for low, _ in ranges), max(high for _, high in ranges))
        wild_k, wild_v = torch.full_like(k, math.nan), torch.full_like(v, math.inf)
        wild_k[:, :, seen], wild_v[:, :, seen] = k[:, :, seen], v[:, :, seen]
        verify(case, q, k, v, JitFlashCpu().prepare(case, q, wild_k, wild_v)())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(3, 200), (50, 300), (100, 60)])
def test_heads_that_share_a_tile(seqlen_q, seqlen_k, window, causal):
    for dtype in DTYPES:
        check(problem(seqlen_q, seqlen_k, batch=2, heads_q=10, heads_kv=2, window=window, causal=causal, dtype=dtype))


@pytest.mark.parametrize("count", [2, 3, 7])
@pytest.mark.parametrize("seqlen_q", [1, 20, 300])
@pytest.mark.parametrize("causal", [False, True])
def test_split_keys(seqlen_q, causal, count, threads):
    """With fewer tiles than threads, each tile's keys are split and the parts combined."""
    threads(count)
    for dtype in DTYPES:
        case = problem(seqlen_q, 4000, causal=causal, dtype=dtype, heads_q=2, heads_kv=1)
        assert JitFlashCpu().parallel_units(case) > 1
        q, k, v = inputs(case)
        k[:, :, 1000:2000] *= 5  # so that the parts' maxima differ
        check(case, q, k, v)


@pytest.mark.parametrize("seqlen_q", [1, 20])
def test_parts_without_keys(seqlen_q, threads):
    """Under a window, parts of a split tile see no key of some rows."""
    threads(4)
    case = problem(seqlen_q, 8000, window=40, causal=True, heads_q=8)
    check(case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (5, 1)])
def test_heads_and_batch(heads, dtype):
    check(problem(65, 100, batch=3, heads_q=heads[0], heads_kv=heads[1], dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [(200, 200), (1, 300), (33, 300), (65, 257), (300, 33), (257, 256), (193, 1)])
def test_causal(lengths, dtype):
    check(problem(*lengths, causal=True, dtype=dtype))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [1, 2, 17, 64, 130, 2**40])
@pytest.mark.parametrize("lengths", [(300, 300), (65, 400), (400, 65)])
def test_window(lengths, window, causal):
    for dtype in DTYPES:
        check(problem(*lengths, window=window, causal=causal, dtype=dtype))


def test_scale():
    check(problem(65, 100, softmax_scale=0.731))


@pytest.mark.parametrize("causal", [False, True])
def test_rows_without_keys_are_zeros(causal):
    case = problem(600, 70, causal=causal, window=5)
    empty = [row for row in range(600) if case.key_range(row) == (0, 0)]
    assert len(empty) > TILE, "a whole tile of them, and some beside rows that see keys"
    q, k, v = inputs(case)
    v[:, :, 0] = math.inf
    out = JitFlashCpu().prepare(case, q, k, v)()
    assert torch.equal(out[:, :, empty], torch.zeros(1, 1, len(empty), 64))


@pytest.mark.parametrize("seqlen_q", [1, 3, 70])
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype, seqlen_q):
    """BSHD seen as BHSD, and rows and heads cut out of larger tensors."""
    case = problem(seqlen_q, 130, batch=2, heads_q=4, heads_kv=2, dtype=dtype, causal=True)
    q, k, v = inputs(case)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    k = torch.cat([k, k], -1)[..., 64:]
    v = torch.cat([v, v], 2)[:, :, 130:]
    assert not any(tensor.is_contiguous() for tensor in (k, v))
    assert torch.equal(check(case, q, k, v), check(case, *(tensor.contiguous() for tensor in (q, k, v))))


@pytest.mark.parametrize("seqlen_q", [1, 8, 70])
def test_expanded_keys(seqlen_q):
    case = problem(seqlen_q, 130, batch=2, heads_q=3)
    q, k, v = inputs(case)
    check(case, q, k[:1, :1].expand(case.k_shape), v[:, :, :1].expand(case.v_shape))


def before_a_wall(tensor: Tensor) -> Tensor:
    """A copy whose last byte is followed by a page that nothing may read."""
    page = mmap.PAGESIZE
    pages = -(-tensor.nbytes // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(address + pages * page), page, 0) == 0
    flat = torch.frombuffer(memory, dtype=torch.uint8, count=pages * page)[pages * page - tensor.nbytes :]
    return flat.view(tensor.dtype).view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("seqlen_q", [1, 3, 8, 9, 70])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_beyond_the_tensors_is_read(dtype, seqlen_q):
    for seqlen_k, head_dim in ((1, 64), (21, 40), (130, 31), (203, 128)):
        case = problem(seqlen_q, seqlen_k, head_dim=head_dim, dtype=dtype)
        check(case, *map(before_a_wall, inputs(case)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_large_logits(dtype, causal):
    case = problem(130, 600, dtype=dtype, causal=causal)
    q, k, v = inputs(case)
    q = q * (100 / (q.float() @ k.float().mT * case.softmax_scale).abs().max()).to(q.dtype)
    check(case, q, k, v)


@pytest.mark.parametrize("dtype", DTYPES)
def test_outliers(dtype):
    case = problem(130, 600, dtype=dtype)
    q, k, v = inputs(case)
    q[..., 3] *= 50
    k[:, :, ::97, 3] *= 20
    v[:, :, ::89] *= 1000
    check(case, q, k, v)


@pytest.mark.parametrize("steepness", [2.0, -2.0])
def test_maxima_that_rise_or_fall(steepness):
    """Each key outdoes the one before it, so every block rescales what came before; or none does."""
    case = problem(80, 1000)
    q, _, v = inputs(case)
    k = torch.linspace(-steepness, steepness, 1000)[:, None].expand(case.k_shape[2:]).contiguous()
    check(case, q.abs(), k.expand(case.k_shape), v)


def test_one_key_outweighs_all():
    case = problem(80, 700)
    q, k, v = inputs(case)
    q, k = q.abs(), k * 0.01
    k[:, :, 411] = 1000.0
    assert torch.equal(check(case, q, k, v), v[:, :, 411:412].expand(case.out_shape))


def test_huge_values():
    """Scores of ±1e30 and values near the largest float: nothing overflows that need not."""
    case = problem(80, 300, softmax_scale=1.0)
    q, k, v = inputs(case)
    out = JitFlashCpu().prepare(case, q * 1e15, k * 1e14, v * 1e37)()
    best = (q.double() @ k.double().mT).argmax(-1)
    assert torch.equal(out, (v * 1e37)[0, 0][best])


def test_all_keys_equal():
    case = problem(80, 300)
    q, k, v = inputs(case)
    out = check(case, q, k[:, :, :1].expand(case.k_shape), v)
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand(case.out_shape), rtol=0, atol=2e-7)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_all_equal_in_a_long_decode(dtype, count, threads):
    """Sums of 131072 equal values do not drift: they are not added one after another."""
    threads(count)
    case = problem(1, 131072, dtype=dtype, head_dim=8)
    q, k, v = inputs(case)
    q.zero_()
    v.fill_(1.7)
    out = JitFlashCpu().prepare(case, q, k, v)()
    torch.testing.assert_close(out, v[:, :, :1], rtol=2e-5 if dtype == "fp32" else 0, atol=0)


def test_scores_of_minus_infinity_are_not_hidden_keys():
    """No query that sees a key gets the zeros of one that sees none: plain attention has NaN there, too."""
    for seqlen_q in (1, 20):
        case = problem(seqlen_q, 1, head_dim=8)
        q, k, v = inputs(case)
        out = JitFlashCpu().prepare(case, q.fill_(-1e20), k.fill_(1e20), v)()
        assert attention(case, q, k, v, torch.float32).nan_to_num(0.0).eq(0.0).all(), "no score is above -inf"
        assert out.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_all_equal(dtype):
    """The output is that value: exactly where it is rounded to fewer bits, else but for what biased sums lose."""
    case = problem(80, 256, dtype=dtype)
    q, k, v = inputs(case)
    q.zero_()
    v.fill_(1.7)
    out = JitFlashCpu().prepare(case, q, k, v)()
    torch.testing.assert_close(out, v[:, :, :80], rtol=2e-6 if dtype == "fp32" else 0, atol=0)


def test_rounding_on_store():
    """The mean of two neighbours is stored as the even one; subnormals of fp16 too."""
    for dtype, low in ((torch.float16, 1.0), (torch.float16, 3e-7), (torch.bfloat16, 1.0), (torch.bfloat16, 1e-30)):
        name = next(name for name, value in DTYPES.items() if value == dtype)
        case = problem(1, 2, head_dim=1, head_dim_v=8, dtype=name)
        first = (torch.tensor(low, dtype=dtype).view(torch.int16) + torch.arange(8, dtype=torch.int16)).view(dtype)
        second = (first.view(torch.int16) + 1).view(dtype)
        q, k = torch.zeros(1, 1, 1, 1, dtype=dtype), torch.zeros(1, 1, 2, 1, dtype=dtype)
        out = JitFlashCpu().prepare(case, q, k, torch.stack([first, second]).view(1, 1, 2, 8))()
        assert torch.equal(out[0, 0, 0], ((first.float() + second.float()) / 2).to(dtype))


@pytest.mark.parametrize("seqlen_k", [1, 40, 41])
@pytest.mark.parametrize("seqlen_q", [1, 3, 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_come_through(dtype, seqlen_q, seqlen_k):
    case = problem(seqlen_q, seqlen_k, dtype=dtype)
    q, k, v = inputs(case)
    q[0, 0, 3:4, 5] = math.nan
    v[0, 0, -1, 11] = math.inf
    out = JitFlashCpu().prepare(case, q, k, v)()
    expected = attention(case, q, k, v, torch.float32)
    expected[0, 0, 3:4] = math.nan
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isinf(), expected.isinf())


def test_repeats_bitwise(threads: Callable[[int], None]):
    """With the same number of threads, whichever of them takes which part."""
    case = problem(500, 700, heads_q=2, causal=True)
    q, k, v = inputs(case)
    for count in (1, 2, 3, 50):  # 50 threads: more than units of work
        threads(count)
        call = JitFlashCpu().prepare(case, q, k, v)
        first = call().clone()
        verify(case, q, k, v, first)
        for _ in range(5):
            assert torch.equal(call(), first)


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("seqlen_q", [1, 5, 20, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_log_sum_exp(seqlen_q, dtype, count, threads):
    threads(count)
    case = problem(seqlen_q, 3000, batch=2, heads_q=6, heads_kv=2, dtype=dtype, causal=True, window=200)
    if seqlen_q == 300:
        case = dataclasses.replace(case, seqlen_k=100)
    q, k, v = inputs(case)
    lse = torch.full(case.out_shape[:3], math.nan)
    JitFlashCpu().prepare(case, q, k, v, lse=lse)()
    scores = scores_of(case, q, k, torch.float64)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=2e-6, atol=2e-6)


def test_log_sum_exp_wants_a_tensor_of_its_shape():
    case = problem(5, 7)
    with pytest.raises(ValueError, match=r"^lse must be contiguous, of \(1, 1, 5\) in torch.float32, on the CPU$"):
        JitFlashCpu().prepare(case, *inputs(case), lse=torch.empty(1, 1, 5, dtype=torch.float64))


def test_offsets_beyond_31_bits():
    """Keys and values of a second head lie 2³¹ elements after those of the first, and nothing is in between."""
    case = problem(33, 50, heads_q=2, dtype="bf16", head_dim=32)
    q, k, v = inputs(case)
    far = 2**31 + 64
    wide = [torch.empty(far + 50 * 32, dtype=torch.bfloat16).as_strided(case.k_shape, (far, far, 32, 1)) for _ in "kv"]
    check(case, q, wide[0].copy_(k), wide[1].copy_(v))


def test_calls_at_a_time():
    """The pool serves one of them; the others work alone."""
    case = problem(300, 1000, heads_q=2)
    tensors = [inputs(case, seed) for seed in range(4)]
    calls = [JitFlashCpu().prepare(case, *three) for three in tensors]
    with ThreadPoolExecutor(4) as executor:
        for _ in range(5):
            for three, out in zip(tensors, executor.map(lambda call: call(), calls)):
                verify(case, *three, out)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_survives_fork(threads):
    """The child has none of the parent's threads, and makes its own."""
    threads(3)
    case = problem(300, 2000)
    q, k, v = inputs(case)
    call = JitFlashCpu().prepare(case, q, k, v)
    expected = call().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python's own, on forking with threads
        child = os.fork()
    if child == 0:
        os._exit(0 if all(torch.equal(call(), expected) for _ in range(3)) else 1)
    for _ in range(3):
        assert torch.equal(call(), expected)
    assert os.waitpid(child, 0)[1] == 0


def test_reads_its_inputs_at_each_call():
    case = problem(65, 100)
    tensors = inputs(case)
    call = JitFlashCpu().prepare(case, *tensors)
    verify(case, *tensors, call())
    for which in range(3):
        tensors[which].copy_(inputs(case, seed=which + 1)[which])
        call().fill_(math.nan)
        verify(case, *tensors, call())


def test_two_prepared_side_by_side():
    cases = [problem(65, 100), problem(128, 300, heads_q=2, dtype="bf16", causal=True)]
    tensors = [inputs(case) for case in cases]
    calls = [JitFlashCpu().prepare(case, *three) for case, three in zip(cases, tensors)]
    outs = [call() for call in calls]
    for case, three, out in zip(cases, tensors, outs):
        verify(case, *three, out)


def test_inputs_stay_alive():
    case = problem(512, 512)
    copies = inputs(case)
    call = JitFlashCpu().prepare(case, *inputs(case))
    noise = [torch.randn(case.q_shape) for _ in range(8)]
    verify(case, *copies, call())
    assert len(noise) == 8


def test_refuses_tensors_that_are_not_the_problem():
    case = problem(65, 100)
    q, k, v = inputs(case)
    with pytest.raises(ValueError, match=r"^the last dimension of k must be contiguous: its stride is 100$"):
        JitFlashCpu().prepare(case, q, k.mT.contiguous().mT, v)
    with pytest.raises(ValueError, match=r"^v is \(1, 1, 99, 64\) of torch.float32, not what b1-h1-q65-k100-d64-fp32"):
        JitFlashCpu().prepare(case, q, k, v[:, :, 1:])
    with pytest.raises(ValueError, match=r"^q is on meta, not on the CPU$"):
        JitFlashCpu().prepare(case, q.to("meta"), k, v)
    with pytest.raises(ValueError, match=r"^q is a negated view: resolve_neg\(\) it$"):
        JitFlashCpu().prepare(case, torch._neg_view(q), k, v)
    with pytest.raises(ValueError, match=r"^q is \(1, 1, 65, 64\) of torch.float16"):
        JitFlashCpu().prepare(case, q.half(), k, v)


def test_unsupported():
    backend = JitFlashCpu()
    good = problem(8, 8, head_dim=MAX_HEAD_DIM)
    assert backend.unsupported(good) is None
    assert (
        backend.unsupported(dataclasses.replace(good, direction="bwd")) == "direction bwd: the kernel only runs forward"
    )
    assert backend.unsupported(dataclasses.replace(good, head_dim=257)) == "head_dim 257 is above 256"
    assert backend.unsupported(dataclasses.replace(good, head_dim_v=300)) == "head_dim_v 300 is above 256"
    for scale in (1e-46, 1e300):
        reason = backend.unsupported(dataclasses.replace(good, softmax_scale=scale))
        assert reason == f"softmax_scale {scale:g} is beyond what fp32 holds"
        strange = problem(8, 8, softmax_scale=scale)
        with pytest.raises(ValueError, match=r"^the kernel refuses"):
            backend.prepare(strange, *inputs(strange))
    big = problem(8, 8, head_dim=257)
    with pytest.raises(ValueError, match=r"^the kernel refuses b1-h1-q8-k8-d257-fp32$"):
        backend.prepare(big, *inputs(big))


CLANG = next(filter(None, map(shutil.which, ("clang++-19", "clang++"))), None)
needs_clang = pytest.mark.skipif(CLANG is None and "CI" not in os.environ, reason="no clang++")


@needs_clang
@pytest.mark.parametrize("dtype", DTYPES)
def test_clang_is_as_good(dtype, monkeypatch, threads):
    monkeypatch.setenv("ATTNBENCH_CXX", CLANG or "clang++")
    threads(2)
    for seqlen_q, heads in ((1, (4, 1)), (13, (1, 1)), (300, (2, 1))):
        sizes = {"heads_q": heads[0], "heads_kv": heads[1], "head_dim": 72, "head_dim_v": 40}
        check(problem(seqlen_q, 1111, causal=True, window=900, dtype=dtype, **sizes))


def test_unavailable_without_a_compiler(monkeypatch, tmp_path):
    assert JitFlashCpu().unavailable() is None
    for name in ("CXX", "ATTNBENCH_CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(jit.ToolchainMissing) as caught:
        jit.cpp_toolchain()
    assert JitFlashCpu().unavailable() == f"{caught.value.message}: {caught.value.hint}"


def test_unavailable_with_instructions_that_are_not_there(monkeypatch):
    monkeypatch.setenv("ATTNBENCH_CPU_ISA", "sse9")
    names = ", ".join(isa.name for isa in ISAS)
    assert JitFlashCpu().unavailable() == f"ATTNBENCH_CPU_ISA=sse9 is not one of {names}"
    monkeypatch.setattr(jit, "cpu_features", lambda: "avx2 fma avx512f")
    monkeypatch.setenv("ATTNBENCH_CPU_ISA", "avx512")
    assert JitFlashCpu().unavailable() == "this CPU has no avx512bw: unset ATTNBENCH_CPU_ISA=avx512"
    monkeypatch.setenv("ATTNBENCH_CPU_ISA", "avx2")
    assert JitFlashCpu().unavailable() == "this CPU has no f16c: unset ATTNBENCH_CPU_ISA=avx2"


def test_a_path_may_be_written_in_any_case(monkeypatch):
    monkeypatch.setattr(jit, "cpu_features", lambda: "avx2 fma f16c avx512f avx512bw avx512cd avx512dq avx512vl")
    monkeypatch.setenv("ATTNBENCH_CPU_ISA", " AVX2 ")
    assert (JitFlashCpu().unavailable(), JitFlashCpu().summary) == (None, "JIT-compiled C++ flash attention (avx2)")


@pytest.mark.parametrize(
    ("features", "name"),
    [
        ("sse2", "portable"),
        ("avx2 fma", "portable"),
        ("avx2 fma f16c", "avx2"),
        ("avx2 fma f16c avx512f avx512bw avx512cd avx512dq avx512vl", "avx512"),
        ("avx2 fma f16c avx512f avx512bw avx512cd avx512dq avx512vl avx512_bf16", "avx512"),
        ("avx2 fma f16c avx512f avx512bw avx512cd avx512dq avx512vl avx512_bf16 sse4a", "avx512_bf16"),
        ("avx2 fma f16c avx512f avx512bw avx512cd avx512dq avx512vl avx512_bf16 amx_tile amx_bf16", "amx_bf16"),
        ("fp asimd", "neon"),
    ],
)
def test_the_best_path_is_listed(features, name, monkeypatch):
    monkeypatch.delenv("ATTNBENCH_CPU_ISA")
    monkeypatch.setattr(jit, "cpu_features", lambda: features)
    monkeypatch.setattr(cpu, "_tiles_granted", lambda: True)
    assert JitFlashCpu().summary == f"JIT-compiled C++ flash attention ({name})"


@pytest.mark.parametrize("name", MISSING)
def test_paths_tried(name):
    """Says which paths the tests above have not tried."""
    if MISSING[name]:
        pytest.skip(f"{name} was not tried: this CPU has no {', '.join(MISSING[name])}")


def test_without_the_systems_permission_there_are_no_tiles(monkeypatch):
    monkeypatch.delenv("ATTNBENCH_CPU_ISA")
    amx = "avx512f avx512bw avx512cd avx512dq avx512vl avx512_bf16 amx_tile amx_bf16"
    monkeypatch.setattr(jit, "cpu_features", lambda: amx)
    monkeypatch.setattr(cpu, "_tiles_granted", lambda: False)
    assert JitFlashCpu().summary.endswith("(avx512)")
    monkeypatch.setenv("ATTNBENCH_CPU_ISA", "amx_bf16")
    assert JitFlashCpu().unavailable() == "this CPU has no amx_tile: unset ATTNBENCH_CPU_ISA=amx_bf16"


def test_a_compiler_that_makes_another_path_is_found_out(monkeypatch):
    monkeypatch.setattr(cpu, "_isa", lambda: (dataclasses.replace(ISAS[-1], flags=()), None))
    with pytest.raises(jit.CompileError, match=r"^the compiler made \w+ of what was to be portable$"):
        cpu._library()


def test_what_is_listed_is_what_runs(isa, monkeypatch):
    assert JitFlashCpu().summary == f"JIT-compiled C++ flash attention ({isa})"
    assert cpu._library().flash_attention_isa().decode() == isa
    monkeypatch.delenv("ATTNBENCH_CPU_ISA")
    assert f"({cpu._library().flash_attention_isa().decode()})" in JitFlashCpu().summary


def test_parallel_units(threads: Callable[[int], None]):
    threads(6)
    units = JitFlashCpu().parallel_units
    assert units(problem(1, 256)) == 1, "too little work for a second thread"
    assert units(problem(1, 4096)) == 6
    assert units(problem(128, 256)) == 1, "one tile, and too few keys to split"
    assert units(problem(128, 1024)) == 4
    assert units(problem(128, 4096)) == 6
    assert units(problem(3 * TILE, 256)) == 3
    assert units(problem(100 * TILE, 256)) == 6


def test_constants_are_the_kernels():
    text = SOURCE.read_text(encoding="utf-8")
    assert f"constexpr int64_t TILE = {TILE};" in text
    assert f"constexpr int64_t MAX_DIM = {MAX_HEAD_DIM};" in text


def test_the_plugin_brings_it():
    found = [(backend.name, backend.device) for backend in attnbench_backends()]
    assert found == [("jit_flash", "cpu"), ("jit_flash", "cuda"), ("jit_flash", "npu")]
