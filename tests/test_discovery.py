"""attnbench.discovery: whatever a plugin does to the process that loads it, and plugins of other interpreters."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import BUILT_IN, QUICK, TINY, Answer, PluginFolder, attnbench, python

import attnbench as public
from attnbench import child, discovery, plan, settings
from attnbench.discovery import discover
from attnbench.errors import AttnbenchError, ExitCode
from attnbench.problem import BUILTIN_SUITES
from attnbench.registry import Catalogue, PluginInfo

Cli = Callable[..., Answer]
HOOK = "@attnbench.hookimpl\ndef attnbench_backends():\n"
LIMIT_S = 4.0

SUITE_HOOK = """
@attnbench.hookimpl
def attnbench_suites():
    return [attnbench.Suite("toys", [attnbench.Problem(seqlen_q=3, seqlen_k=5)])]
"""

START_CHILD = """
import os, subprocess, time
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
with open({mark!r}, "w") as file:
    print(os.getpid(), child.pid, file=file)
"""

SAY = """
import os, struct, time

def say(words):
    import socket, stat
    for descriptor in range(3, 64):
        try:
            if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                os.write(descriptor, words)
        except OSError:
            pass

def frame(text):
    say(struct.pack(">I", len(text)) + text.encode())

"""


@pytest.fixture(autouse=True)
def _only_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """attnbench's own plugins import torch, which takes seconds that most tests need not wait for."""
    monkeypatch.setenv("ATTNBENCH_PLUGINS", "a,bad,fi,peers,toy,z")


@pytest.fixture
def all_plugins(monkeypatch: pytest.MonkeyPatch, _only_ours: None) -> None:
    monkeypatch.delenv("ATTNBENCH_PLUGINS")


def plugin(catalogue: Catalogue, name: str) -> PluginInfo:
    (found,) = [p for p in catalogue.plugins if p.source.name == name]
    return found


def keys(catalogue: Catalogue) -> list[tuple[str, str]]:
    return [(b.name, b.device) for b in catalogue.backends]


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def assert_gone(pids: list[int]) -> None:
    until = time.monotonic() + 10
    while any(map(is_alive, pids)) and time.monotonic() < until:
        time.sleep(0.02)
    assert not [pid for pid in pids if is_alive(pid)]


def pids_in(path: Path, count: int) -> list[int]:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            if len(found := path.read_text().split()) == count:
                return list(map(int, found))
        time.sleep(0.02)
    raise AssertionError("the plugin did not start")


# --- one process, and what ends it ------------------------------------------------------------------------------------

UNREADABLE = "what its process answers cannot be read: "
FATAL = {
    "os._exit(0) at import": ("os._exit(0)", "loading it ended the process: exit code 0"),
    "os._exit(3) at import": ("os._exit(3)", "loading it ended the process: exit code 3"),
    "SIGSEGV at import": ("import ctypes\nctypes.string_at(0)", "loading it ended the process: killed by SIGSEGV"),
    "abort in the hook": (HOOK + "    os.abort()", "loading it ended the process: killed by SIGABRT"),
    "SIGKILL in unavailable()": (
        HOOK + "    Toy.unavailable = lambda self: os.kill(os.getpid(), 9)\n    return [Toy('bad')]",
        "loading it ended the process: killed by SIGKILL",
    ),
    "exit in its message": (
        "class Odd(Exception):\n    def __str__(self):\n        os._exit(4)\n\nraise Odd",
        "loading it ended the process: exit code 4",
    ),
    "no JSON": ("say(b'\\0\\0\\0\\5hello')", UNREADABLE + "it is no JSON"),
    "a list": ("frame('[1]')", UNREADABLE + "it is no object"),
    "too large a message": ("say((1 << 31).to_bytes(4, 'big'))", UNREADABLE + "a message of 2147483648 bytes"),
    "another message": ("frame('{\"entry_points\": []}')", UNREADABLE + "it is not what was asked for"),
    "another description": (
        'frame(\'{"number": 1, "description": {"backends": 5}}\')\nframe(\'{"number": 2, "description": {}}\')',
        UNREADABLE,
    ),
    "infinite time": ('frame(\'{"number": 1, "description": {"load_s": Infinity}}\')', UNREADABLE + "it is no JSON"),
    "a suite beyond all bounds": (
        "@attnbench.hookimpl\ndef attnbench_suites():\n    return [attnbench.Suite('big',"
        " [attnbench.Problem(seqlen_q=i, seqlen_k=1) for i in range(1, 30000)])]",
        "what it brings cannot be told: WireError: a message of",
    ),
    "a summary that JSON does not know": (
        "@attnbench.hookimpl\ndef attnbench_suites():\n    return [attnbench.Suite('big',"
        " [attnbench.Problem(seqlen_q=1, seqlen_k=1)], {1})]",
        "what it brings cannot be told: TypeError: ",
    ),
    "closing the connection": ("os.closerange(3, 256)", "loading it ended the process: exit code 0"),
}


@pytest.mark.parametrize("fate", FATAL)
def test_what_a_plugin_does_to_its_process_is_its_own_failure(fate: str, plugins: PluginFolder) -> None:
    body, words = FATAL[fate]
    plugins.backends('[Toy("first")]', entry="a", distribution="a-dist")
    plugins.add(SAY + body, entry="bad", distribution="bad-dist")
    plugins.backends('[Toy("last")]', entry="z", distribution="z-dist")
    catalogue = discover()
    info = plugin(catalogue, "bad")
    assert info.error is not None
    assert info.error.startswith(words)
    assert "\n" not in info.error
    assert catalogue.failures == (info,)
    assert keys(catalogue) == [("first", "cpu"), ("last", "cpu")]
    assert catalogue.suites == BUILTIN_SUITES


HANGS = {
    "at import": "time.sleep(600)",
    "in the hook": HOOK + "    time.sleep(600)",
    "in unavailable()": HOOK
    + "    Toy.unavailable = lambda self: time.sleep(600)\n    return [Toy('fine'), Toy('fine2')]",
    "stopped by itself": "os.kill(os.getpid(), 19)",
    "after half a message": "say(b'\\0\\0\\1\\0{')\ntime.sleep(600)",
}


@pytest.mark.parametrize("where", HANGS)
def test_a_plugin_that_hangs_is_cut_off_and_leaves_no_process(where: str, plugins: PluginFolder) -> None:
    mark = plugins.path / "pids"
    head = START_CHILD.format(mark=str(mark))
    plugins.backends('[Toy("first")]', entry="a", distribution="a-dist")
    plugins.add(SAY + head + HANGS[where], entry="bad", distribution="bad-dist")
    plugins.backends('[Toy("last")]', entry="z", distribution="z-dist")
    start_s = time.monotonic()
    catalogue = discover(limit_s=LIMIT_S)
    took_s = time.monotonic() - start_s
    info = plugin(catalogue, "bad")
    assert info.error == info.error_line == "it took longer than 4 s"
    assert LIMIT_S <= info.load_s <= took_s < 2 * LIMIT_S + 5, "silence is waited for once"
    assert keys(catalogue) == [("first", "cpu"), ("last", "cpu")]
    assert_gone(pids_in(mark, 2))


def test_plugins_that_fail_one_after_the_other_and_alone_are_all_named(plugins: PluginFolder) -> None:
    for index in range(3):
        plugins.add(f"import os\nos._exit({index})", entry="bad", distribution=f"bad-{index}")
    catalogue = discover()
    assert [p.error for p in catalogue.plugins] == [f"loading it ended the process: exit code {i}" for i in range(3)]
    assert keys(catalogue) == []


def test_in_the_normal_case_one_process_loads_all(plugins: PluginFolder) -> None:
    mark = plugins.path / "pids"
    for entry in ("a", "toy", "z"):
        plugins.add(
            f"import os\nwith open({str(mark)!r}, 'a') as f:\n    print(os.getpid(), file=f)\n{HOOK}    return []",
            entry=entry,
        )
    assert discover().failures == ()
    pids = pids_in(mark, 3)
    assert len(set(pids)) == 1
    assert pids[0] != os.getpid()
    assert_gone(pids)


LEGACIES = {
    "a thread that ends it": "import threading\nthreading.Timer(0.5, os._exit, [5]).start()\n" + HOOK + "    return []",
    "two answers": HOOK + '    frame(\'{"number": 1, "description":'
    ' {"backends": [], "suites": [], "load_s": 0, "error": null, "sources": [], "calls": []}}\')\n'
    '    return [Toy("never_told")]',
}


@pytest.mark.parametrize("legacy", LEGACIES)
def test_what_a_plugin_left_behind_costs_no_other_plugin(legacy: str, plugins: PluginFolder) -> None:
    plugins.add(SAY + LEGACIES[legacy], entry="bad", distribution="a-dist")
    plugins.add(f"import time\ntime.sleep(1)\n{HOOK}    return [Toy('innocent')]", entry="z", distribution="z-dist")
    catalogue = discover()
    assert catalogue.failures == ()
    assert keys(catalogue) == [("innocent", "cpu")]


def test_kill_9_of_attnbench_leaves_no_process(plugins: PluginFolder) -> None:
    mark = plugins.path / "pids"
    plugins.add(START_CHILD.format(mark=str(mark)) + "time.sleep(600)")
    parent = subprocess.Popen([sys.executable, "-m", "attnbench.cli", "list"])
    try:
        pids = pids_in(mark, 2)
        assert all(map(is_alive, pids))
    finally:
        parent.kill()
        parent.wait()
    assert_gone(pids)


def test_an_interrupt_passes_through_and_leaves_no_process(plugins: PluginFolder) -> None:
    mark = plugins.path / "pids"
    plugins.add(
        f"import os, time\nwith open({str(mark)!r}, 'w') as f:\n    print(os.getpid(), file=f)\ntime.sleep(600)"
    )

    def interrupt() -> None:
        pids_in(mark, 1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        discover()
    assert_gone(pids_in(mark, 1))


def test_no_descriptor_is_left_open(plugins: PluginFolder) -> None:
    plugins.add("import os\nos._exit(1)", entry="bad", distribution="a-dist")
    plugins.add(
        "import os, socket, stat\n"
        "for fd in range(3, 64):\n"
        "    try:\n"
        "        if stat.S_ISSOCK(os.fstat(fd).st_mode):\n"
        "            socket.send_fds(socket.socket(fileno=os.dup(fd)), [b'\\0\\0\\0\\2'], [0])\n"
        "            os.write(fd, b'{}')\n"
        "    except OSError:\n"
        "        pass\n"
    )
    discover()
    before = os.listdir("/proc/self/fd")
    catalogue = discover()
    assert os.listdir("/proc/self/fd") == before
    assert str(plugin(catalogue, "toy").error).startswith(UNREADABLE)


def test_nothing_plugins_print_or_read_is_attnbenchs(plugins: PluginFolder, capfd: pytest.CaptureFixture[str]) -> None:
    plugins.add(
        "import os, sys\nprint('noise')\nos.write(1, b'more')\nassert not sys.stdin.read()\n" + HOOK + "    return []"
    )
    assert discover().failures == ()
    out, err = capfd.readouterr()
    assert out == ""
    assert "noise" in err
    assert "more" in err


def test_nothing_comes_from_the_current_folder(folder: Path, plugins: PluginFolder) -> None:
    plugins.backends('[Toy("toy")]')
    PluginFolder(folder).backends('[Toy("here")]', entry="a", distribution="here-dist")
    (folder / "pluggy.py").write_text("raise SystemExit('imported from the current folder')")
    assert keys(discover()) == [("toy", "cpu")]
    assert python("import pluggy").code != 0, "a process with the current folder in its path finds it"


@pytest.mark.parametrize("name", ["ATTNBENCH_CUDA_TIMING", "ATTNBENCH_NPU_TIMING"])
def test_a_setting_that_is_none_is_one_error_and_no_plugins_failure(
    name: str, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "clock")
    answer = cli("list")
    assert (answer.code, answer.out) == (ExitCode.USAGE, "")
    assert answer.err == f"error: {name} must be graph or events, not 'clock'\n"


def test_a_process_that_does_not_start_is_a_clear_error(plugins: PluginFolder) -> None:
    for words, last in (("", ""), ("no licence", "; last on stderr: no licence")):
        (plugins.path / "sitecustomize.py").write_text(f"import os\nos.write(2, {words.encode()!r})\nos._exit(9)")
        with pytest.raises(AttnbenchError) as caught:
            discover()
        assert caught.value.message == f"the process that loads plugins does not start: exit code 9{last}"


@pytest.mark.usefixtures("all_plugins")
@pytest.mark.parametrize("command", ["list", "plugins"])
def test_attnbench_itself_imports_no_plugin_and_no_torch(command: str, plugins: PluginFolder) -> None:
    module = plugins.backends('[Toy("toy")]')
    found = python(
        f"""
        import sys
        from attnbench.cli import main
        try:
            main([{command!r}])
        except SystemExit as end:
            assert not end.code
        known = {{name.partition(".")[0] for name in sys.modules}}
        print(sorted(known & {{"torch", "attnbench_plugins", {module!r}}}), "attnbench" in known)
        """
    )
    assert found.code == 0, found.err
    assert "toy" in found.out
    assert "sdpa" in found.out
    assert found.out.splitlines()[-1] == "[] True"


# --- other interpreters -----------------------------------------------------------------------------------------------


class Elsewhere(PluginFolder):
    """Another environment: an interpreter that finds what is installed in a folder of its own."""

    def __init__(self, path: Path, options: str = "") -> None:
        (path / "bin").mkdir(parents=True)
        site = path / "site"
        site.mkdir()
        super().__init__(site)
        self.python = path / "bin" / "python"
        self.python.write_text(f'#!/bin/sh\nPYTHONPATH="{site}" exec "{sys.executable}" {options} "$@"\n')
        self.python.chmod(0o755)


@pytest.fixture
def envs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Elsewhere]:
    """Makes environments in the home folder, which no message may show."""
    monkeypatch.setenv("HOME", str(tmp_path / "secret-home"))

    def make(name: str = "fi", options: str = "") -> Elsewhere:
        return Elsewhere(tmp_path / "secret-home" / name, options)

    return make


RIGHT = """
class Right(Toy):
    summary = "from elsewhere"
    def unavailable(self):
        import sys
        return None if any(path.endswith("fi/site") for path in sys.path) else "not this environment"

@attnbench.hookimpl
def attnbench_backends():
    return [Right("fi")]
"""


def test_a_backend_of_another_interpreter_is_listed_checked_and_run(envs, plugins: PluginFolder, folder: Path) -> None:
    there = envs()
    module = there.add(RIGHT, entry="fi", distribution="fi-dist", version="2.0")
    option = ("--python", f"fi={there.python}")
    listed = json.loads(attnbench("list", "--json", *option).out)
    assert listed == [
        {
            "name": "fi",
            "device": "cpu",
            "available": True,
            "reason": None,
            "summary": "from elsewhere",
            "distribution": "fi-dist",
            "version": "2.0",
        }
    ]
    assert json.loads(attnbench("list", "--json").out) == []
    assert not (plugins.path / f"{module}.py").exists()
    checked = attnbench("check", "--backends", "fi", *TINY, *option, "--json")
    assert checked.code == 0, checked.err
    assert [(r["backend"], r["status"]) for r in json.loads(checked.out)] == [("fi", "PASSED")]
    ran = attnbench("run", "--backends", "fi", *TINY, *QUICK, *option, "--json", "--out", "r")
    assert ran.code == 0, ran.err
    assert [(r["kernel"], r["status"]) for r in json.loads(ran.out)] == [("fi", "PASSED")]
    header = json.loads((folder / "r" / "run.json").read_text())
    assert header["environment"]["plugins_of_other_interpreters"] == {"fi-dist": "2.0"}
    assert json.loads(attnbench("env", "--json", *option).out)["plugins_of_other_interpreters"] == {"fi-dist": "2.0"}
    for file in (folder / "r").iterdir():
        assert "secret-home" not in file.read_text()


def test_the_api_takes_interpreters_too(envs, folder: Path) -> None:
    there = envs()
    there.add(RIGHT, entry="fi")
    how = {"seqlen_q": 16, "seqlen_k": 32, "head_dim": 32, "protocol": "fixed", "warmup": 1, "iters": 4}
    frame = public.run("fi", **how, out="r", python={"fi": str(there.python)})
    assert list(frame["status"]) == ["PASSED"]


def test_no_isolate_of_another_interpreters_backend_is_an_error(envs, cli: Cli, folder: Path) -> None:
    there = envs()
    there.add(RIGHT, entry="fi")
    for command in ("run", "check"):
        answer = cli(command, "--backends", "fi", *TINY, "--no-isolate", "--python", f"fi={there.python}")
        assert answer.code == 2
        assert answer.problem == "error: fi belongs to ~/fi/bin/python: it cannot run in this process"
        assert "--skip fi" in answer.err
    assert list(folder.iterdir()) == [], "no run was begun"


def test_an_entry_point_of_that_name_goes_before_a_backend_of_it(envs, plugins: PluginFolder) -> None:
    there = envs()
    mark = there.path / "imported"
    there.backends('[Toy("one"), Toy("two")]', entry="fi", distribution="b")
    there.add(f"open({str(mark)!r}, 'w')\n{HOOK}    return [Toy('fi')]", entry="other", distribution="a")
    catalogue = discover(python={"fi": str(there.python)})
    assert keys(catalogue) == [("one", "cpu"), ("two", "cpu")]
    assert [b.source.python for b in catalogue.backends] == [str(there.python)] * 2
    assert not mark.exists(), "what was not asked for is not even imported"


def test_where_no_entry_point_is_called_so_a_backend_is_and_comes_alone(envs, plugins: PluginFolder) -> None:
    there = envs()
    peers = f"{HOOK}    return [Toy('fi'), Toy('fi', 'npu'), Toy('other'), Toy('more')]\n{SUITE_HOOK}"
    there.add(peers, entry="peers", distribution="peers-dist", version="2.0")
    plugins.add(peers, entry="peers", distribution="peers-dist", version="1.0")
    catalogue = discover(python={"fi": str(there.python), "more": str(there.python)})
    assert sorted((b.name, b.device, b.source.version) for b in catalogue.backends) == [
        ("fi", "cpu", "2.0"),
        ("fi", "npu", "2.0"),
        ("more", "cpu", "1.0"),
        ("other", "cpu", "1.0"),
    ], "ATTNBENCH_PLUGINS holds back more"
    assert catalogue.failures == ()
    assert [s.name for s in catalogue.suites] == ["pto", "smoke", "toys"]
    assert {p.source.version: p.backends for p in catalogue.plugins} == {"1.0": ("other", "more"), "2.0": ("fi",)}


def test_two_backends_of_one_entry_point_come_together(envs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNBENCH_PLUGINS", "one,two")
    there = envs()
    there.backends('[Toy("one"), Toy("two"), Toy("three")]', entry="peers")
    catalogue = discover(python={"one": str(there.python), "two": str(there.python)})
    assert (keys(catalogue), catalogue.failures) == ([("one", "cpu"), ("two", "cpu")], ())
    assert [p.backends for p in catalogue.plugins] == [("one", "two")]


def test_a_named_entry_point_comes_whole_though_a_backend_of_it_is_named_too(envs, monkeypatch) -> None:
    monkeypatch.setenv("ATTNBENCH_PLUGINS", "one,peers")
    there = envs()
    there.backends('[Toy("one"), Toy("two")]', entry="peers")
    catalogue = discover(python={"one": str(there.python), "peers": str(there.python)})
    assert (keys(catalogue), catalogue.failures) == ([("one", "cpu"), ("two", "cpu")], ())


def test_it_replaces_this_environments_entry_point_and_backends_of_its_names(envs, plugins: PluginFolder) -> None:
    there = envs()
    there.backends('[Toy("one"), Toy("two")]', entry="fi", version="2.0")
    mark = plugins.path / "imported"
    plugins.add(f"open({str(mark)!r}, 'w')", entry="fi")
    plugins.backends('[Toy("two"), Toy("two", "npu"), Toy("mine")]', entry="peers", distribution="a-dist")
    plugins.backends('[Toy("one")]', entry="z", distribution="z-dist")
    catalogue = discover(python={"fi": str(there.python)})
    assert keys(catalogue) == [("mine", "cpu"), ("one", "cpu"), ("two", "cpu")]
    assert [(p.source.name, p.backends, p.error) for p in catalogue.plugins] == [
        ("peers", ("mine",), None),
        ("fi", ("one", "two"), None),
    ]
    assert not mark.exists()


@pytest.mark.usefixtures("all_plugins")
def test_attnbenchs_own_plugins_can_come_from_elsewhere(envs, cli: Cli) -> None:
    there = envs()
    catalogue = discover(python={"gemm_ref": str(there.python)})
    assert catalogue.failures == ()
    sources = {b.source.python for b in catalogue.backends if b.name == "gemm_ref"}
    assert sources == {str(there.python)}
    assert {b.source.python for b in catalogue.backends if b.name != "gemm_ref"} == {""}
    assert [p.source.name for p in catalogue.plugins] == BUILT_IN


def test_plugins_tells_which_interpreter_loaded_one(envs, cli: Cli, plugins: PluginFolder) -> None:
    there = envs()
    there.backends('[Toy("fi")]', entry="fi")
    plugins.backends('[Toy("toy")]', entry="toy", distribution="own-dist")
    lines = cli("plugins", "--python", f"fi={there.python}").out.splitlines()
    assert [line.split("  ")[-1].strip() for line in lines[2:]] == ["loaded", "loaded by ~/fi/bin/python"]


def broken_fi(catalogue: Catalogue) -> str:
    info = plugin(catalogue, "fi")
    assert sorted(keys(catalogue)) == [("fi", "cpu"), ("toy", "cpu")]
    stand_in = next(b for b in catalogue.backends if b.name == "fi")
    assert (stand_in.available, stand_in.reason, stand_in.source) == (False, info.error_line, info.source)
    with pytest.raises(AttnbenchError) as caught:
        plan.resolve_backends("fi", catalogue)
    assert caught.value.exit_code == ExitCode.PLUGIN_FAILED
    assert "secret-home" not in caught.value.message
    return str(info.error)


@pytest.fixture
def own(plugins: PluginFolder) -> None:
    """This environment's fi and toy: the first must not stand in for another interpreter's."""
    plugins.backends('[Toy("toy")]')
    plugins.backends('[Toy("fi")]', entry="fi")


@pytest.mark.usefixtures("own")
def test_an_environment_without_attnbench_is_that_names_failure(envs) -> None:
    assert broken_fi(discover(python={"fi": str(envs(options="-S").python)})) == (
        "~/fi/bin/python has no attnbench: install it there"
    )


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("site", "options"),
    [
        ({"sitecustomize.py": "import attnbench.wire\nattnbench.wire.VERSION = 99"}, ""),
        ({"attnbench/__init__.py": "", "attnbench/keeper.py": "def keep(control): ..."}, "-S"),
        ({"attnbench/__init__.py": ""}, "-S"),
    ],
    ids=["another wire", "before there was describe.py", "before there was a keeper"],
)
def test_another_version_of_attnbench_is_that_names_failure(site: dict[str, str], options: str, envs) -> None:
    there = envs(options=options)
    there.backends('[Toy("fi")]', entry="fi")
    for name, text in site.items():
        (there.path / name).parent.mkdir(exist_ok=True)
        (there.path / name).write_text(text)
    assert broken_fi(discover(python={"fi": str(there.python)})) == (
        "~/fi/bin/python has another version of attnbench: install this one there"
    )


def test_what_an_interpreter_fails_to_bring_is_listed_and_asked_for_with_why_not(
    envs, plugins: PluginFolder, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTNBENCH_PLUGINS", "fi,four,one,only_there,peers,toy")
    broken, there = envs("broken"), envs()
    broken.python.write_text("#!/bin/sh\nexit 3\n")
    there.backends('[Toy("two")]', entry="fi")
    plugins.backends('[Toy("one"), Toy("one", "npu"), Toy("two"), Toy("three")]', entry="peers")
    plugins.backends('[Toy("three"), Toy("four")]', entry="toy")
    options = [f"--python={name}={broken.python}" for name in ("peers", "one", "four", "only_there")]
    answer = cli("list", "--json", *options, f"--python=fi={there.python}")
    why = "~/broken/bin/python does not start attnbench: exit code 3"
    assert answer.code == 0
    assert sorted((b["name"], b["device"], b["reason"]) for b in json.loads(answer.out)) == [
        ("four", "cpu", why),
        ("one", "cpu", why),
        ("one", "npu", why),
        ("three", "cpu", None),  # of another plugin, which goes on
        ("two", "cpu", None),  # of another interpreter
    ]
    assert f"note: plugin only_there of unknown failed to load: {why}" in answer.err
    for name in ("one", "four", "peers", "only_there"):
        asked = cli("run", "--backends", name, "--dry-run", *TINY, *options)
        assert asked.code == ExitCode.PLUGIN_FAILED
        assert asked.problem.endswith(f" failed to load: {why}")
    left = cli("run", "--backends", "three,two", "--skip", "one,two", "--dry-run", *TINY, *options)
    assert left.code == ExitCode.PLUGIN_FAILED
    assert left.problem.startswith("error: plugin peers of unknown failed to load: ")
    left = cli("run", "--backends", "three", "--skip", "one,two", "--dry-run", *TINY, *options)
    assert (left.code, "three" in left.out) == (0, True)


@pytest.mark.usefixtures("own")
def test_what_starts_no_attnbench_is_that_names_failure(envs) -> None:
    there = envs()
    there.python.write_text("#!/bin/sh\nexit 3\n")
    assert broken_fi(discover(python={"fi": str(there.python)})) == (
        "~/fi/bin/python does not start attnbench: exit code 3"
    )


@pytest.mark.usefixtures("own")
def test_a_first_message_that_is_none_is_that_names_failure(envs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "END_TIMEOUT_S", 0.5)
    there = envs()
    there.python.write_text(
        f"#!{sys.executable}\nimport socket, sys, time\n"
        "socket.socket(fileno=int(sys.argv[4])).sendall(b'\\0\\0\\0\\2{}')\ntime.sleep(600)\n"
    )
    assert broken_fi(discover(python={"fi": str(there.python)})) == (
        "~/fi/bin/python does not start attnbench: its first message cannot be read"
    )


@pytest.mark.usefixtures("own")
def test_silence_at_the_start_is_that_names_failure_and_leaves_no_process(envs, monkeypatch) -> None:
    there = envs()
    mark = there.path / "pids"
    there.python.write_text(f'#!/bin/sh\nsleep 600 &\necho $$ $! > "{mark}"\nwait\n')
    monkeypatch.setattr(discovery, "START_LIMIT_S", 8.0)
    monkeypatch.setattr(child, "END_TIMEOUT_S", 0.5)
    assert broken_fi(discover(python={"fi": str(there.python)})) == (
        "~/fi/bin/python does not start attnbench: it took longer than 8 s"
    )
    assert_gone(pids_in(mark, 2))


@pytest.mark.usefixtures("own")
def test_an_environment_that_brings_no_such_name_is_its_failure(envs) -> None:
    there = envs()
    there.backends('[Toy("other")]', entry="other")
    there.add("raise RuntimeError('no licence')", entry="flash")
    assert broken_fi(discover(python={"fi": str(there.python)})) == (
        "~/fi/bin/python has no plugin and no backend called fi (flash failed to load there)"
    )


@pytest.mark.usefixtures("own")
def test_a_plugin_that_crashes_elsewhere_is_its_failure(envs) -> None:
    there = envs()
    there.add("import os\nos.abort()", entry="fi")
    error = broken_fi(discover(python={"fi": str(there.python)}))
    assert error == "loading it ended the process: killed by SIGABRT"


@pytest.mark.usefixtures("own")
def test_no_plugin_and_attnbench_plugins_hold_for_other_interpreters_too(envs, monkeypatch) -> None:
    there = envs()
    there.backends('[Toy("there")]', entry="fi")
    for name in ("fi", "only_there"):
        catalogue = discover(without={name}, python={name: "/no/such/python"})
        assert ("there", "cpu") not in keys(catalogue)
    with pytest.raises(AttnbenchError, match=r"no plugin is called 'only_there'"):
        discover(without={"only_there"})
    monkeypatch.setenv("ATTNBENCH_PLUGINS", "toy")
    assert keys(discover(python={"fi": "/no/such/python"})) == [("toy", "cpu")]


# --- how an interpreter is named --------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["fi", "=python", "fi=", " = ", ""])
@pytest.mark.parametrize("command", ["list", "plugins", "check", "run", "env"])
def test_python_that_is_not_name_and_exe_is_exit_2(word: str, command: str, cli: Cli) -> None:
    answer = cli(command, "--python", word)
    assert (answer.code, answer.out) == (2, "")
    assert answer.problem == f"error: --python must be NAME=EXE, not {word!r}"
    assert "hint: for example" in answer.err


def test_one_name_with_two_interpreters_is_exit_2(cli: Cli) -> None:
    answer = cli("list", "--python", "fi=python", "--python", "fi=python3")
    assert (answer.code, answer.problem) == (2, "error: --python gives fi two interpreters")


@pytest.mark.parametrize("command", ["list", "run"])
def test_an_interpreter_that_is_not_there_is_exit_2(command: str, cli: Cli, envs, tmp_path: Path) -> None:
    there = envs()
    there.python.chmod(0o644)
    for exe, shown, what in (
        ("~/no/python", "~/no/python", "is not there"),
        (tmp_path / "secret-home" / "no" / "python", "~/no/python", "is not there"),
        ("no_such_python_command", "no_such_python_command", "is not there"),
        ("./python", "./python", "is not there"),
        ("/", "/", "cannot be executed"),
        (there.python, "~/fi/bin/python", "cannot be executed"),
    ):
        answer = cli(command, "--python", f"fi={exe}")
        assert (answer.code, answer.out) == (2, "")
        assert answer.problem == f"error: the interpreter of fi, {shown}, {what}"
        assert "hint: give --python" in answer.err


def test_a_file_that_the_system_cannot_execute_is_exit_2(cli: Cli, envs) -> None:
    there = envs()
    there.python.write_text("no program\n")
    answer = cli("list", "--python", f"fi={there.python}")
    assert (answer.code, answer.problem) == (2, "error: cannot execute ~/fi/bin/python: Exec format error")


def test_an_interpreter_is_a_path_a_home_path_or_a_command(envs, folder: Path, monkeypatch) -> None:
    there = envs()
    there.backends('[Toy("fi")]', entry="fi")
    monkeypatch.setenv("PATH", str(there.python.parent), prepend=os.pathsep)
    there.python.rename(there.python.parent / "fi-python")
    (folder / "link").symlink_to(there.python.parent)
    for exe, path in (
        ("fi-python", there.python.parent / "fi-python"),
        ("~/fi/bin/fi-python", there.python.parent / "fi-python"),
        ("link/fi-python", folder / "link" / "fi-python"),
        (str(there.python.parent / "fi-python"), there.python.parent / "fi-python"),
    ):
        (found,) = discover(python={"fi": exe}).backends
        assert found.source.python == str(path), "links stay: a virtual environment is known by its path"


# --- the user's own config file ---------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "config.toml"
    monkeypatch.setenv("ATTNBENCH_CONFIG", str(path))
    return path


def test_the_config_file_names_interpreters_and_the_command_line_wins(
    envs, config: Path, cli: Cli, plugins: PluginFolder
) -> None:
    first, second = envs("one"), envs("two")
    first.backends('[Toy("fi")]', entry="fi", version="1.0")
    second.backends('[Toy("fi")]', entry="fi", version="2.0")
    config.write_text(f'[python]\nfi = "{first.python}"\n')
    assert [b["version"] for b in json.loads(cli("list", "--json").out)] == ["1.0"]
    answer = cli("list", "--json", "--python", f"fi={second.python}")
    assert [b["version"] for b in json.loads(answer.out)] == ["2.0"]
    config.write_text('[python]\nfi = "~/one/bin/python"\ntoy = "no_such_python_command"\n')
    answer = cli("list", "--json")
    assert (answer.code, answer.problem) == (2, "error: the interpreter of toy, no_such_python_command, is not there")
    assert [b["version"] for b in json.loads(cli("list", "--json", "--no-plugin", "toy").out)] == ["1.0"]


def test_where_the_config_file_lies(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(path: Path, exe: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'[python]\nfi = "{exe}"\n')

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv("ATTNBENCH_CONFIG", "")
    for name in (
        "config.toml",
        "attnbench/config.toml",
        "relative/attnbench/config.toml",
        ".config/attnbench/config.toml",
    ):
        write(folder / name, "cwd")
    assert settings.interpreters() == {}
    write(tmp_path / "home" / ".config" / "attnbench" / "config.toml", "home")
    assert settings.interpreters() == {"fi": "home"}
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")
    assert settings.interpreters() == {"fi": "home"}
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    assert settings.interpreters() == {}
    write(tmp_path / "xdg" / "attnbench" / "config.toml", "xdg")
    assert settings.interpreters() == {"fi": "xdg"}
    write(tmp_path / "own.toml", "own")
    monkeypatch.setenv("ATTNBENCH_CONFIG", str(tmp_path / "own.toml"))
    assert settings.interpreters() == {"fi": "own"}
    monkeypatch.setenv("ATTNBENCH_CONFIG", "config.toml")
    with pytest.raises(AttnbenchError, match=r"ATTNBENCH_CONFIG must be an absolute path, not 'config\.toml'"):
        settings.interpreters()


BAD_CONFIGS = {
    "no TOML": (b"[python", "is not TOML: "),
    "no UTF-8": (b"[python]\nfi = '\xff'", "is not TOML: "),
    "nested": (b"x = " + b"[" * 100000, "is nested too deeply"),
    "another table": (b"[pythons]\nfi = 'python'", "has an unknown key 'pythons'"),
    "no table": (b"python = 'python'", ": python must be a table"),
    "a number": (b"[python]\nfi = 5", ": 'fi' in [python] must name an interpreter"),
    "a table in it": (b"[python.fi]\nexe = 'python'", ": 'fi' in [python] must name an interpreter"),
    "an empty one": (b"[python]\nfi = ' '", ": 'fi' in [python] must name an interpreter"),
    "an empty name": (b"[python]\n'' = 'python'", ": '' in [python] must name an interpreter"),
    "a relative path": (b"[python]\nfi = './python'", ": fi must be an absolute path or a command, not './python'"),
}


@pytest.mark.parametrize("fault", BAD_CONFIGS)
def test_a_config_file_that_is_none_is_one_clear_error(fault: str, config: Path, cli: Cli) -> None:
    text, words = BAD_CONFIGS[fault]
    config.write_bytes(text)
    answer = cli("list")
    assert (answer.code, answer.out) == (2, "")
    assert answer.problem.startswith(f"error: {config}{'' if words.startswith(':') else ' '}{words}")


def test_a_config_file_that_cannot_be_read_is_one_clear_error(config: Path, cli: Cli) -> None:
    answer = cli("list")
    assert (answer.code, answer.problem) == (2, f"error: cannot read {config}: No such file or directory")


def test_a_suite_file_names_no_interpreter(cli: Cli, folder: Path, plugins: PluginFolder) -> None:
    plugins.backends('[Toy("toy")]')
    (folder / "s.toml").write_text("[python]\nfi = 'python'\n[[problems]]\nseqlen_q = 1\nseqlen_k = 1\n")
    answer = cli("run", "--suite", "s.toml", "--dry-run")
    assert (answer.code, answer.problem) == (2, "error: suite s.toml has an unknown key 'python'")
