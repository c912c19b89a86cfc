"""attnbench.registry and hookspecs: what loads, what is refused and why, and that one failure spoils nothing else."""

from __future__ import annotations

import inspect
import sys

import pytest
from helpers import PluginFolder

from attnbench import hookspecs, plan, registry
from attnbench.errors import AttnbenchError, ExitCode
from attnbench.registry import Catalogue, PluginInfo, discover

BUILT_IN = ["gemm_ref", "jit_flash", "npu_fused_attention", "sdpa"]
HOOK = "@attnbench.hookimpl\ndef attnbench_backends():\n"


def plugin(catalogue: Catalogue, name: str = "toy", distribution: str = "toy-dist") -> PluginInfo:
    return next(p for p in catalogue.plugins if (p.source.name, p.source.distribution) == (name, distribution))


def keys(catalogue: Catalogue) -> list[tuple[str, str]]:
    return [(b.name, b.device) for b in catalogue.backends]


@pytest.fixture(scope="module")
def built_in() -> Catalogue:
    return discover()


def test_the_hooks_are_exactly_these_and_take_no_argument() -> None:
    hooks = [f for name, f in vars(hookspecs).items() if name.startswith("attnbench_")]
    assert [f.__name__ for f in hooks] == ["attnbench_backends", "attnbench_suites"]
    assert all(not inspect.signature(f).parameters and f.__doc__ for f in hooks)
    assert not any(vars(f)["attnbench_spec"]["firstresult"] for f in hooks)


def test_built_in_plugins_load_in_order_with_their_backends(built_in: Catalogue) -> None:
    own = [p for p in built_in.plugins if p.source.distribution == "attnbench"]
    assert [p.source.name for p in own] == BUILT_IN
    assert [p.error for p in own] == [None] * 4
    assert plugin(built_in, "gemm_ref", "attnbench").backends == ("gemm_ref",)
    assert {k for k in keys(built_in) if k[0] == "gemm_ref"} == {("gemm_ref", d) for d in ("cpu", "cuda", "npu")}
    assert {("sdpa", "cpu"), ("sdpa", "cuda"), ("jit_flash", "cpu"), ("npu_fused_attention", "npu")} <= set(
        keys(built_in)
    )


def test_a_good_plugin_is_described_in_full(plugins: PluginFolder) -> None:
    module = plugins.add(
        """
        class Described(Toy):
            summary, homepage = "a toy", "https://example.org"
            def unavailable(self): return "no toy here: buy one"

        @attnbench.hookimpl
        def attnbench_backends():
            yield Described("toy_one")
            yield Toy("toy_two")
        """
    )
    catalogue = discover()
    info = plugin(catalogue)
    assert (info.backends, info.suites, info.error, info.error_line) == (("toy_one", "toy_two"), (), None, "")
    assert (info.source.version, info.source.value) == ("1.5", module)
    one, two = catalogue.find("toy_one", "cpu"), catalogue.find("toy_two", "cpu")
    assert one is not None
    assert two is not None
    assert (one.summary, one.homepage, one.available, one.reason) == (
        "a toy",
        "https://example.org",
        False,
        "no toy here: buy one",
    )
    assert (two.summary, two.homepage, two.available, two.reason) == ("", "", True, None)
    assert catalogue.find("toy_one", "cuda") is None
    assert keys(catalogue)[-2:] == [("toy_one", "cpu"), ("toy_two", "cpu")], "other distributions come last"


def test_load_gives_the_very_backend_described(plugins: PluginFolder) -> None:
    module = plugins.backends('[Toy("toy_a"), Toy("toy_a", "npu"), Toy("toy_b")]')
    catalogue = discover()
    for name, device in (("toy_a", "cpu"), ("toy_a", "npu"), ("toy_b", "cpu")):
        info = catalogue.find(name, device)
        assert info is not None
        backend = registry.load(info)
        assert type(backend) is sys.modules[module].Toy
        assert (backend.name, backend.device) == (name, device)


FAULTS = {
    "import error": ("import no_such_sdk_at_all", "ModuleNotFoundError: No module named 'no_such_sdk_at_all'"),
    "syntax error": ("def broken(:", "SyntaxError"),
    "exit at import": ("raise SystemExit(7)", "SystemExit: 7"),
    "exit in the hook": (HOOK + "    raise SystemExit('bye')", "SystemExit: bye"),
    "misspelt hook": ("@attnbench.hookimpl\ndef attnbench_backend():\n    return []", "attnbench_backend'"),
    "a hook that takes an argument": (
        "@attnbench.hookimpl\ndef attnbench_backends(config):\n    return []",
        "attnbench_backends",
    ),
    "no hook": ("def attnbench_backends():\n    return [Toy('toy')]", "@attnbench.hookimpl"),
    "no list": (HOOK + "    return 5", "returned 5, not a list"),
    "one backend without a list": (HOOK + "    return Toy('toy')", "not a list"),
    "text for a list": (HOOK + "    return 'toy'", "returned 'toy', not a list"),
    "a generator that raises": (HOOK + "    yield Toy('toy')\n    raise ValueError('half-way')", "half-way"),
    "a bad name": (HOOK + "    return [Toy('toy'), Toy('Toy-2')]", "'Toy-2' does not"),
    "no name": (HOOK + "    return [Toy('toy'), object()]", "object is no backend: name must match"),
    "a bad device": (HOOK + "    return [Toy('toy', 'tpu')]", "device must be one of cpu, cuda, npu, not 'tpu'"),
    "an unhashable device": (HOOK + "    return [Toy('toy', ['cpu'])]", "not ['cpu']"),
    "no prepare": (HOOK + "    Toy.prepare = None\n    return [Toy('toy')]", "it has no method prepare()"),
    "no unsupported": (HOOK + "    del Toy.unsupported\n    return [Toy('toy')]", "no method unsupported()"),
    "a summary that is no text": (HOOK + "    Toy.summary = 5\n    return [Toy('toy')]", "summary must be text"),
    "parallel_units that is no method": (
        HOOK + "    Toy.parallel_units = 5\n    return [Toy('toy')]",
        "parallel_units must be a method",
    ),
    "unavailable() raises": (
        HOOK + "    Toy.unavailable = lambda self: 1 / 0\n    return [Toy('toy')]",
        "ZeroDivisionError: division by zero",
    ),
    "unavailable() gives an empty reason": (
        HOOK + "    Toy.unavailable = lambda self: ''\n    return [Toy('toy')]",
        "toy.unavailable() returned '', neither a reason nor None",
    ),
    "unavailable() gives a bool": (
        HOOK + "    Toy.unavailable = lambda self: False\n    return [Toy('toy')]",
        "returned False",
    ),
    "the same backend twice": (HOOK + "    return [Toy('toy'), Toy('toy')]", "backend toy on cpu is there already"),
    "a clash with a built-in": (
        HOOK + "    return [Toy('toy'), Toy('sdpa')]",
        "backend sdpa on cpu is there already",
    ),
    "a suite that is none": (
        HOOK + "    return [Toy('toy')]\n\n@attnbench.hookimpl\ndef attnbench_suites():\n    return ['pto']",
        "attnbench_suites() returned 'pto', not a Suite",
    ),
    "a suite that exists": (
        HOOK
        + "    return [Toy('toy')]\n\n@attnbench.hookimpl\ndef attnbench_suites():\n"
        + "    return [attnbench.Suite('toys', (attnbench.Problem(seqlen_q=1, seqlen_k=1),)),"
        + " attnbench.Suite('pto', (attnbench.Problem(seqlen_q=1, seqlen_k=1),))]",
        "suite pto is there already",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_plugin_is_named_leaves_nothing_and_the_rest_load(
    fault: str, plugins: PluginFolder, built_in: Catalogue
) -> None:
    body, words = FAULTS[fault]
    plugins.add(body, entry="bad", distribution="a-bad-dist")
    plugins.backends('[Toy("good")]', entry="good", distribution="z-good-dist")
    catalogue = discover()
    info = plugin(catalogue, "bad", "a-bad-dist")
    assert info.error is not None
    assert words in info.error
    assert info.error_line
    assert "\n" not in info.error_line
    assert (info.backends, info.suites) == ((), ())
    assert catalogue.failures == (info,)
    assert keys(catalogue) == [*keys(built_in), ("good", "cpu")]
    assert catalogue.suites == built_in.suites
    for info_before in built_in.backends:
        assert catalogue.find(info_before.name, info_before.device) == info_before


def test_a_failure_fails_again_when_loaded_again(plugins: PluginFolder) -> None:
    """Nothing half-registered is left that a second look would take for loaded."""
    plugins.add("@attnbench.hookimpl\ndef attnbench_backend():\n    return []")
    assert plugin(discover()).error == plugin(discover()).error != None  # noqa: E711


@pytest.mark.parametrize(
    "body",
    [
        "raise RuntimeError('mine')  # my own line",
        HOOK + "    raise RuntimeError('mine')  # my own line",
        HOOK + "    yield Toy('toy')\n    raise RuntimeError('mine')  # my own line",
        "def sdk(n):\n    if not n:\n        raise RuntimeError('deep')\n    sdk(n - 1)\n\nsdk(20)  # my own line",
    ],
    ids=["at import", "in the hook", "in a generator", "deep in a library"],
)
def test_the_traceback_shows_the_plugins_own_line(body: str, plugins: PluginFolder) -> None:
    module = plugins.add(body)
    info = plugin(discover())
    assert info.error is not None
    assert info.error.startswith("Traceback")
    assert "# my own line" in info.error
    assert f"{module}.py" in info.error
    assert info.error_line.startswith("RuntimeError: ")


def test_keyboard_interrupt_is_not_swallowed(plugins: PluginFolder) -> None:
    plugins.add("raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        discover()


@pytest.mark.parametrize("swap", [False, True])
def test_of_two_distributions_that_clash_the_first_by_name_wins(
    swap: bool, plugins: PluginFolder, tmp_path, monkeypatch
) -> None:
    other = PluginFolder(tmp_path / "other")
    other.path.mkdir()
    if swap:
        monkeypatch.syspath_prepend(str(other.path))
    else:
        monkeypatch.setattr(sys, "path", [*sys.path, str(other.path)])
    # The entry points' own names would sort the other way.
    plugins.backends('[Toy("shared"), Toy("only_beta")]', entry="a", distribution="beta")
    other.backends('[Toy("shared")]', entry="b", distribution="alpha")
    catalogue = discover()
    shared = catalogue.find("shared", "cpu")
    assert shared is not None
    assert shared.source.distribution == "alpha"
    assert plugin(catalogue, "a", "beta").error == "backend shared on cpu is there already"
    assert catalogue.find("only_beta", "cpu") is None


def test_a_built_in_wins_over_a_distribution_whose_name_sorts_first(plugins: PluginFolder) -> None:
    plugins.backends('[Toy("gemm_ref")]', entry="aaa", distribution="aaa")
    catalogue = discover()
    found = catalogue.find("gemm_ref", "cpu")
    assert found is not None
    assert found.source.distribution == "attnbench"
    assert [p.source.distribution for p in catalogue.failures] == ["aaa"]


def test_the_same_name_on_another_device_is_no_clash(plugins: PluginFolder) -> None:
    plugins.backends('[Toy("sdpa", "npu"), Toy("npu_fused_attention", "cpu")]')
    catalogue = discover()
    assert catalogue.failures == ()
    assert plugin(catalogue).backends == ("sdpa", "npu_fused_attention")
    assert {("sdpa", "npu"), ("npu_fused_attention", "cpu")} <= set(keys(catalogue))


def test_two_distributions_with_the_same_entry_point_name_both_load(plugins: PluginFolder) -> None:
    plugins.backends('[Toy("first")]', entry="same", distribution="dist-one")
    plugins.backends('[Toy("second")]', entry="same", distribution="dist-two")
    catalogue = discover()
    assert plugin(catalogue, "same", "dist-one").backends == ("first",)
    assert plugin(catalogue, "same", "dist-two").backends == ("second",)


SUITE_HOOK = """
@attnbench.hookimpl
def attnbench_suites():
    return [attnbench.Suite({name!r}, [attnbench.Problem(seqlen_q=3, seqlen_k=5)])]
"""


def test_a_suite_plugin_needs_no_backend_and_its_suite_can_be_chosen(plugins: PluginFolder) -> None:
    plugins.add(SUITE_HOOK.format(name="toys"))
    catalogue = discover()
    assert (plugin(catalogue).backends, plugin(catalogue).suites, plugin(catalogue).error) == ((), ("toys",), None)
    suite = plan.choose_suite(plan.Selection(suite="toys"), catalogue)
    assert [(p.seqlen_q, p.seqlen_k) for p in suite] == [(3, 5)]


def test_suites_of_two_distributions_that_clash_are_not_mixed(plugins: PluginFolder) -> None:
    plugins.add(SUITE_HOOK.format(name="toys"), distribution="one")
    plugins.add(SUITE_HOOK.format(name="toys"), distribution="two")
    catalogue = discover()
    assert [s.name for s in catalogue.suites] == ["pto", "smoke", "toys"]
    assert [(p.source.distribution, p.error) for p in catalogue.failures] == [("two", "suite toys is there already")]


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ("toy", ["toy"]),
        ("sdpa, toy ,", ["sdpa", "toy"]),
        ("gemm_ref,nothing_like_it", ["gemm_ref"]),
        ("", []),
        (" , ", []),
        (None, [*BUILT_IN, "toy"]),
    ],
)
def test_attnbench_plugins_restricts_what_loads(
    value: str | None, names: list[str], plugins: PluginFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = plugins.backends('[Toy("toy")]')
    if value is not None:
        monkeypatch.setenv("ATTNBENCH_PLUGINS", value)
    catalogue = discover()
    assert [p.source.name for p in catalogue.plugins] == names
    assert (module in sys.modules) == ("toy" in names), "what is not wanted is not even imported"
    assert [s.name for s in catalogue.suites] == ["pto", "smoke"]


def test_without_removes_entry_points_by_name(plugins: PluginFolder) -> None:
    module = plugins.add("raise RuntimeError('imported')", entry="noisy")
    catalogue = discover(without={"noisy", "sdpa"})
    assert [p.source.name for p in catalogue.plugins] == ["gemm_ref", "jit_flash", "npu_fused_attention"]
    assert module not in sys.modules
    assert catalogue.find("sdpa", "cpu") is None


def test_asking_for_a_failed_plugin_is_exit_4_and_by_prefix_too(plugins: PluginFolder) -> None:
    plugins.add("raise RuntimeError('no licence')", entry="broken_one")
    catalogue = discover()
    for word in ("broken_one", "broken"):
        with pytest.raises(AttnbenchError) as caught:
            plan.resolve_backends(word, catalogue)
        assert caught.value.exit_code == ExitCode.PLUGIN_FAILED == 4
        assert "broken_one of toy-dist failed to load: RuntimeError: no licence" in caught.value.message
    assert plan.resolve_backends("sdpa", catalogue) == ["sdpa"]
