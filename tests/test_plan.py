"""attnbench.plan: what a user's words choose, and what a miss is told."""

from __future__ import annotations

import dataclasses

import pytest

from attnbench import devices, plan
from attnbench.devices import DeviceInfo
from attnbench.devices.cpu import CpuDevice
from attnbench.errors import AttnbenchError
from attnbench.plan import BEST, Entry, Selection, choose_suite, closest, make, resolve_backends
from attnbench.problem import BUILTIN_SUITES, PTO, SMOKE, Problem, Suite
from attnbench.registry import BackendInfo, Catalogue, EntryPointRef, PluginInfo
from attnbench.result import Status

SOURCE = EntryPointRef("toy-dist", "1.0", "toys", "toys")
NO_TORCH_NPU = "torch_npu is not installed"


def backend(name, device="cpu", reason=None):
    return BackendInfo(name, device, "", "", reason is None, reason, SOURCE)


def broken(name, error="Traceback…\n  File x\nImportError: no module named sdk\n"):
    return PluginInfo(EntryPointRef("broken-dist", "0.1", name, name), (), (), 0.0, error)


SDPA = backend("sdpa")
GEMM = backend("gemm_ref")
JIT = backend("jit_flash")
JIT_CUDA = backend("jit_flash", "cuda", "no nvcc: install CUDA")
NPU_FUSED = backend("npu_fused_attention", "npu", NO_TORCH_NPU)
OLD = backend("old_kernel", reason="needs AVX-512")
LONG = Suite("long", (Problem(seqlen_q=1, seqlen_k=65536, dtype="bf16"),))

CATALOGUE = Catalogue(
    plugins=(broken("exotic"), broken("sdk_attention")),
    backends=(GEMM, JIT, JIT_CUDA, NPU_FUSED, SDPA, OLD),
    suites=(*BUILTIN_SUITES, LONG),
)


def error_of(function, *arguments):
    with pytest.raises(AttnbenchError) as caught:
        function(*arguments)
    return caught.value


def made(**words):
    return make(Selection(**({"device": "cpu", "suite": "smoke"} | words)), CATALOGUE)


def names(chosen):
    return [entry.name for entry in chosen.entries]


# Backends by name


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("sdpa", ["sdpa"]),
        ("sdpa,gemm_ref", ["sdpa", "gemm_ref"]),
        (" sdpa , gemm_ref ", ["sdpa", "gemm_ref"]),
        ("npu_fused", ["npu_fused_attention"]),
        ("n", ["npu_fused_attention"]),
        ("sdpa,sdpa,sdp", ["sdpa"]),
        ("jit", ["jit_flash"]),
    ],
)
def test_names_are_exact_or_unique_prefixes_each_once_in_the_order_given(text, found):
    assert resolve_backends(text, CATALOGUE) == found


def test_an_exact_name_wins_over_longer_ones():
    catalogue = dataclasses.replace(CATALOGUE, backends=(backend("flash"), backend("flash_v2")))
    assert resolve_backends("flash", catalogue) == ["flash"]


def test_an_ambiguous_prefix_names_what_it_could_be():
    error = error_of(resolve_backends, "s", CATALOGUE)
    assert error.message == "backend 's' could be sdk_attention, sdpa"
    assert error.hint == "write more of its name"
    assert error.exit_code == 2


def test_a_prefix_of_one_backend_of_the_device_is_unique_whatever_others_have():
    flashes = (backend("flash_a", "cuda"), backend("flash_b", "cuda"), backend("flash_c"))
    catalogue = dataclasses.replace(CATALOGUE, backends=(*flashes, SDPA))
    assert resolve_backends("fla,flash_a", catalogue, kind="cpu") == ["flash_c", "flash_a"]
    assert error_of(lambda: resolve_backends("fla", catalogue)).message == (
        "backend 'fla' could be flash_a, flash_b, flash_c"
    )
    assert error_of(lambda: resolve_backends("fla", catalogue, kind="cuda")).message == (
        "backend 'fla' could be flash_a, flash_b"
    )
    assert resolve_backends("sd", dataclasses.replace(catalogue, plugins=()), kind="cuda") == ["sdpa"]
    assert error_of(lambda: resolve_backends("s", catalogue, kind="cpu")).message == (
        "backend 's' could be sdk_attention, sdpa"
    ), "of which device a plugin is that failed to load nobody knows"
    smoke = Selection(device="cpu", suite="smoke")
    assert names(make(dataclasses.replace(smoke, backends="fla"), catalogue)) == ["flash_c"]
    assert names(make(dataclasses.replace(smoke, backends="sdpa", baseline="fla"), catalogue)) == ["flash_c", "sdpa"]
    assert names(make(dataclasses.replace(smoke, skip="fla"), catalogue)) == ["sdpa"]


@pytest.mark.parametrize(
    ("word", "nearest"),
    [("sdap", "sdpa"), ("gem_ref", "gemm_ref"), ("npu_fuzed", "npu_fused_attention"), ("SDPA", "sdpa")],
)
def test_a_miss_names_the_closest(word, nearest):
    error = error_of(resolve_backends, f"jit_flash,{word}", CATALOGUE)
    assert error.message == f"no backend is called {word!r}"
    assert error.hint == f"did you mean {nearest}?"
    assert error.exit_code == 2


@pytest.mark.parametrize(("word", "device"), [("cuda", "cuda"), ("CUDA", "cuda"), ("gpu", "cuda"), ("CPU", "cpu")])
def test_a_device_is_no_backend(word, device):
    error = error_of(resolve_backends, word, CATALOGUE)
    assert (error.message, error.hint) == (f"no backend is called {word!r}", f"to choose a device: --device {device}")


def test_a_miss_with_nothing_near_names_all():
    hint = error_of(resolve_backends, "zzz", CATALOGUE).hint
    assert hint == "there are exotic, gemm_ref, jit_flash, npu_fused_attention, old_kernel, sdk_attention, sdpa"
    assert closest("zzz", []) == "there are none"
    assert closest("flash_attn", ["jit_flash", "sdpa"]) == "there are jit_flash, sdpa", "half a name alone"


@pytest.mark.parametrize("word", ["exotic", "exo"])
def test_a_failed_plugin_asked_for_by_name_or_prefix_is_exit_code_4(word):
    error = error_of(resolve_backends, f"sdpa,{word}", CATALOGUE)
    assert error.message == "plugin exotic of broken-dist failed to load: ImportError: no module named sdk"
    assert "attnbench plugins" in str(error.hint)
    assert error.exit_code == 4


def test_a_failed_plugin_does_not_hide_a_backend_of_its_name():
    catalogue = dataclasses.replace(CATALOGUE, plugins=(broken("sdpa"),))
    assert resolve_backends("sdpa", catalogue) == ["sdpa"]
    chosen = make(Selection(device="cpu", skip="sdpa"), catalogue)
    assert "sdpa" not in names(chosen)


@pytest.mark.parametrize("text", ["", ",", "sdpa,", ",sdpa", "sdpa,,gemm_ref", " "])
def test_an_empty_name_is_told(text):
    error = error_of(resolve_backends, text, CATALOGUE)
    assert error.message == f"--backends has an empty name in {text!r}"
    assert error.hint


# What runs


def test_without_names_all_that_are_available_here_run():
    chosen = made()
    assert chosen.entries == (Entry("gemm_ref", GEMM), Entry("jit_flash", JIT), Entry("sdpa", SDPA))
    assert chosen.baseline is None


def test_names_keep_their_order_and_an_unavailable_one_gets_its_reason():
    chosen = made(backends="sdpa,old_kernel,gemm_ref")
    assert chosen.entries == (
        Entry("sdpa", SDPA),
        Entry("old_kernel", None, Status.UNAVAILABLE, "needs AVX-512"),
        Entry("gemm_ref", GEMM),
    )


def test_a_backend_of_another_device_gets_a_row_that_says_where_it_runs():
    entry = made(backends="npu_fused").entries[0]
    assert entry == Entry(
        "npu_fused_attention",
        None,
        Status.UNAVAILABLE,
        f"it runs on npu, and this run is on cpu (on npu: {NO_TORCH_NPU})",
    )


def test_skip_takes_names_out():
    assert names(made(skip="gemm")) == ["jit_flash", "sdpa"]
    assert names(made(backends="sdpa,jit_flash", skip="sdpa")) == ["jit_flash"]
    assert names(made(skip="npu_fused")) == ["gemm_ref", "jit_flash", "sdpa"]


def test_a_skip_that_is_no_name_is_told_with_its_option():
    assert error_of(lambda: made(skip="sdap")).hint == "did you mean sdpa?"
    assert error_of(lambda: made(skip="sdpa,")).message == "--skip has an empty name in 'sdpa,'"


def test_nothing_left_is_exit_code_3():
    error = error_of(lambda: made(backends="sdpa", skip="sdpa"))
    assert error.message == "no backend is left to run on cpu"
    assert "attnbench list" in str(error.hint)
    assert error.exit_code == 3


def test_a_baseline_adds_its_backend_first_and_takes_prefixes():
    chosen = made(backends="jit_flash", baseline="gemm")
    assert chosen.entries == (Entry("gemm_ref", GEMM), Entry("jit_flash", JIT))
    assert chosen.baseline == "gemm_ref"


def test_a_baseline_that_runs_anyway_changes_no_order():
    assert names(made(baseline="sdpa")) == ["gemm_ref", "jit_flash", "sdpa"]


def test_best_is_a_baseline_and_adds_nothing():
    chosen = made(backends="jit_flash", baseline=BEST)
    assert (names(chosen), chosen.baseline, chosen.timed_baseline) == (["jit_flash"], "best", None)
    assert made(backends="jit_flash").timed_baseline == "sdpa"


@pytest.mark.parametrize(
    ("baseline", "code", "words"),
    [
        ("sdap", 2, "no backend is called 'sdap'"),
        ("exotic", 4, "plugin exotic"),
        ("", 2, "--baseline has an empty name in ''"),
        ("sdpa,gemm_ref", 2, "--baseline takes one name, not 'sdpa,gemm_ref'"),
        ("old", 2, "the baseline old_kernel is not available: needs AVX-512"),
        (
            "npu_fused",
            2,
            f"npu_fused_attention is not available: it runs on npu, and this run is on cpu (on npu: {NO_TORCH_NPU}",
        ),
    ],
)
def test_a_baseline_that_is_none_is_told(baseline, code, words):
    error = error_of(lambda: made(baseline=baseline))
    assert words in error.message
    assert error.exit_code == code


def test_a_baseline_that_is_skipped_is_told():
    error = error_of(lambda: made(baseline="sdpa", skip="sdp"))
    assert (error.message, error.hint) == ("--skip leaves the baseline sdpa out", "leave out one of the two")
    assert error.exit_code == 2


def test_a_baseline_that_is_not_available_has_its_rows_where_it_is_among_the_backends():
    chosen = made(backends="sdpa,old_kernel", baseline="old_kernel")
    assert [(entry.name, entry.status) for entry in chosen.entries] == [
        ("sdpa", None),
        ("old_kernel", Status.UNAVAILABLE),
    ]


def test_a_misspelt_best_is_found():
    error = error_of(lambda: made(baseline="bset"))
    assert (error.message, error.hint) == ("no backend is called 'bset'", "did you mean best?")


# Devices


class Fake:
    """A device that is there or not."""

    def __init__(self, kind, reason=None):
        self.kind, self.reason = kind, reason

    def unavailable(self):
        return self.reason

    def info(self):
        return DeviceInfo(kind=self.kind, name=f"a fine {self.kind}", cores=4)


def machine(monkeypatch, **reasons):
    """This machine has all devices but those with a reason."""
    monkeypatch.setattr(devices, "device", lambda kind: Fake(kind, reasons.get(kind)))


@pytest.mark.parametrize(
    ("missing", "kind"), [((), "npu"), (("npu",), "cuda"), (("cuda",), "npu"), (("npu", "cuda"), "cpu")]
)
def test_auto_is_npu_else_cuda_else_cpu_and_sets_the_dtype(monkeypatch, missing, kind):
    machine(monkeypatch, **dict.fromkeys(missing, "not there"))
    chosen = make(Selection(backends="sdpa", suite="smoke"), CATALOGUE)
    assert chosen.device.kind == kind
    assert chosen.info == DeviceInfo(kind=kind, name=f"a fine {kind}", cores=4)
    assert {p.dtype for p in chosen.suite} == {"fp32" if kind == "cpu" else "fp16"}


def test_an_unknown_device_is_told_the_known_ones():
    error = error_of(lambda: made(device="gpu"))
    assert error.message == "no device is called 'gpu'"
    assert error.hint == "choose auto, cpu, cuda, npu"
    assert error.exit_code == 2


def test_on_a_device_that_is_not_there_every_named_backend_is_unavailable(monkeypatch):
    machine(monkeypatch, cuda="torch sees no CUDA device")
    chosen = make(Selection(backends="jit_flash,sdpa", device="cuda", suite="smoke"), CATALOGUE)
    assert chosen.entries == (
        Entry("jit_flash", None, Status.UNAVAILABLE, "torch sees no CUDA device"),
        Entry("sdpa", None, Status.UNAVAILABLE, "it runs on cpu, and this run is on cuda"),
    )
    assert chosen.info == DeviceInfo(kind="cuda", name="cuda", cores=None)
    baseline = make(Selection(backends="sdpa", baseline="jit", device="cuda", suite="smoke"), CATALOGUE)
    assert baseline.entries == chosen.entries, "as the baseline is, which is to blame for nothing"


def test_on_a_device_that_is_not_there_nothing_runs_by_itself(monkeypatch):
    machine(monkeypatch, cuda="torch sees no CUDA device")
    assert error_of(lambda: made(device="cuda")).exit_code == 3


def test_the_real_cpu_is_chosen_by_name():
    chosen = made(device="cpu")
    assert isinstance(chosen.device, CpuDevice)
    assert chosen.info == CpuDevice().info()


# Suites


def suite(**words):
    return list(choose_suite(Selection(**words), CATALOGUE))


def test_pto_is_the_default_and_names_reach_plugin_suites():
    assert suite() == list(PTO)
    assert suite(suite="smoke") == list(SMOKE)
    assert suite(suite="long") == list(LONG)


def test_a_suite_that_is_not_there_names_the_closest():
    error = error_of(lambda: suite(suite="pot"))
    assert error.message == "no suite is called 'pot'"
    assert error.hint == "did you mean pto? (or give a file.toml)"


def test_a_toml_file_is_a_suite(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("[[problems]]\nseqlen_q = 3\nseqlen_k = [4, 5]\n")
    assert suite(suite=str(path)) == [Problem(seqlen_q=3, seqlen_k=4), Problem(seqlen_q=3, seqlen_k=5)]


def test_shapes_make_a_cross_product_and_the_rest_is_ptos():
    assert suite(seqlen_q="128,1k", seqlen_k="8K") == [
        Problem(seqlen_q=128, seqlen_k=8192),
        Problem(seqlen_q=1024, seqlen_k=8192),
    ]
    assert suite(head_dim="128") == list(PTO)
    assert suite(batch="2") == [dataclasses.replace(p, batch=2) for p in PTO]
    assert [
        p.case_id for p in suite(batch="1,2", heads="8,32x8", head_dim="64,192x128", seqlen_q="1", seqlen_k="2")
    ] == [f"b{b}-h{h}-q1-k2-d{d}-auto" for b in (1, 2) for h in ("8", "32x8") for d in ("64", "192x128")]


def test_a_shape_given_twice_is_one_problem():
    assert suite(seqlen_q="1024,1k,1024", seqlen_k="1") == [Problem(seqlen_q=1024, seqlen_k=1)]


def test_pairs_are_query_heads_by_key_heads_and_head_size_by_that_of_v():
    (problem,) = suite(heads="32x8", head_dim="192x128", seqlen_q="1", seqlen_k="1")
    assert (problem.heads_q, problem.heads_kv, problem.head_dim, problem.head_dim_v) == (32, 8, 192, 128)
    (problem,) = suite(heads="4", head_dim="64", seqlen_q="1", seqlen_k="1")
    assert (problem.heads_q, problem.heads_kv, problem.head_dim, problem.head_dim_v) == (4, 4, 64, 64)


@pytest.mark.parametrize("option", ["seqlen_q", "seqlen_k", "head_dim", "batch", "heads"])
def test_a_shape_and_a_suite_exclude_each_other(option):
    error = error_of(lambda: suite(suite="pto", **{option: "8"}))
    assert error.message == f"--{option.replace('_', '-')} and --suite exclude each other"
    assert error.exit_code == 2


@pytest.mark.parametrize("option", ["seqlen_q", "seqlen_k", "head_dim", "batch", "heads"])
@pytest.mark.parametrize(
    "junk",
    [
        "0",
        "-1",
        "x",
        "1.5",
        "1e3",
        "+8",
        "0x10",
        "0k",
        "k",
        "1m",
        "1kk",
        "1 k",
        "１２８",
        "٣",
        "²",
        "1_000",
        "9" * 12,
        "9" * 5000,
    ],
)
def test_a_length_that_is_none_is_told_with_its_option(option, junk):
    error = error_of(lambda: suite(**{option: f"8,{junk}"}))
    assert error.message.startswith(f"--{option.replace('_', '-')} must be whole numbers of at least 1, not ")
    assert error.hint == "for example 128,1k"
    assert error.exit_code == 2


@pytest.mark.parametrize("option", ["seqlen_q", "seqlen_k", "head_dim", "batch", "heads"])
@pytest.mark.parametrize("text", ["", " ", ",", "1,,2", "1,"])
def test_an_empty_length_is_told_with_its_option(option, text):
    error = error_of(lambda: suite(**{option: text}))
    assert error.message == f"--{option.replace('_', '-')} has an empty name in {text!r}"
    assert error.exit_code == 2


@pytest.mark.parametrize("option", ["heads", "head_dim"])
@pytest.mark.parametrize("pair", ["32x", "x8", "32x8x2", "32x0", "x", "32X8"])
def test_a_pair_that_is_none_is_told_with_its_option(option, pair):
    error = error_of(lambda: suite(**{option: pair}))
    assert error.message.startswith(f"--{option.replace('_', '-')} must be whole numbers")


def test_heads_that_do_not_divide_are_told():
    assert "heads_kv must divide heads_q" in error_of(lambda: suite(heads="32x5")).message


def test_dtypes_and_causal_cross_whatever_suite_there_is():
    assert suite(suite="smoke", dtype="fp16,bf16") == [
        dataclasses.replace(p, dtype=d) for d in ("fp16", "bf16") for p in SMOKE
    ]
    found = suite(seqlen_q="4", seqlen_k="4,8", dtype="fp16,auto", causal="false,true")
    assert [(p.causal, p.dtype, p.seqlen_k) for p in found] == [
        (c, d, k) for c in (False, True) for d in ("fp16", "auto") for k in (4, 8)
    ]


def test_causal_words_are_true_and_false_in_any_case_and_count_once():
    problem = Problem(seqlen_q=4, seqlen_k=4)
    shape = {"seqlen_q": "4", "seqlen_k": "4"}
    assert suite(**shape, causal="True") == [dataclasses.replace(problem, causal=True)]
    assert suite(**shape, causal="FALSE, false") == [problem]
    for word in ("yes", "1", "tru"):
        error = error_of(lambda word=word: suite(**shape, causal=word))
        assert error.message == f"no --causal value is called {word!r}"


def test_a_dtype_that_is_none_names_the_closest():
    error = error_of(lambda: suite(dtype="fp16,pf32"))
    assert error.message == "no dtype is called 'pf32'"
    assert error.hint == "did you mean fp32?"
    assert error_of(lambda: suite(dtype="")).message == "--dtype has an empty name in ''"


def test_a_plan_holds_no_auto_and_no_problem_twice():
    chosen = made(dtype="auto,fp32")
    assert list(chosen.suite) == [p.resolve("cpu") for p in SMOKE]
    assert plan.DEFAULT_SUITE == "pto"
