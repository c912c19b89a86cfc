"""The plugin hf_kernels: which kernels of a cache it brings, how they are loaded and called, and that it stays offline.

The package is the real one where it is installed, with a made-up cache; else a stand-in reads the same cache.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import python

from attnbench import Problem
from attnbench.backend import faults
from attnbench.devices.cuda import CudaDevice
from attnbench.problem import Dtype
from attnbench.reference import Reference, make_inputs
from attnbench_plugins import flash_attn_family, hf_kernels, packages
from attnbench_plugins.hf_kernels import Cached, HubKernel, NoHubKernel

TORCH = "torch{}{}".format(*torch.__version__.split(".")[:2])
CPU = f"{TORCH}-cxx11-cpu-{platform.machine()}-linux"
CUDA = f"{TORCH}-cxx11-cu130-{platform.machine()}-linux"
FILL = "python -c 'import kernels; kernels.install_kernel(\"kernels-community/flash-attn2\", version=1)'"
OLD, NEW = "a" * 40, "b" * 40

KERNEL = '''
import torch

asked = []

def flash_attn_func(q, k, v, softmax_scale=None, causal=False, window_size=({none}, {none}), softcap=0.0{extra}):
    """flash-attn's rules: (batch, length, heads, dim), causal and window aligned bottom-right, zeros for no key."""
    asked.append((window_size, {splits}))
    assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.float16, torch.bfloat16)
    assert q.shape[2] % k.shape[2] == 0 and k.shape[:3] == v.shape[:3]
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    rows = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
    keys = torch.arange(k.shape[1])
    left, right = (-1 if side is None else side for side in window_size)
    right = 0 if causal else right
    if {drops}:
        left, right = (-1 if side >= k.shape[1] else side for side in (left, right))
    seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
    if left >= 0:
        seen &= keys >= rows - left
    if right >= 0:
        seen &= keys <= rows + right
    dtype = v.dtype
    q, k, v = (x.transpose(1, 2).float() for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(group, 1).mT * softmax_scale
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0)
    out = (weights @ v.repeat_interleave(group, 1)).transpose(1, 2).to(dtype)
    {result}
'''
"""As flash-attn2 has it, which drops a window of as many keys as there are; changed as the others are below."""
FLASH_ATTN = {"none": -1, "extra": "", "splits": "None", "drops": True, "result": "return out"}
WITH_SPLITS = {
    "extra": ", num_splits=1, pack_gqa=None",
    "splits": "num_splits",
    "drops": False,
    "result": "return out, None",
}
CHANGED = {"flash-attn3": WITH_SPLITS, "vllm-flash-attn3": WITH_SPLITS, "flash-attn4": WITH_SPLITS | {"none": None}}
"""flash-attn2 has a kernel for q, k and v of one length on GPUs alone: its builds for a CPU stand in for those here."""


def problem(seqlen_q: int = 40, seqlen_k: int = 56, dtype: Dtype = "fp16", **fields: Any) -> Problem:
    return Problem(seqlen_q=seqlen_q, seqlen_k=seqlen_k, dtype=dtype, **{"head_dim": 64, **fields})


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Puts a kernel into a cache of its own."""
    monkeypatch.setenv("KERNELS_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    hf_kernels._no_build.cache_clear()

    def put(repo: str, build: str = CPU, commit: str = NEW) -> Path:
        folder = tmp_path / "kernels--{}--{}".format(*repo.split("/")) / "snapshots" / commit / "build" / build
        folder.mkdir(parents=True)
        name = repo.partition("/")[2]
        made = {"name": name, "id": f"_{name}_{tmp_path.name}", "version": 1, "license": "BSD-3-Clause"}
        backend = {"type": "cuda" if "-cu" in build else "cpu"}
        (folder / "metadata.json").write_text(json.dumps({**made, "python-depends": [], "backend": backend}))
        (folder / "__init__.py").write_text(KERNEL.format(**FLASH_ATTN | CHANGED.get(name, {})))
        return folder

    return put


@pytest.fixture
def package(cache: object, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package kernels, or what does as it does with what is in the cache; checked to be offline."""
    if hf_kernels.no_package() is None:
        real = importlib.import_module("kernels.hf_hub")
        for module in ("kernels.hf_hub", "kernels.resolver", "kernels.install"):
            monkeypatch.setattr(importlib.import_module(module), "CACHE_DIR", os.environ["KERNELS_CACHE"])
        return real
    monkeypatch.setattr(hf_kernels, "no_package", lambda: None)
    hub, constants, kernels = (ModuleType(name) for name in ("huggingface_hub", "huggingface_hub.constants", "kernels"))
    constants.HF_HUB_OFFLINE = False

    def path(repo_id: str, revision: str, backend: str | None) -> Path:
        assert constants.HF_HUB_OFFLINE, "it would ask the Hub"
        assert backend in (None, "cpu")
        folder = Path(os.environ["KERNELS_CACHE"]) / "kernels--{}--{}".format(*repo_id.split("/"))
        return folder / "snapshots" / revision / "build" / CPU

    def get_kernel(repo_id: str, *, revision: str, backend: str | None) -> ModuleType:
        file = path(repo_id, revision, backend) / "__init__.py"
        spec = importlib.util.spec_from_file_location("cached_kernel", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    kernels.get_kernel = get_kernel
    kernels.has_kernel = lambda repo_id, **how: path(repo_id, **how).exists()
    for module in (hub, constants, kernels):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return kernels


def found() -> list[tuple[str, str]]:
    return [(backend.name, backend.device) for backend in hf_kernels.attnbench_backends()]


# --- what is there ----------------------------------------------------------------------------------------------------


def test_each_kernel_of_the_cache_is_a_backend_on_each_device_that_it_is_built_for(cache: Callable[..., Path]) -> None:
    cache("kernels-community/flash-attn2", CPU)
    cache("kernels-community/flash-attn2", CUDA)
    cache("kernels-community/vllm-flash-attn3", CUDA)
    cache("Some-One/flash-attn3", "torch-stable-abi210-cu128-x86_64-linux")
    cache("kernels-community/paged-attention", "torch-npu")
    cache("kernels-community/activation", CUDA)
    cache("kernels-community/metal-flash-sdpa-attn", f"{TORCH}-metal-aarch64-darwin")
    assert found() == [
        ("hf_some_one_flash_attn3", "cuda"),
        ("hf_flash_attn2", "cpu"),
        ("hf_flash_attn2", "cuda"),
        ("hf_paged_attention", "npu"),
        ("hf_vllm_flash_attn3", "cuda"),
    ]
    assert [faults(backend) for backend in hf_kernels.attnbench_backends()] == [[]] * 5


def test_of_kernels_whose_names_would_be_the_same_the_first_is_there(cache: Callable[..., Path]) -> None:
    cache("kernels-community/flash-attn2", CUDA)
    cache("kernels-community/flash.attn2", CUDA)
    cache("kernels-community/flash_attn2", CPU)
    assert found() == [("hf_flash_attn2", "cuda"), ("hf_flash_attn2", "cpu")]
    assert hf_kernels.attnbench_backends()[0].homepage.endswith("flash-attn2")


def test_a_kernel_whose_folders_cannot_be_read_is_passed_over(cache: Callable[..., Path]) -> None:
    builds = cache("kernels-community/flash-attn2", CUDA).parent
    shutil.rmtree(builds)
    builds.touch()
    cache("kernels-community/paged-attention", CUDA)
    assert found() == [("hf_paged_attention", "cuda")]


def test_the_newest_commit_of_a_kernel_is_taken(cache: Callable[..., Path]) -> None:
    for commit, seconds in ((NEW, 2000), (OLD, 1000)):
        build = cache("kernels-community/flash-attn2", commit=commit).parent
        os.utime(build, (seconds, seconds))
    (kernel,) = hf_kernels.cached_kernels(hf_kernels.cache_folder())
    assert kernel == Cached("kernels-community/flash-attn2", NEW, ("cpu",))


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"KERNELS_CACHE": "/k", "HF_HUB_CACHE": "/h", "HF_HOME": "/m"}, "/k"),
        ({"HF_HUB_CACHE": "/h", "HF_HOME": "/m"}, "/h"),
        ({"HUGGINGFACE_HUB_CACHE": "/h"}, "/h"),
        ({"HF_HOME": "/m", "XDG_CACHE_HOME": "/x"}, "/m/hub"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
        ({"HOME": "/home/me"}, "/home/me/.cache/huggingface/hub"),
    ],
)
def test_the_cache_is_where_the_package_has_it(
    variables: dict[str, str], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("KERNELS_CACHE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert hf_kernels.cache_folder() == Path(folder)


def test_without_a_cache_there_is_one_backend_that_says_how_to_fill_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KERNELS_CACHE", str(tmp_path / "none"))
    assert found() == [("hf_kernels", "cuda")]
    (backend,) = hf_kernels.attnbench_backends()
    monkeypatch.setattr(packages, "installed_version", lambda name: "")
    assert backend.unavailable() == "kernels is not installed: pip install 'attnbench[hf-kernels]'"
    monkeypatch.setattr(hf_kernels, "no_package", lambda: None)
    assert backend.unavailable() == f"no attention kernel of the Hugging Face Hub is cached: {FILL}"
    with pytest.raises(RuntimeError, match="no attention kernel"):
        NoHubKernel().prepare(problem(), *torch.ones(3))


def test_a_folder_called_kernels_that_hides_the_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "installed_version", lambda name: "0.17.2")
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    (tmp_path / "kernels").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    importlib.invalidate_caches()
    reason = "another package called kernels comes before it on sys.path: run attnbench from another folder"
    assert hf_kernels.no_package() == reason
    (tmp_path / "kernels" / "load.py").touch()
    assert hf_kernels.no_package() is None


def test_describing_them_imports_neither_the_package_nor_a_kernel(cache: Callable[..., Path]) -> None:
    (cache("kernels-community/flash-attn2", CUDA) / "__init__.py").write_text("raise SystemExit(3)")
    answer = python(
        """
        import sys
        from attnbench import Problem
        from attnbench_plugins.hf_kernels import attnbench_backends
        for backend in attnbench_backends():
            backend.unavailable(), backend.unsupported(Problem(seqlen_q=1, seqlen_k=1, dtype="bf16"))
            print(backend.name)
        print({"kernels", "huggingface_hub"} & set(sys.modules))
        """
    )
    assert answer.out.split() == ["hf_flash_attn2", "set()"], answer.err


def kernel(repo: str, device: Any = "cuda") -> HubKernel:
    return HubKernel(Cached(repo, NEW, (device,)), device)


FA2, FA3, FA4 = (kernel(f"kernels-community/{name}") for name in ("flash-attn2", "vllm-flash-attn3", "flash-attn4"))


@pytest.mark.usefixtures("package")
def test_what_cannot_be_used_says_why(cache: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = kernel("kernels-community/paged-attention", "cpu")
    assert unknown.unavailable() == "attnbench does not know how to call kernels-community/paged-attention"
    cache("kernels-community/flash-attn2")
    reason = "on a CPU kernels-community/flash-attn2 has a kernel for sequences of various lengths alone"
    assert kernel("kernels-community/flash-attn2", "cpu").unavailable() == reason
    monkeypatch.setattr(CudaDevice, "unavailable", lambda self: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    needs = "it needs a GPU of compute capability {}, and this one has 10.0"
    assert FA3.unavailable() == needs.format("from 8.0 to below 10.0")
    reason = "kernels-community/flash-attn4 has no build in the cache for this torch and this cuda"
    assert (FA2.unavailable(), FA4.unavailable()) == (None, reason)
    monkeypatch.setattr(CudaDevice, "unavailable", lambda self: "no GPU here")
    assert FA2.unavailable() == "no GPU here"
    assert kernel("kernels-community/flash-attn2", "npu").unavailable() is not None


OF_8 = "head sizes must be multiples of 8 in fp16"
UP_TO = "head sizes up to 256"
PAIRS = "values of another size than keys only for head sizes up to 64×512, or of 136–192×104–128"
LOST = "a window of more than seqlen_k keys to both sides, which the library drops"
EACH = (FA2, FA3, FA4)


@pytest.mark.parametrize(
    ("backend", "case", "reason"),
    [
        *((backend, problem(direction="bwd"), "forward only") for backend in EACH),
        *((backend, problem(dtype="fp32"), "fp16 and bf16 only") for backend in EACH),
        *((backend, problem(head_dim=264), UP_TO) for backend in EACH),
        (FA2, problem(head_dim=20), None),
        *((backend, problem(head_dim=20), OF_8) for backend in (FA3, FA4)),
        *((backend, problem(9, 8, causal=True, heads_q=4, heads_kv=2, window=3), None) for backend in EACH),
        (FA2, problem(80, 40, window=60), LOST),
        *((backend, problem(80, 40, window=60), None) for backend in (FA3, FA4)),
        (FA2, problem(head_dim=192, head_dim_v=128), "one head size for q, k and v"),
        (FA3, problem(head_dim=192, head_dim_v=128), None),
        (FA3, problem(head_dim=64, head_dim_v=256), None),
        (FA3, problem(head_dim=64, head_dim_v=512), None),
        (FA3, problem(head_dim=128, head_dim_v=64), PAIRS),
        (FA4, problem(head_dim=128, head_dim_v=64), None),
        (FA4, problem(head_dim=96, head_dim_v=256), "values of up to 192 for head sizes up to 96"),
    ],
    ids=lambda x: getattr(x, "case_id", None) or getattr(x, "name", None),
)
def test_what_is_refused_has_its_reason(backend: HubKernel, case: Problem, reason: str | None) -> None:
    assert backend.unsupported(case) == reason


# --- what is called ---------------------------------------------------------------------------------------------------

SHAPES = (
    problem(),
    problem(48, 48, "bf16", batch=2, heads_q=3, causal=True),
    problem(40, 56, causal=True, heads_q=4, heads_kv=2, softmax_scale=0.3),
    problem(40, 56, "bf16", window=7, batch=2),
    problem(56, 40, causal=True, window=50),
    problem(56, 40, "bf16", causal=True),
)


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("case", SHAPES, ids=lambda p: p.case_id)
@pytest.mark.parametrize("name", ["flash-attn", "flash-attn2", "vllm-flash-attn3", "flash-attn4"])
def test_a_cached_kernel_is_asked_for_the_right_thing(cache: Callable[..., Path], name: str, case: Problem) -> None:
    cache(f"kernels-community/{name}")
    backend = kernel(f"kernels-community/{name}")
    assert backend.unsupported(case) is None
    inputs = make_inputs(case, 0)
    call = backend.prepare(case, inputs.q, inputs.k, inputs.v)
    assert Reference.of(case, inputs, 0).judge(call()).fault == ""
    others = make_inputs(case, 1)
    for tensor in "qkv":
        getattr(inputs, tensor).data.copy_(getattr(others, tensor))
    assert Reference.of(case, others, 0).judge(call()).fault == ""
    assert os.environ["HF_HUB_OFFLINE"] == "1"


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("name", "splits"), [("flash-attn2", [None]), ("flash-attn3", [0, 1, 2, 4, 8]), ("flash-attn4", [1, 1])]
)
def test_each_choice_of_it_is_tried_and_a_mask_that_is_causal_alone_is_no_window(
    cache: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, name: str, splits: list[int | None]
) -> None:
    """To flash-attn2 a window of (-1, 0) is one, with which it does not take a group's heads together for one query."""
    cache(f"kernels-community/{name}")
    case = problem(1, 1000, heads_q=4, heads_kv=2, causal=True)
    inputs = make_inputs(case, 0)
    tried: list[Callable[[], torch.Tensor]] = []
    loaded: list[Any] = []
    load = hf_kernels._load
    monkeypatch.setattr(hf_kernels, "_load", lambda *what: loaded.append(load(*what)) or loaded[-1])
    monkeypatch.setattr(flash_attn_family, "fastest", lambda calls: tried.extend(calls) or tried[0])
    monkeypatch.setattr(hf_kernels, "cores", lambda tensor: 132)
    kernel(f"kernels-community/{name}").prepare(case, inputs.q, inputs.k, inputs.v)
    reference = Reference.of(case, inputs, 0)
    assert [reference.judge(call()).fault for call in tried] == [""] * len(splits)
    none = (None, None) if name == "flash-attn4" else (-1, -1)
    assert loaded[0].asked == [(none, count) for count in splits]


@pytest.mark.usefixtures("package")
def test_a_kernel_without_the_function_is_an_error(cache: Callable[..., Path]) -> None:
    (cache("kernels-community/flash-attn2") / "__init__.py").write_text("def varlen(): ...\n")
    with pytest.raises(AttributeError, match="flash_attn_func"):
        kernel("kernels-community/flash-attn2").prepare(problem(), *torch.ones(3))
