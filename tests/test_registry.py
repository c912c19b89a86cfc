"""attnbench.registry and hookspecs: what loads, what is refused and why, what clashes, and that nothing else is spoilt.

Discovery's processes are test_discovery.py's; most tests here leave attnbench's own plugins out, which import torch.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import os
import re
import sys
from collections.abc import Callable
from typing import Any

import pluggy
import pytest
from helpers import BUILT_IN, PluginFolder

from attnbench import hookspecs, plan, registry
from attnbench.discovery import discover
from attnbench.errors import AttnbenchError, ExitCode
from attnbench.problem import BUILTIN_SUITES, Problem, Suite
from attnbench.registry import BackendInfo, Catalogue, Description, EntryPointRef, PluginInfo

HOOK = "@attnbench.hookimpl\ndef attnbench_backends():\n"


def plugin(catalogue: Catalogue, name: str = "toy", distribution: str = "toy-dist") -> PluginInfo:
    return next(p for p in catalogue.plugins if (p.source.name, p.source.distribution) == (name, distribution))


def keys(catalogue: Catalogue) -> list[tuple[str, str]]:
    return [(b.name, b.device) for b in catalogue.backends]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No entry point but those that tests install under these names."""
    monkeypatch.setenv("ATTNBENCH_PLUGINS", "toy,a,b,same,broken_one")


@pytest.fixture(scope="module")
def built_in() -> Catalogue:
    return discover()


def test_the_hooks_are_exactly_these_and_take_no_argument() -> None:
    hooks = [f for name, f in vars(hookspecs).items() if name.startswith("attnbench_")]
    assert [f.__name__ for f in hooks] == ["attnbench_backends", "attnbench_suites"]
    assert all(not inspect.signature(f).parameters and f.__doc__ for f in hooks)
    assert not any(vars(f)["attnbench_spec"]["firstresult"] for f in hooks)


def test_a_hook_that_gains_an_argument_still_calls_plugins_that_do_not_take_it(plugins: PluginFolder) -> None:
    """What docs/plugins.md promises of later versions, by how pluggy calls."""

    class Later:
        @hookspecs.hookspec
        def attnbench_backends(self, devices: list[str]) -> list[object]:  # type: ignore[empty-body]
            """As it may be one day."""

    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(Later)
    module = importlib.import_module(plugins.backends('[Toy("toy")]'))
    manager.register(module)
    (found,) = manager.hook.attnbench_backends(devices=["cpu"])
    assert [backend.name for backend in found] == ["toy"]


def test_a_plugin_for_this_version_and_a_later_one_is_no_failure(plugins: PluginFolder) -> None:
    plugins.backends('[Toy("toy")]')
    (file,) = plugins.path.glob("*.dist-info/entry_points.txt")
    file.write_text(f"{file.read_text()}[attnbench.backends.v2]\ntoy = nowhere\n")
    found = [p for p in discover().plugins if p.source.name == "toy"]
    assert [(p.error, p.source.group) for p in found] == [(None, "attnbench.backends")]


def test_built_in_plugins_load_in_order_with_their_backends(built_in: Catalogue) -> None:
    own = [p for p in built_in.plugins if p.source.distribution == "attnbench"]
    assert [p.source.name for p in own] == BUILT_IN
    assert [p.error for p in own] == [None] * len(BUILT_IN)
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
    assert info.load_s > 0
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


@pytest.mark.usefixtures("alone")
def test_load_gives_the_very_backend_described(plugins: PluginFolder) -> None:
    module = plugins.backends('[Toy("toy_a"), Toy("toy_a", "npu"), Toy("toy_b")]')
    catalogue = discover()
    for name, device in (("toy_a", "cpu"), ("toy_a", "npu"), ("toy_b", "cpu")):
        info = catalogue.find(name, device)
        assert info is not None
        backend = registry.load(info)
        assert type(backend) is sys.modules[module].Toy
        assert (backend.name, backend.device) == (name, device)
        assert registry.load(info) is backend, "loaded once"


def test_a_backend_that_its_plugin_brings_no_more_is_named(plugins: PluginFolder) -> None:
    source = EntryPointRef("d", "1", "toy", plugins.backends('[Toy("toy")]'))
    with pytest.raises(registry.PluginError, match=r"brings no toy on npu any more"):
        registry.load(BackendInfo("toy", "npu", "", "", True, None, source))


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
    "libraries that are a list": (
        HOOK + "    Toy.libraries = ['pluggy']\n    return [Toy('toy')]",
        "libraries must map names of distributions to versions, both as text",
    ),
    "a library's version that is no text": (
        HOOK + "    Toy.libraries = {'pluggy': 1.7}\n    return [Toy('toy')]",
        "libraries must map names of distributions to versions, both as text",
    ),
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


@pytest.fixture(scope="module")
def with_faults(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    """One discovery of all faulty plugins, with one that sorts before them and one after."""
    folder = PluginFolder(tmp_path_factory.mktemp("faults"))
    folder.backends('[Toy("early")]', entry="early", distribution="a-good-dist")
    for index, (body, _) in enumerate(FAULTS.values()):
        folder.add(body, entry="bad", distribution=f"bad-{index:02}")
    folder.backends('[Toy("good")]', entry="good", distribution="z-good-dist")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder.path))
        return discover()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_plugin_is_named_with_its_fault_and_brings_nothing(fault: str, with_faults: Catalogue) -> None:
    info = plugin(with_faults, "bad", f"bad-{list(FAULTS).index(fault):02}")
    assert info.error is not None
    assert FAULTS[fault][1] in info.error
    assert info.error_line
    assert "\n" not in info.error_line
    assert (info.backends, info.suites) == ((), ())


def test_faulty_plugins_leave_nothing_and_the_rest_load(with_faults: Catalogue, built_in: Catalogue) -> None:
    assert [p.source.distribution for p in with_faults.failures] == [f"bad-{i:02}" for i in range(len(FAULTS))]
    assert keys(with_faults) == [*keys(built_in), ("early", "cpu"), ("good", "cpu")]
    assert with_faults.suites == built_in.suites == BUILTIN_SUITES
    assert with_faults.backends[: len(built_in.backends)] == built_in.backends


def test_a_failure_fails_again_when_loaded_again(plugins: PluginFolder) -> None:
    """Nothing half-registered is left that a second look would take for loaded."""
    source = EntryPointRef("d", "1", "toy", plugins.add("@attnbench.hookimpl\ndef attnbench_backend():\n    return []"))
    first, second = registry.describe(source), registry.describe(source)
    assert first.error == second.error
    assert "attnbench_backend'" in str(first.error)


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
@pytest.mark.usefixtures("alone")
def test_the_traceback_shows_the_plugins_own_line(body: str, plugins: PluginFolder) -> None:
    module = plugins.add(body)
    info = plugin(discover())
    assert info.error is not None
    assert info.error.startswith("Traceback")
    assert "# my own line" in info.error
    assert f"{module}.py" in info.error
    assert info.error_line.startswith("RuntimeError: ")


def test_what_was_called_of_a_plugin_is_told_with_what_it_gave(plugins: PluginFolder) -> None:
    module = plugins.add(
        """
        class Picky(Toy):
            def unavailable(self):
                if self.name == "worse":
                    raise OSError("no device")
                return "no toy here" if self.name == "bad" else None

        @attnbench.hookimpl
        def attnbench_backends():
            return [Picky("good"), Picky("bad")]
        """,
        entry="one",
    )
    broken = plugins.add(HOOK + "    raise RuntimeError('mine')", entry="two")
    one, two = (plugin(discover(), name) for name in ("one", "two"))
    times = r" \(\d+\.\d ms\)$"
    assert [re.sub(times, "", call) for call in one.calls] == [
        f"import {module}",
        "attnbench_backends() → [good on cpu, bad on cpu]",
        "good on cpu: unavailable() → None",
        "bad on cpu: unavailable() → 'no toy here'",
    ]
    assert [re.sub(times, "", call) for call in two.calls] == [
        f"import {broken}",
        "attnbench_backends() → raised RuntimeError",
    ]


@pytest.mark.parametrize("group", ["attnbench.backends.v2", "attnbench.backends2", "attnbench.backends_v2"])
def test_a_plugin_for_a_later_contract_is_reported_and_not_imported(group: str, plugins: PluginFolder) -> None:
    plugins.backends('[Toy("toy")]')
    info = plugins.path / "later-3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: later\nVersion: 3\n")
    (info / "entry_points.txt").write_text(f"[{group}]\nlater = this_is_nowhere\n[attnbench.suites]\nx = nowhere\n")
    catalogue = discover()
    assert plugin(catalogue, "toy").error is None
    (failure,) = catalogue.failures
    assert (failure.source.name, failure.source.distribution, failure.source.group) == ("later", "later", group)
    assert f"it is for {group}, which this attnbench does not know: pip install -U attnbench" in str(failure.error)


def test_a_plugins_own_keyboard_interrupt_is_its_failure(plugins: PluginFolder) -> None:
    error = registry.describe(EntryPointRef("d", "1", "toy", plugins.add("raise KeyboardInterrupt"))).error
    assert str(error).splitlines()[-1] == "KeyboardInterrupt"


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("swap", [False, True])
def test_of_two_distributions_that_clash_the_first_by_name_wins(
    swap: bool, plugins: PluginFolder, tmp_path, monkeypatch
) -> None:
    other = PluginFolder(tmp_path / "other")
    other.path.mkdir()
    folders = [str(other.path), str(plugins.path)] if swap else [str(plugins.path), str(other.path)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(folders))
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


@pytest.mark.usefixtures("alone")
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


@pytest.mark.usefixtures("alone")
def test_a_suite_plugin_needs_no_backend_and_its_suite_can_be_chosen(plugins: PluginFolder) -> None:
    plugins.add(SUITE_HOOK.format(name="toys"))
    catalogue = discover()
    assert (plugin(catalogue).backends, plugin(catalogue).suites, plugin(catalogue).error) == ((), ("toys",), None)
    suite = plan.choose_suite(plan.Selection(suite="toys"), catalogue)
    assert [(p.seqlen_q, p.seqlen_k) for p in suite] == [(3, 5)]


@pytest.mark.usefixtures("alone")
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
    mark = plugins.path / "imported"
    plugins.add(f"open({str(mark)!r}, 'w')\n{HOOK}    return [Toy('toy')]")
    if value is not None:
        monkeypatch.setenv("ATTNBENCH_PLUGINS", value)
    catalogue = discover()
    assert [p.source.name for p in catalogue.plugins] == names
    assert mark.exists() == ("toy" in names), "what is not wanted is not even imported"
    assert [s.name for s in catalogue.suites] == ["pto", "smoke"]


def test_without_removes_entry_points_by_name(plugins: PluginFolder) -> None:
    mark = plugins.path / "imported"
    plugins.add(f"open({str(mark)!r}, 'w')", entry="noisy")
    catalogue = discover(without={"noisy", "sdpa"})
    assert [p.source.name for p in catalogue.plugins] == [name for name in BUILT_IN if name != "sdpa"]
    assert not mark.exists()
    assert catalogue.find("sdpa", "cpu") is None


@pytest.mark.usefixtures("alone")
def test_asking_for_a_failed_plugin_is_exit_4_and_by_prefix_too(plugins: PluginFolder) -> None:
    plugins.add("raise RuntimeError('no licence')", entry="broken_one")
    catalogue = discover()
    for word in ("broken_one", "broken"):
        with pytest.raises(AttnbenchError) as caught:
            plan.resolve_backends(word, catalogue)
        assert caught.value.exit_code == ExitCode.PLUGIN_FAILED == 4
        assert "broken_one of toy-dist failed to load: RuntimeError: no licence" in caught.value.message


# --- as JSON, from a process that nobody trusts -----------------------------------------------------------------------

SOURCE = EntryPointRef("dist", "1.5", "toy", "toy_module", "/envs/toy/bin/python")
WHOLE = Description(
    SOURCE,
    (
        BackendInfo("one", "cpu", "a toy", "https://example.org", True, None, SOURCE, (("ovens", "1.2"), ("pans", ""))),
        BackendInfo("one", "npu", "", "", False, "no toy here", SOURCE),
    ),
    (Suite("toys", (Problem(seqlen_q=3, seqlen_k=5, heads_q=4, heads_kv=2, window=2, softmax_scale=0.3),), "two"),),
    1.25,
    sources=("/envs/toy/toy.py",),
    calls=("import toy_module (3.0 ms)",),
)
BROKEN = Description(SOURCE, load_s=0.5, error="Traceback\nE: no")


@pytest.mark.parametrize("description", [WHOLE, BROKEN], ids=["whole", "broken"])
def test_a_description_survives_json(description: Description) -> None:
    data = json.loads(json.dumps(description.to_json()))
    assert Description.from_json(data, SOURCE) == description
    assert EntryPointRef.from_json(json.loads(json.dumps(SOURCE.to_json()))) == SOURCE


def _set(*path: Any, to: Any) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        for step in path[:-1]:
            data = data[step]
        data[path[-1]] = to

    return change


FORGERIES = {
    "one field more": _set("more", to=1),
    "one field less": lambda data: data.pop("load_s"),
    "backends that are a table": _set("backends", to={}),
    "a backend that is a list": _set("backends", 0, to=[]),
    "a backend with another field": _set("backends", 0, "available", to=True),
    "a name in capitals": _set("backends", 0, "name", to="One"),
    "a name that is no text": _set("backends", 0, "name", to=1),
    "a name with a line break": _set("backends", 0, "name", to="one\n"),
    "a device of its own": _set("backends", 0, "device", to="tpu"),
    "a device that is a list": _set("backends", 0, "device", to=["cpu"]),
    "a summary that is no text": _set("backends", 0, "summary", to=None),
    "a homepage that is no text": _set("backends", 0, "homepage", to={}),
    "libraries that are text": _set("backends", 0, "libraries", to="ovens"),
    "a library whose version is no text": _set("backends", 0, "libraries", "ovens", to=1.2),
    "an empty reason": _set("backends", 0, "reason", to=""),
    "a reason that is no text": _set("backends", 0, "reason", to=False),
    "suites that are text": _set("suites", to="pto"),
    "a suite without problems": _set("suites", 0, "problems", to=[]),
    "a suite with a bad name": _set("suites", 0, "name", to="A b"),
    "a suite with one field more": _set("suites", 0, "more", to=1),
    "a suite whose summary is no text": _set("suites", 0, "summary", to=5),
    "a suite of text": _set("suites", 0, "problems", to=["b1-h1"]),
    "a problem out of range": _set("suites", 0, "problems", 0, "seqlen_q", to=0),
    "a problem of another kind": _set("suites", 0, "problems", 0, "paged", to=True),
    "a time that is text": _set("load_s", to="1"),
    "a time that is a truth": _set("load_s", to=True),
    "a negative time": _set("load_s", to=-1),
    "an error beside backends": _set("error", to="no"),
    "an error that is no text": _set("error", to=5),
    "sources that are text": _set("sources", to="/x"),
    "a source that is no text": _set("sources", 0, to=None),
    "calls that are text": _set("calls", to="import"),
    "a call that is no text": _set("calls", 0, to=1),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_description_of_another_form_is_refused(forgery: str) -> None:
    data = copy.deepcopy(WHOLE.to_json())
    FORGERIES[forgery](data)
    with pytest.raises(ValueError):  # noqa: PT011
        Description.from_json(data, SOURCE)


@pytest.mark.parametrize("data", [None, [], "text", {}, BROKEN.to_json() | {"error": " \n"}], ids=repr)
def test_what_is_no_description_is_refused(data: object) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        Description.from_json(data, SOURCE)


@pytest.mark.parametrize("data", [None, {"name": "toy"}, SOURCE.to_json() | {"value": 5}, SOURCE.to_json() | {"x": ""}])
def test_what_is_no_entry_point_is_refused(data: object) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        EntryPointRef.from_json(data)
