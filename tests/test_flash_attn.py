"""The plugins flash_attn, flash_attn_3, flash_attn_4 and xformers: what they refuse, ask for and choose among.

No library is here: each is stood in for by functions of its signature that refuse and mean what it does.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import python
from test_cuda import SUITE, run
from torch import Tensor

from attnbench import Problem
from attnbench.backend import Backend
from attnbench.devices.cuda import CudaDevice
from attnbench.reference import Reference, make_inputs
from attnbench_plugins import fastest, flash_attn, flash_attn_3, flash_attn_4, flash_attn_family, xformers
from attnbench_plugins.flash_attn_family import split_counts

(FA2,) = flash_attn.attnbench_backends()
(FA3,) = flash_attn_3.attnbench_backends()
(FA4,) = flash_attn_4.attnbench_backends()
(XFORMERS,) = xformers.attnbench_backends()
PEERS: tuple[Backend, ...] = (FA2, FA3, FA4, XFORMERS)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Two threads of torch's on tensors this small spin longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def problem(seqlen_q: int = 48, seqlen_k: int = 80, **fields: Any) -> Problem:
    return Problem(seqlen_q=seqlen_q, seqlen_k=seqlen_k, **{"head_dim": 32, "dtype": "fp16", **fields})


# --- what is there ----------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A GPU of the compute capability given."""

    def make(*capability: int) -> None:
        monkeypatch.setattr(CudaDevice, "unavailable", lambda self: None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)

    return make


@pytest.mark.parametrize("backend", PEERS, ids=lambda b: b.name)
def test_without_a_gpu_they_say_so_first(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaDevice, "unavailable", lambda self: "no GPU here")
    assert backend.unavailable() == "no GPU here"


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        (FA2, "flash-attn is not installed: pip install 'attnbench[flash-attn]'"),
        (
            FA3,
            "flash_attn_interface is not installed: pip install 'attnbench[fa3-fwd]' for bf16 without windows, "
            "or build the folder hopper of the flash-attention repository",
        ),
        (FA4, "flash-attn-4 is not installed: pip install 'attnbench[flash-attn-4]'"),
        (XFORMERS, "xformers is not installed: pip install 'attnbench[xformers]'"),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_a_missing_library_is_named_with_the_extra_that_has_it(gpu, backend: Backend, reason: str) -> None:
    gpu(9, 0)
    assert backend.unavailable() == reason


@pytest.mark.parametrize(
    ("backend", "capability", "needs"),
    [
        (FA2, (7, 5), "8.0 or later"),
        (FA3, (8, 9), "from 9.0 to below 10.0"),
        (FA3, (10, 0), "from 9.0 to below 10.0"),
        (FA4, (7, 5), "from 8.0 to below 13.0"),
        (FA4, (13, 0), "from 8.0 to below 13.0"),
        (XFORMERS, (7, 5), "8.0 or later"),
    ],
    ids=lambda x: getattr(x, "name", None),
)
def test_a_gpu_that_it_does_not_run_on(gpu, backend: Backend, capability: tuple[int, int], needs: str) -> None:
    gpu(*capability)
    has = ".".join(map(str, capability))
    assert backend.unavailable() == f"it needs a GPU of compute capability {needs}, and this one has {has}"


def test_flash_attention_4s_kernels_for_ampere_are_not_asked_for(gpu) -> None:
    gpu(8, 9)
    assert FA4.unavailable() == (
        "attnbench does not ask for its kernels for compute capability 8.x, which it has not run"
    )


def installed(folder: Path, distribution: str, **files: str) -> None:
    """A distribution in that folder, with its RECORD."""
    name = distribution.replace("-", "_")
    info = folder / f"{name}-9.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 9.0\n")
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    (info / "RECORD").write_text("".join(f"{path},,{len(text)}\n" for path, text in files.items()))


INTERFACE = flash_attn_4.INTERFACE


def test_the_two_distributions_of_one_package_are_told_apart(gpu, tmp_path: Path, monkeypatch) -> None:
    gpu(9, 0)
    monkeypatch.syspath_prepend(str(tmp_path))
    installed(tmp_path, "flash-attn-4", **{INTERFACE: "the newer"})
    assert FA4.unavailable() is None
    assert FA2.unavailable() == "flash-attn is not installed: pip install 'attnbench[flash-attn]'"
    installed(tmp_path, "flash-attn", **{"flash_attn/__init__.py": "", INTERFACE: "an old one"})
    assert FA2.unavailable() is None
    assert FA4.unavailable() == (
        f"flash-attn has written over its {INTERFACE}: "
        "pip install --force-reinstall --no-deps flash-attn-4 puts it back"
    )
    (tmp_path / INTERFACE).write_text("the newer")
    assert FA4.unavailable() is None


def test_xformers_cannot_be_imported_beside_flash_attn_4_alone(gpu, tmp_path: Path, monkeypatch) -> None:
    gpu(9, 0)
    monkeypatch.syspath_prepend(str(tmp_path))
    installed(tmp_path, "xformers", **{"xformers/__init__.py": ""})
    assert XFORMERS.unavailable() is None
    installed(tmp_path, "flash-attn-4", **{INTERFACE: ""})
    importlib.invalidate_caches()
    reason = "it cannot be imported beside flash-attn-4 without flash-attn: give it an environment of its own"
    assert XFORMERS.unavailable() == reason
    installed(tmp_path, "flash-attn", **{"flash_attn/__init__.py": ""})
    assert XFORMERS.unavailable() is None


@pytest.mark.parametrize(("built_for", "found"), [(1300, True), (7700, False), (None, True)])
def test_an_xformers_for_another_cuda_says_which(gpu, tmp_path: Path, monkeypatch, built_for, found: bool) -> None:
    gpu(9, 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.syspath_prepend(str(tmp_path))
    facts = json.dumps({"version": {"cuda": built_for}})
    installed(tmp_path, "xformers", **{"xformers/__init__.py": "", "xformers/cpp_lib.json": facts})
    assert XFORMERS.unavailable() == (
        None
        if found
        else "this xformers is built for CUDA 77, and libcudart.so.77 is not found: "
        "put the folder lib of nvidia-cuda-runtime-cu77 on LD_LIBRARY_PATH"
    )


def test_listing_them_imports_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raises = "raise RuntimeError('imported')"
    for module in ("flash_attn", "flash_attn_interface", "fa3_fwd_interface", "xformers"):
        (tmp_path / f"{module}.py").write_text(raises)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    answer = python(
        """
        import sys
        from attnbench import Problem
        from attnbench.devices.cuda import CudaDevice
        CudaDevice.unavailable = lambda self: None
        import torch
        torch.cuda.get_device_capability = lambda: (9, 0)
        from attnbench_plugins import flash_attn, flash_attn_3, flash_attn_4, xformers
        for module in (flash_attn, flash_attn_3, flash_attn_4, xformers):
            for backend in module.attnbench_backends():
                backend.unavailable(), backend.unsupported(Problem(seqlen_q=1, seqlen_k=1, dtype="bf16"))
        print({"flash_attn", "flash_attn_interface", "fa3_fwd_interface", "xformers"} & set(sys.modules))
        """
    )
    assert answer.out.strip() == "set()", answer.err


# --- what is refused --------------------------------------------------------------------------------------------------

NO_FP32 = "fp16 and bf16 only"
BY_8 = "head sizes must be multiples of 8 in fp16"
LOST = "a window of more than seqlen_k keys to both sides, which the library drops"
FLASH_ALONE = "only in fp16 and bf16, for one head size up to 256"


@pytest.mark.parametrize(
    ("backend", "case", "reason"),
    [
        *((backend, problem(direction="bwd"), "forward only") for backend in PEERS),
        *((backend, problem(dtype="fp32"), NO_FP32) for backend in (FA2, FA3, FA4)),
        *((backend, problem(head_dim=20), BY_8) for backend in (FA3, FA4, XFORMERS)),
        (XFORMERS, problem(head_dim=18, dtype="fp32"), "head sizes must be multiples of 4 in fp32"),
        (FA2, problem(head_dim_v=64), "one head size for q, k and v"),
        (FA2, problem(head_dim=264), "head sizes up to 256"),
        (FA3, problem(head_dim=264), "head sizes up to 256"),
        (FA4, problem(head_dim=264), "head sizes up to 256"),
        (FA4, problem(head_dim_v=264), "head sizes up to 256"),
        (FA4, problem(head_dim=96, head_dim_v=200), "values of up to 192 for head sizes up to 96"),
        (XFORMERS, problem(head_dim=1 << 17), "head sizes up to 65536"),
        *(
            (
                FA3,
                problem(head_dim=d, head_dim_v=e),
                "values of another size than keys only for head sizes up to 64×512, or of 136–192×104–128",
            )
            for d, e in ((72, 64), (64, 520), (128, 64), (192, 96), (192, 136))
        ),
        *((backend, problem(80, 40, window=60), LOST) for backend in (FA2, XFORMERS)),
        (XFORMERS, problem(80, 40, causal=True, dtype="fp32"), f"a query that sees no key {FLASH_ALONE}"),
        (XFORMERS, problem(80, 40, causal=True, head_dim_v=64), f"a query that sees no key {FLASH_ALONE}"),
        (XFORMERS, problem(window=9, dtype="fp32"), f"a window that is not causal {FLASH_ALONE}"),
        (XFORMERS, problem(window=9, head_dim=512), f"a window that is not causal {FLASH_ALONE}"),
        *((backend, problem(), None) for backend in PEERS),
        *((backend, problem(dtype="bf16", head_dim=256, causal=True, window=9), None) for backend in PEERS),
        *((backend, problem(heads_q=4, heads_kv=2, window=9), None) for backend in PEERS),
        *((backend, problem(80, 40, causal=True), None) for backend in PEERS),
        *((backend, problem(80, 40, window=30), None) for backend in PEERS),
        *((backend, problem(80, 40, window=60), None) for backend in (FA3, FA4)),
        (FA2, problem(80, 40, window=60, causal=True), None),
        (FA2, problem(80, 40, window=80), None),
        (FA2, problem(head_dim=20), None),
        *((FA3, problem(head_dim=d, head_dim_v=e), None) for d, e in ((32, 64), (64, 512), (192, 128), (136, 104))),
        (FA4, problem(head_dim=96, head_dim_v=192), None),
        (FA4, problem(head_dim=104, head_dim_v=256), None),
        (XFORMERS, problem(dtype="fp32", head_dim=20, head_dim_v=512, causal=True, window=9), None),
    ],
    ids=lambda x: getattr(x, "name", None) or getattr(x, "case_id", ""),
)
def test_what_is_refused_has_its_reason(backend: Backend, case: Problem, reason: str | None) -> None:
    assert backend.unsupported(case) == reason


ON_10 = "on compute capability 10.x and 11.x head sizes up to 128, 192×128 and 256"


@pytest.mark.parametrize("capability", [(10, 0), (11, 0)])
@pytest.mark.parametrize(
    ("backend", "case", "reason"),
    [
        (FA4, problem(head_dim=160), ON_10),
        (FA4, problem(head_dim=256, head_dim_v=128), ON_10),
        *((FA4, problem(head_dim=d, head_dim_v=e), None) for d, e in ((64, 128), (192, 128), (256, 256))),
        (XFORMERS, problem(dtype="fp32"), f"on Blackwell {FLASH_ALONE}"),
        (XFORMERS, problem(head_dim_v=64), f"on Blackwell {FLASH_ALONE}"),
        (XFORMERS, problem(80, 40, causal=True), None),
    ],
)
def test_what_is_refused_on_blackwell(gpu, backend: Backend, case: Problem, reason: str | None, capability) -> None:
    gpu(*capability)
    assert backend.unsupported(case) == reason


def test_what_flash_attention_4_refuses_on_a_blackwell_with_the_kernels_of_ampere(gpu) -> None:
    gpu(12, 1)
    reason = "on compute capability 12.x head sizes up to 192, and values no larger than keys"
    sizes = ((64, 64), (192, 192), (192, 128), (160, 8), (200, 200), (256, 64), (64, 128))
    found = [FA4.unsupported(problem(head_dim=d, head_dim_v=e)) for d, e in sizes]
    assert found == [None] * 4 + [reason] * 3
    assert XFORMERS.unsupported(problem(dtype="fp32")) == f"on Blackwell {FLASH_ALONE}"


def test_before_hopper_flash_attention_3_has_no_values_of_another_size(gpu) -> None:
    """Of those who bring it, the Hub's and xFormers' builds run there."""
    gpu(8, 0)
    reason = "values of another size than keys only on Hopper"
    assert flash_attn_family.no_flash_attn_3(problem(head_dim=64, head_dim_v=128)) == reason
    assert flash_attn_family.no_flash_attn_3(problem(head_dim=128)) is None


# --- stand-ins --------------------------------------------------------------------------------------------------------


def refuse_unless(condition: object, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, left: int, right: int, unseeing: float = 0.0) -> Tensor:
    """On (batch, seqlen, heads, dim), aligned bottom-right, -1 for a side without limit."""
    group = q.shape[2] // k.shape[2]
    queries, keys, values = (x.transpose(1, 2).double() for x in (q, k, v))
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    rows = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
    columns = torch.arange(k.shape[1])
    seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
    if left >= 0:
        seen &= columns >= rows - left
    if right >= 0:
        seen &= columns <= rows + right
    scores = (queries @ keys.mT * scale).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1).nan_to_num(unseeing) @ values).to(q.dtype).transpose(1, 2)


def refuse_layout(q: Tensor, k: Tensor, v: Tensor) -> None:
    (batch, _, heads, d), (_, keys, heads_kv, e) = q.shape, v.shape
    refuse_unless(k.shape == (batch, keys, heads_kv, d), "k has another shape")
    refuse_unless(v.shape[0] == batch, "v has another batch")
    refuse_unless(heads % heads_kv == 0, "Number of heads in key/value must divide number of heads in query")
    refuse_unless(q.dtype == k.dtype == v.dtype, "query, key and value must have the same dtype")
    refuse_unless(q.dtype in (torch.float16, torch.bfloat16), "only support fp16 and bf16 data type")
    refuse_unless({x.stride(-1) for x in (q, k, v)} == {1}, "Input tensor must have contiguous last dimension")
    assert e


def fa2_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    block_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    rotary_interleaved=True,
    alibi_slopes=None,
    num_splits=0,
    return_softmax_lse=False,
) -> Tensor:
    refuse_layout(q, k_cache, v_cache)
    refuse_unless(q.shape[-1] == v_cache.shape[-1] <= 256, "head dimension")
    refuse_unless(num_splits <= 128, "num_splits > 128 not supported")
    left, right = window_size
    keys = k_cache.shape[1]
    causal = causal and q.shape[1] > 1
    right = 0 if causal else right
    left, right = (-1 if side >= keys else side for side in (left, right))
    return attention(q, k_cache, v_cache, softmax_scale, left, right)


def fa3_with_kvcache(left_out: set[str]) -> Callable[..., Tensor]:
    def with_kvcache(
        q,
        k_cache,
        v_cache,
        k=None,
        v=None,
        qv=None,
        rotary_cos=None,
        rotary_sin=None,
        cache_seqlens=None,
        cache_batch_idx=None,
        cache_leftpad=None,
        page_table=None,
        cu_seqlens_q=None,
        cu_seqlens_k_new=None,
        max_seqlen_q=None,
        rotary_seqlens=None,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        attention_chunk=0,
        softcap=0.0,
        rotary_interleaved=True,
        scheduler_metadata=None,
        num_splits=0,
        pack_gqa=None,
        sm_margin=0,
        return_softmax_lse=False,
    ) -> Tensor:
        refuse_layout(q, k_cache, v_cache)
        d, e, queries, keys = q.shape[-1], v_cache.shape[-1], q.shape[1], k_cache.shape[1]
        refuse_unless(d % 8 == 0 and e % 8 == 0, "head_size should be a multiple of 8")
        refuse_unless(d <= 256, "head dimension at most 256")
        refuse_unless(d == e or (128 < d <= 192 and 96 < e <= 128) or (d <= 64 and e <= 512), "V headdim")
        refuse_unless(q.dtype != torch.float16 or "FP16" not in left_out, "does not support FP16")
        refuse_unless(num_splits <= 256, "num_splits > 256 not supported")
        left, right = window_size
        left, right = -1 if left >= keys - 1 else left, -1 if right >= queries - 1 else right
        if queries == 1 and (left, right) == (-1, -1):
            causal = False
        right = 0 if causal else right
        local = (left, right) not in ((-1, -1), (-1, 0))
        refuse_unless(not local or "LOCAL" not in left_out, "does not support local attention")
        return attention(q, k_cache, v_cache, softmax_scale, left, right)

    return with_kvcache


def fa4_func(
    q,
    k,
    v,
    qv=None,
    gather_kv_indices=None,
    softmax_scale=None,
    causal=False,
    window_size=(None, None),
    learnable_sink=None,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    score_mod=None,
    score_mod_bwd=None,
    mask_mod=None,
    aux_tensors=None,
    aux_scalars=None,
    block_sparse_tensors=None,
    block_sparse_tensors_bwd=None,
    return_lse=False,
    gather_bwd_recompute_p=False,
    gather_bwd_token_chunk=None,
) -> tuple[Tensor, None]:
    refuse_layout(q, k, v)
    refuse_unless(q.shape[-1] % 8 == 0 and v.shape[-1] % 8 == 0, "divisible by 8")
    refuse_unless(q.shape[-1] > 96 or v.shape[-1] <= 192, "PTX assembly failed: Insufficient registers")
    refuse_unless(flash_attn_4.capability()[0] in (10, 11) or num_splits <= 1, "SplitKV not supported on SM 9.0")
    left, right = window_size
    if left is not None and right is not None and left < 0 and right < 0:
        left = right = None
    right = 0 if causal else right
    # None alone is no limit: a -1 beside a limit is a limit of -1.
    refuse_unless(left is None or left >= 0, "a window that ends before it begins")
    sides = (-1 if side is None else side for side in (left, right))
    return attention(q, k, v, softmax_scale, *sides), None


class Bias:
    """As xformers.ops.fmha.attn_bias has them."""

    class LowerTriangularFromBottomRightMask:
        sides = (-1, 0)

        def make_local_attention(self, window_size: int) -> object:
            return Bias.LowerTriangularFromBottomRightLocalAttentionMask(window_size)

    class LowerTriangularFromBottomRightLocalAttentionMask:
        def __init__(self, window_size: int) -> None:
            self.sides = (window_size - 1, 0)

    class LocalAttentionFromBottomRightMask:
        def __init__(self, window_left: int, window_right: int) -> None:
            self.sides = (window_left, window_right)


HALF = (torch.float16, torch.bfloat16)
CAUSAL = (
    type(None),
    Bias.LowerTriangularFromBottomRightMask,
    Bias.LowerTriangularFromBottomRightLocalAttentionMask,
)
EVERY = (*CAUSAL, Bias.LocalAttentionFromBottomRightMask)


class Operator:
    def __init__(self, name: str, dtypes, biases, most: int, least: int = 0, values: bool = False) -> None:
        self.name, self.dtypes, self.biases, self.most, self.least = name, dtypes, biases, most, least
        self.values = values


OPERATORS = (
    Operator("flash3", HALF, EVERY, 256, least=32, values=True),
    Operator("flash", HALF, EVERY, 256),
    Operator("triton_splitk", HALF, (type(None),), 512),
    Operator("cutlass", (*HALF, torch.float32), CAUSAL, 65536, values=True),
)


def memory_efficient_attention_forward(
    query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
) -> Tensor:
    if not query.ndim == key.ndim == value.ndim or query.ndim not in (4, 5):
        raise ValueError("Query/Key/Value should all have BMGHK, BMHK or BMK shape.")
    if key.shape[2:-1] != query.shape[2:-1] or value.shape[:-1] != key.shape[:-1]:
        raise ValueError("Incompatible shapes for attention inputs")
    d, e = query.shape[-1], value.shape[-1]
    multiple = 4 if query.dtype == torch.float32 else 8
    if (
        query.dtype not in op.dtypes
        or type(attn_bias) not in op.biases
        or not op.least <= min(d, e) <= max(d, e) <= op.most
        or (d != e and not op.values)
        or d % multiple
        or e % multiple
    ):
        raise ValueError(f"Operator {op.name} does not support inputs")
    if op.name == "flash3":  # what its kernel says beyond that
        refuse_unless(d == e or (128 < d <= 192 and 96 < e <= 128) or (d <= 64 and e <= 512), "V headdim")
    shape = (*query.shape[:-1], e)
    if query.ndim == 5:
        assert key.stride(3) == value.stride(3) == 0, "keys that are copied for each head of a group"
        query, key, value = query.flatten(2, 3), key[:, :, :, 0], value[:, :, :, 0]
    left, right = (-1, -1) if attn_bias is None else attn_bias.sides
    if op.name == "flash":
        left, right = (-1 if side >= key.shape[1] else side for side in (left, right))
    out = attention(query, key, value, scale, left, right, unseeing=torch.nan if op.name == "cutlass" else 0.0)
    return out.reshape(shape)


def module(monkeypatch: pytest.MonkeyPatch, name: str, **names: Any) -> ModuleType:
    made = ModuleType(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None)
    made.__path__ = []  # so that it may have others below it
    vars(made).update(names)
    monkeypatch.setitem(sys.modules, name, made)
    return made


def fa3_fwd(monkeypatch: pytest.MonkeyPatch) -> None:
    """As PyPI has it."""
    module(monkeypatch, "fa3_fwd_interface", flash_attn_with_kvcache=fa3_with_kvcache({"FP16", "LOCAL"}))
    flags = {"FP16": True, "LOCAL": True, "PAGEDKV": True, "HDIM256": False, "SPLIT": False}
    config = {"build_flags": {f"FLASHATTENTION_DISABLE_{name}": is_set for name, is_set in flags.items()}}
    module(monkeypatch, "fa3_fwd_config", CONFIG=config)


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xformers, "_has_flash3", lambda: True)
    module(monkeypatch, "flash_attn", flash_attn_with_kvcache=fa2_with_kvcache)
    module(monkeypatch, "flash_attn.cute", flash_attn_func=fa4_func)
    module(monkeypatch, "flash_attn_interface", flash_attn_with_kvcache=fa3_with_kvcache(set()))
    module(monkeypatch, "xformers")
    module(monkeypatch, "xformers.ops")
    names: dict[str, Any] = {op.name: module(monkeypatch, f"xformers.ops.fmha.{op.name}", FwOp=op) for op in OPERATORS}
    biases = module(monkeypatch, "xformers.ops.fmha.attn_bias", **vars(Bias))
    fmha = module(
        monkeypatch,
        "xformers.ops.fmha",
        memory_efficient_attention_forward=memory_efficient_attention_forward,
        attn_bias=biases,
        **names,
    )
    sys.modules["xformers.ops"].fmha = fmha  # type: ignore[attr-defined]


class Tried(list[Callable[[], Tensor]]):
    """What a plugin chose among, but for those that the library refused."""

    refused = 0


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> Tried:
    """Whatever the plugin chooses among; the first that works is chosen."""
    found = Tried()

    def first(calls: list[Callable[[], Tensor]]) -> Callable[[], Tensor]:
        for call in calls:
            try:
                call()
            except (RuntimeError, ValueError):
                found.refused += 1
                continue
            found.append(call)
        return found[0]

    monkeypatch.setattr(flash_attn_family, "fastest", first)
    monkeypatch.setattr(xformers, "fastest", first)
    for backend in (flash_attn, flash_attn_3, flash_attn_4):
        monkeypatch.setattr(backend, "cores", lambda _: 132)
    return found


SHAPES = (
    problem(),
    problem(dtype="bf16", causal=True),
    problem(80, 48, causal=True),
    problem(80, 48),
    problem(batch=2, heads_q=3, causal=True, window=9),
    problem(batch=2, heads_q=6, heads_kv=2, window=9),
    problem(80, 40, heads_q=4, heads_kv=2, window=30),
    problem(80, 40, window=60),
    problem(80, 40, window=60, causal=True),
    problem(80, 40, window=90),
    problem(48, 48, heads_q=4, heads_kv=1, causal=True, window=1),
    problem(window=1),
    problem(1, 300, heads_q=8, heads_kv=2, causal=True),
    problem(1, 300, heads_q=8, heads_kv=2, dtype="bf16", window=40, causal=True),
    problem(1, 300, batch=2, heads_q=2, window=40),
    problem(head_dim=32, head_dim_v=64, heads_q=4, heads_kv=2, causal=True),
    problem(head_dim=192, head_dim_v=128),
    problem(head_dim=128, head_dim_v=64),
    problem(head_dim=20, softmax_scale=0.3),
    problem(dtype="fp32", heads_q=4, heads_kv=2, causal=True, window=20),
    problem(dtype="fp32", head_dim=20, head_dim_v=36),
)


@pytest.mark.parametrize("backend", PEERS, ids=lambda b: b.name)
@pytest.mark.parametrize("case", SHAPES, ids=lambda p: p.case_id)
def test_whatever_is_chosen_is_right_and_copies_no_input(
    libraries, tried: Tried, backend: Backend, case: Problem
) -> None:
    if reason := backend.unsupported(case):
        pytest.skip(reason)
    inputs, others = make_inputs(case, 0), make_inputs(case, 1)
    backend.prepare(case, inputs.q, inputs.k, inputs.v)
    assert tried.refused == 0
    assert len(tried) == candidates(backend, case)
    reference = Reference.of(case, inputs, 0)
    for call in tried:
        output = call()
        assert type(output) is Tensor
        assert reference.judge(output).fault == ""
    for tensor, other in zip((inputs.q, inputs.k, inputs.v), (others.q, others.k, others.v)):
        tensor.data.copy_(other)
    reference = Reference.of(case, others, 0)
    assert [reference.judge(call()).fault for call in tried] == [""] * len(tried), "of the inputs as they were"


def candidates(backend: Backend, case: Problem) -> int:
    """Among how many a plugin is to choose on a Hopper of 132 cores."""
    if backend is XFORMERS:
        return len(xformers.operators(case))
    grouped = case.heads_q != case.heads_kv
    return (1 if backend is FA4 else len(split_counts(case, 132))) + (grouped and backend is not FA2)


@pytest.mark.parametrize("backend", PEERS, ids=lambda b: b.name)
def test_the_fastest_is_chosen_by_trying(libraries, monkeypatch, backend: Backend) -> None:
    case = problem(heads_q=4, heads_kv=2)
    inputs = make_inputs(case, 0)
    offered: list[int] = []
    whole = fastest.fastest

    def counted(calls: list[Callable[[], Tensor]]) -> Callable[[], Tensor]:
        offered.append(len(calls))
        return whole(calls)

    monkeypatch.setattr(flash_attn_family, "fastest", counted)
    monkeypatch.setattr(xformers, "fastest", counted)
    call = backend.prepare(case, inputs.q, inputs.k, inputs.v)
    assert Reference.of(case, inputs, 0).judge(call()).fault == ""
    assert offered[0] > 1


@pytest.mark.parametrize("case", SHAPES, ids=lambda p: p.case_id)
def test_the_window_that_the_stand_in_drops_as_flash_attention_2_does_makes_it_wrong(
    libraries, tried, case: Problem
) -> None:
    """So it would find the plugin out if that asked."""
    if FA2.unsupported(case) != LOST:
        pytest.skip("its window is not lost")
    inputs = make_inputs(case, 0)
    FA2.prepare(case, inputs.q, inputs.k, inputs.v)
    assert Reference.of(case, inputs, 0).judge(tried[0]()).fault


# --- what is chosen among ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "counts"),
    [
        (problem(128, 1024), [0, 1, 2, 4, 8]),
        (problem(1, 65536, heads_q=8, heads_kv=2), [0, 1, 2, 4, 8, 16, 32, 64, 66, 128]),
        (problem(128, 65536, heads_q=8), [0, 1, 2, 4, 8, 16, 32, 33]),
        (problem(1, 65536, batch=8, heads_q=32), [0, 1]),
        (problem(2048, 2048, heads_q=16), [0, 1]),
        (problem(1, 65536, window=64, causal=True), [0, 1, 2]),
        (problem(1, 100), [0, 1]),
    ],
    ids=lambda x: getattr(x, "case_id", None),
)
def test_keys_are_split_where_tiles_are_few(case: Problem, counts: list[int]) -> None:
    assert split_counts(case, 132) == counts


def asked(monkeypatch: pytest.MonkeyPatch, backend: Backend, name: str, function: str, case: Problem) -> list[dict]:
    """The keyword arguments of the first call of each choice."""
    found: list[dict] = []
    whole = vars(sys.modules[name])[function]

    def recorded(*tensors: Tensor, **options: Any) -> Any:
        found.append(options)
        return whole(*tensors, **options)

    monkeypatch.setattr(sys.modules[name], function, recorded)
    inputs = make_inputs(case, 0)
    backend.prepare(case, inputs.q, inputs.k, inputs.v)
    return found


def test_flash_attention_2_and_3_are_asked_with_every_number_of_splits(libraries, tried, monkeypatch) -> None:
    case = problem(1, 1000, heads_q=4, heads_kv=2, causal=True)
    mask = {"softmax_scale": case.softmax_scale, "causal": True}
    splits = [mask | {"num_splits": count} for count in (0, 1, 2, 4, 8)]
    assert asked(monkeypatch, FA2, "flash_attn", "flash_attn_with_kvcache", case) == splits
    packed = [mask | {"num_splits": 1, "pack_gqa": packed} for packed in (True, False)]
    splits.remove(mask | {"num_splits": 1})
    assert asked(monkeypatch, FA3, "flash_attn_interface", "flash_attn_with_kvcache", case) == splits + packed
    case = problem(1, 1000, causal=True)
    splits = [mask | {"softmax_scale": case.softmax_scale, "num_splits": count} for count in (0, 1, 2, 4, 8)]
    assert asked(monkeypatch, FA3, "flash_attn_interface", "flash_attn_with_kvcache", case) == splits


def test_flash_attention_4_splits_on_capability_10_and_11_alone(libraries, tried, monkeypatch) -> None:
    case = problem(1, 1000, heads_q=4, heads_kv=2, window=40)
    mask = {"softmax_scale": case.softmax_scale, "causal": False, "window_size": (39, 39)}
    unpacked = mask | {"pack_gqa": False}
    for major, choices in {
        9: [mask, unpacked],
        10: [*(mask | {"num_splits": count} for count in (0, 1, 2)), unpacked],
        11: [*(mask | {"num_splits": count} for count in (0, 1, 2)), unpacked],
        12: [mask, unpacked],
    }.items():
        with monkeypatch.context() as patched:
            patched.setattr(flash_attn_4, "capability", lambda has=(major, 0): has)
            assert asked(patched, FA4, "flash_attn.cute", "flash_attn_func", case) == choices


@pytest.mark.parametrize(
    ("case", "names"),
    [
        (problem(), ["flash3", "flash", "triton_splitk", "cutlass"]),
        (problem(512), ["flash3", "flash", "cutlass"]),
        (problem(causal=True), ["flash3", "flash", "cutlass"]),
        (problem(1, causal=True), ["flash3", "flash", "triton_splitk", "cutlass"]),
        (problem(window=9), ["flash3", "flash"]),
        (problem(80, 40, causal=True), ["flash3", "flash"]),
        (problem(head_dim_v=64), ["flash3", "cutlass"]),
        (problem(head_dim=512), ["cutlass"]),
        (problem(head_dim=16), ["flash", "triton_splitk", "cutlass"]),
        (problem(head_dim=128, head_dim_v=64), ["cutlass"]),
        (problem(head_dim=64, head_dim_v=512), ["cutlass"]),
        (problem(head_dim=192, head_dim_v=128, window=9), ["flash3"]),
        (problem(80, 40, head_dim_v=64, causal=True), ["flash3"]),
        (problem(80, 40, window=60), ["flash3"]),
        (problem(dtype="fp32"), ["cutlass"]),
    ],
    ids=lambda x: getattr(x, "case_id", None),
)
def test_xformers_tries_the_operators_that_are_right(monkeypatch, case: Problem, names: list[str]) -> None:
    monkeypatch.setattr(xformers, "_has_flash3", lambda: True)
    assert xformers.operators(case) == names
    assert XFORMERS.unsupported(case) is None
    monkeypatch.setattr(xformers, "_has_flash3", lambda: False)
    assert xformers.operators(case) == [name for name in names if name != "flash3"]
    assert (XFORMERS.unsupported(case) is None) == (names != ["flash3"]), "by the others' limits then"
    monkeypatch.setattr(xformers, "_has_flash3", lambda: True)
    monkeypatch.setattr(xformers, "capability", lambda: (8, 0))
    monkeypatch.setattr(flash_attn_family, "capability", lambda: (8, 0))
    assert xformers.operators(case) == ([] if names == ["flash3"] else names if "flash" in names else ["cutlass"])
    monkeypatch.setattr(xformers, "capability", lambda: (10, 0))
    assert xformers.operators(case) == [name for name in names if name in ("flash", "triton_splitk")]


def test_flash_attention_3_is_looked_for_in_xformers_and_beside_it(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    for folder in ("xformers", "flash_attn_3"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").touch()
    importlib.invalidate_caches()
    assert not xformers._has_flash3()
    for folder in ("xformers/flash_attn_3", "flash_attn_3"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "_C.abi3.so").touch()
        assert xformers._has_flash3()
        (tmp_path / folder / "_C.abi3.so").unlink()
    assert not xformers._has_flash3()


def test_the_views_that_xformers_gets_are_of_the_tensors_themselves() -> None:
    case = problem(3, 5, batch=2, heads_q=6, heads_kv=2)
    inputs = make_inputs(case, 0)
    q, k, v = xformers.layout(case, inputs.q, inputs.k, inputs.v)
    assert (q.shape, k.shape, v.shape) == ((2, 3, 2, 3, 32), (2, 5, 2, 3, 32), (2, 5, 2, 3, 32))
    assert [x.data_ptr() for x in (q, k, v)] == [x.data_ptr() for x in (inputs.q, inputs.k, inputs.v)]
    assert q[1, 2, 1, 0].equal(inputs.q[1, 3, 2]), "the first of the three heads that read the second key head"
    assert k[1, 4, 1, 2].equal(inputs.k[1, 1, 4])


# --- the builds of FlashAttention-3 -----------------------------------------------------------------------------------


def test_a_lesser_build_of_flash_attention_3_refuses_what_was_left_out(gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(9, 0)
    fa3_fwd(monkeypatch)
    assert FA3.unavailable() is None
    assert FA3.unsupported(problem()) == "this fa3_fwd_interface is built without fp16"
    assert FA3.unsupported(problem(dtype="bf16", window=9)) == "this fa3_fwd_interface is built without windows"
    assert FA3.unsupported(problem(48, 30, dtype="bf16", window=40)) is not None, "one that hides something"
    assert FA3.unsupported(problem(48, 30, dtype="bf16", window=48)) is None, "one that hides nothing"
    assert FA3.unsupported(problem(48, 30, dtype="bf16", window=30, causal=True)) is None
    assert FA3.unsupported(problem(dtype="bf16", causal=True, head_dim=256)) is None
    module(monkeypatch, "flash_attn_interface")
    assert FA3.unsupported(problem(window=9)) is None, "the fuller one first, which does not say what it lacks"
    flags = {"FLASHATTENTION_DISABLE_HDIM256": True, "FLASHATTENTION_DISABLE_HDIM192": True}
    module(monkeypatch, "flash_attn_config", CONFIG={"build_flags": flags})
    assert FA3.unsupported(problem(head_dim=192)) == "head sizes up to 128"


@pytest.mark.parametrize("feature", ["HDIM64", "HDIMDIFF64"])
def test_a_build_without_the_kernels_for_larger_values_refuses_what_it_would_get_wrong(monkeypatch, feature) -> None:
    module(monkeypatch, "flash_attn_interface")
    flags = {f"FLASHATTENTION_DISABLE_{feature}": True}
    module(monkeypatch, "flash_attn_config", CONFIG={"build_flags": flags})
    reason = "this flash_attn_interface is built without values of more than 64 for keys of up to 64"
    assert FA3.unsupported(problem(head_dim=64, head_dim_v=72)) == reason
    sizes = ((32, 64), (64, 64), (192, 128), (96, 96))
    assert [FA3.unsupported(problem(head_dim=d, head_dim_v=e)) for d, e in sizes] == [None] * 4


@pytest.mark.parametrize("case", SHAPES, ids=lambda p: p.case_id)
def test_a_lesser_build_of_flash_attention_3_is_right_where_it_is_asked(monkeypatch, tried, case: Problem) -> None:
    fa3_fwd(monkeypatch)
    case = Problem.from_json(case.to_json() | {"dtype": "bf16"})
    inputs = make_inputs(case, 0)
    if FA3.unsupported(case) is None:
        FA3.prepare(case, inputs.q, inputs.k, inputs.v)
        assert [Reference.of(case, inputs, 0).judge(call()).fault for call in tried] == [""] * len(tried)
    elif "windows" in str(FA3.unsupported(case)):
        with pytest.raises(IndexError):  # the library takes none of the choices
            FA3.prepare(case, inputs.q, inputs.k, inputs.v)


# --- on a GPU, with the libraries that are there ----------------------------------------------------------------------


REFUSED = {"flash_attn": [128], "flash_attn_3": [], "flash_attn_4": [], "xformers": []}
"""Of the suite by its lengths of q, on a Hopper."""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="it computes on a GPU, and torch sees none")
@pytest.mark.parametrize("backend", PEERS, ids=lambda b: b.name)
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_it_is_right_and_captured_where_it_says_that_it_can(tmp_path: Path, backend: Backend, dtype: str) -> None:
    (tmp_path / "peers.toml").write_text(SUITE)
    words = ("--suite", tmp_path / "peers.toml", "--dtype", dtype, "--iters", "40", "--warmup", "5")
    results = run(tmp_path, "--backends", backend.name, *words)
    if results[0]["status"] == "UNAVAILABLE":
        pytest.skip(results[0]["reason"])
    refused = REFUSED[backend.name]
    if backend is FA3 and flash_attn_3.installed()[0] == "fa3_fwd_interface":  # built without fp16 and windows
        refused = [r["problem"]["seqlen_q"] for r in results] if dtype == "fp16" else [130]
    if backend is XFORMERS and torch.cuda.get_device_capability() >= (10, 0):
        refused = [128]
    ends = {r["problem"]["seqlen_q"]: (r["status"], r["reason"]) for r in results}
    assert [length for length, (status, _) in ends.items() if status == "UNSUPPORTED"] == refused
    passed = [length for length, (status, _) in ends.items() if status == "PASSED"]
    assert sorted(passed + refused) == sorted(ends), ends
    if not passed:
        pytest.skip(f"this build has no {dtype}")
    assert {r["measurement"]["timing_method"] for r in results if r["measurement"]} == {"cuda_graph"}
