"""attnbench.jit: what recompiles, what is refused, and what is left behind."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from attnbench import jit
from attnbench.errors import AttnbenchError
from attnbench.jit import cache, toolchain

GXX = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(GXX is None, reason="no C++ compiler")


def answer(value: int | str = 42) -> str:
    return f'extern "C" int answer() {{ return {value}; }}\n'


def call(library: jit.Library) -> int:
    return int(library.load().answer())


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch) -> Path:
    """A cache of the test's own, and no compiler set from outside."""
    for name in ("CXX", "ATTNBENCH_CXX", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ATTNBENCH_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def fast() -> jit.Toolchain:
    """The real compiler without optimisation: what is tested here is not the code it makes."""
    assert GXX is not None
    return jit.Toolchain(Path(GXX), jit.version_output(Path(GXX)), ("-shared", "-fPIC"))


def script(path: Path, body: str) -> jit.Toolchain:
    """A compiler that is a shell script; $@ is what it was given."""
    version = 'if [ "$1" = --version ]; then echo fake 1.0; exit; fi\n'
    path.write_text(f"#!/bin/sh\n{version}{body}\n")
    path.chmod(0o755)
    return jit.Toolchain(path, jit.version_output(path), ("-shared", "-fPIC"))


def leftovers(root: Path) -> list[str]:
    """Names in the cache that are no entries."""
    return [path.name for path in root.iterdir() if not re.fullmatch("[0-9a-f]{64}", path.name)]


# What is compiled, and when


def test_compiles_text_once(root):
    first = jit.compile(answer())
    again = jit.compile(answer())
    assert (call(first), first.cached, again.cached) == (42, False, True)
    assert first.compile_s > 0
    assert again.compile_s == 0
    assert first.path == again.path
    assert first.path.is_relative_to(root)
    assert leftovers(root) == []


def test_entry_holds_the_source_and_its_record(root, fast, tmp_path):
    source = tmp_path / "kernel.cpp"
    source.write_text(answer())
    before = datetime.now(timezone.utc) - timedelta(seconds=1)
    path = jit.compile(source, toolchain=fast, flags=["-DX=1"]).path
    assert (path.parent / "source" / "kernel.cpp").read_text() == answer()
    record = json.loads((path.parent / "entry.json").read_text())
    assert record["flags"] == ["-shared", "-fPIC", "-DX=1"]
    (entry,) = cache.default().entries()
    assert (entry.key, entry.source, entry.compiler, entry.path) == (
        path.parent.name,
        "kernel.cpp",
        fast.version,
        path.parent,
    )
    assert before <= entry.created <= datetime.now(timezone.utc)
    files = [path, path.parent / "entry.json", path.parent / "source" / "kernel.cpp"]
    assert entry.size_bytes == sum(file.stat().st_size for file in files) == cache.default().size_bytes


@pytest.mark.parametrize("other", [answer(43), answer() + " "])
def test_source_bytes_are_in_the_key(fast, other):
    assert jit.compile(other, toolchain=fast).path != jit.compile(answer(), toolchain=fast).path


def test_flags_are_in_the_key_one_by_one(fast):
    assert call(jit.compile(answer("X"), toolchain=fast, flags=["-DX=1"])) == 1
    assert call(jit.compile(answer("X"), toolchain=fast, flags=["-DX=2"])) == 2
    keys = [
        jit._key("a.cpp", b"", [], jit.Toolchain(fast.compiler, "", base), flags)
        for base, flags in [
            ((), ["-ab", "c"]),
            ((), ["-a", "bc"]),
            ((), ["-abc"]),
            (("-ab",), ["c"]),
            (("-ab", "c"), []),
        ]
    ]
    assert len(set(keys)) == 5


def test_name_compiler_version_and_cpu_are_in_the_key(fast, tmp_path, monkeypatch):
    def key(tools: jit.Toolchain) -> str:
        return jit._key("a.cpp", b"", [], tools, [])

    keys = {key(fast), key(jit.Toolchain(fast.compiler, fast.version_output + "1", fast.flags))}
    keys.add(key(jit.Toolchain(tmp_path / "g++", fast.version_output, fast.flags)))
    keys.add(key(jit.Toolchain(fast.compiler, fast.version_output, fast.flags, ".other")))
    keys.add(jit._key("a.c", b"", [], fast, []))  # the suffix chooses the language
    monkeypatch.setattr(jit, "cpu_features", lambda: "another")
    keys.add(key(fast))
    monkeypatch.setattr(jit, "_SCHEMA", "another")
    keys.add(key(fast))
    monkeypatch.setattr(jit.sys, "platform", "another")
    keys.add(key(fast))
    assert len(keys) == 8


def test_upgraded_compiler_recompiles(tmp_path, monkeypatch):
    wrapper = tmp_path / "bin" / "g++"
    wrapper.parent.mkdir()
    script(wrapper, f'exec {GXX} "$@"')
    monkeypatch.setenv("CXX", str(wrapper))
    old = jit.compile(answer())
    assert jit.compile(answer()).cached
    wrapper.write_text(wrapper.read_text().replace("fake 1.0", "fake 1.0; echo patched"))
    new = jit.compile(answer())
    assert not new.cached
    assert new.path != old.path
    assert jit.cpp_toolchain().version == "fake 1.0"


def test_headers_are_in_the_key_recursively(fast, tmp_path):
    source, inner, shared = tmp_path / "kernel.cpp", tmp_path / "sub" / "inner.h", tmp_path / "shared.h"
    inner.parent.mkdir()
    source.write_text(f'#include <cstddef>\n#include "sub/outer.h"\n{answer("inner() + shared()")}')
    (tmp_path / "sub" / "outer.h").write_text('#pragma once\n#  include "inner.h"\n#include "../sub/outer.h"\n')
    # shared.h lies beside the source, not beside inner.h: the compiler finds it through -I
    inner.write_text("#pragma once\n#include <shared.h>\nstatic int inner() { return 1; }\n")
    shared.write_text("static int shared() { return 10; }\n")
    assert call(jit.compile(source, toolchain=fast)) == 11
    assert jit.compile(source, toolchain=fast).cached
    inner.write_text(inner.read_text().replace("1;", "2;"))
    assert call(jit.compile(source, toolchain=fast)) == 12
    shared.write_text(shared.read_text().replace("10", "20"))
    assert call(jit.compile(source, toolchain=fast)) == 22
    (inner.parent / "shared.h").write_text("static int shared() { return 30; }\n")
    assert not jit.compile(source, toolchain=fast).cached  # a new header in the way may be another answer


def test_header_that_reaches_itself_is_read_once(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "self.h").write_text('#include "../sub/self.h"\n')
    text = b'#include "sub/self.h"'
    assert [name for name, _ in jit._headers(text, [tmp_path], [], set())] == [b"sub/self.h"]


def test_headers_of_include_flags_and_absolute_names_are_in_the_key(fast, tmp_path):
    (tmp_path / "a.h").write_text("#define A 1\n")
    (tmp_path / "b.h").write_text("#define B 10\n")
    text = f'#include "a.h"\n#include "{tmp_path}/b.h"\n{answer("A + B")}'
    flags = [f"-I{tmp_path}"]
    assert call(jit.compile(text, toolchain=fast, flags=flags)) == 11
    (tmp_path / "a.h").write_text("#define A 2\n")
    assert call(jit.compile(text, toolchain=fast, flags=flags)) == 12
    text = text.partition("\n")[2].replace("A +", "3 +")
    assert call(jit.compile(text, toolchain=fast)) == 13
    (tmp_path / "b.h").write_text("#define B 20\n")
    assert call(jit.compile(text, toolchain=fast)) == 23


def test_moving_a_source_does_not_recompile(fast, tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "kernel.cpp").write_text(f'#include "value.h"\n{answer("VALUE")}')
        (tmp_path / folder / "value.h").write_text("#define VALUE 5\n")
    jit.compile(tmp_path / "one" / "kernel.cpp", toolchain=fast)
    assert jit.compile(tmp_path / "two" / "kernel.cpp", toolchain=fast).cached


def test_header_that_changes_meanwhile_leaves_no_entry(root, tmp_path):
    (tmp_path / "value.h").write_text("#define VALUE 5\n")
    (tmp_path / "kernel.cpp").write_text(f'#include "value.h"\n{answer("VALUE")}')
    tools = script(tmp_path / "edits", f'{GXX} "$@"; echo "#define VALUE 6" > {tmp_path}/value.h')
    with pytest.raises(AttnbenchError, match=r"a header of kernel\.cpp changed while it was compiled"):
        jit.compile(tmp_path / "kernel.cpp", toolchain=tools)
    assert list(root.iterdir()) == []
    assert call(jit.compile(tmp_path / "kernel.cpp", toolchain=tools)) == 6


# How the compiler is run


def test_compiler_gets_arguments_and_a_small_environment(root, tmp_path, monkeypatch):
    monkeypatch.setenv("CPATH", "/somewhere")
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    spy = f'printf "%s\\n" "$@" > {tmp_path}/args; env > {tmp_path}/env; pwd -P > {tmp_path}/cwd; cat > {tmp_path}/in'
    tools = script(tmp_path / "spy", f'{spy}; exec {GXX} "$@"')
    (tmp_path / "kernel.cpp").write_text(answer())
    (tmp_path / "stdin").write_text("not for the compiler")
    ours = os.dup(0)
    with (tmp_path / "stdin").open() as stdin:
        os.dup2(stdin.fileno(), 0)
    try:
        jit.compile(tmp_path / "kernel.cpp", toolchain=tools, flags=["-DX=a b"])
    finally:
        os.dup2(ours, 0)
        os.close(ours)
    assert (tmp_path / "in").read_text() == ""
    suffix = tools.suffix
    assert (tmp_path / "args").read_text().split("\n") == [
        "-shared", "-fPIC", f"-I{tmp_path}", "source/kernel.cpp", "-o", f"library{suffix}", "-DX=a b", "",
    ]  # fmt: skip
    environment = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines())
    cwd = (tmp_path / "cwd").read_text().strip()
    assert environment["LC_ALL"] == "C"
    assert environment["PATH"] == os.environ["PATH"]
    assert os.path.realpath(environment["TMPDIR"]) == cwd
    assert "CPATH" not in environment
    assert Path(cwd).parent == root.resolve()


@pytest.mark.parametrize(
    "name",
    ["a b.cpp", "$(touch x).cpp", "`touch x`;touch x;.cpp", 'it\'s "q".cpp', "-o x.cpp", "@x.cpp", "entry.json.cpp"],
)
def test_file_names_reach_no_shell(fast, tmp_path, monkeypatch, name):
    folder = tmp_path / "d $(touch x) 'e\""
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / name).write_text(f'#include "h.h"\n{answer("H")}')
    (folder / "h.h").write_text("#define H 7\n")
    library = jit.compile(Path(name), toolchain=fast)
    assert call(library) == 7
    assert sorted(os.listdir(folder)) == sorted([name, "h.h"])
    assert sorted(os.listdir(library.path.parent)) == ["entry.json", library.path.name, "source"]


def test_compile_error_names_file_and_line_and_keeps_the_log(root, fast, tmp_path):
    (tmp_path / "broken.cpp").write_text("int x;\nint f() { return nothing; }\nint g() { return nowhere; }\n")
    with pytest.raises(jit.CompileError) as caught:
        jit.compile(tmp_path / "broken.cpp", toolchain=fast)
    assert re.match(r"broken\.cpp:2:\d+: error: .*nothing", caught.value.message)
    assert "\n" not in caught.value.message
    assert "nowhere" in caught.value.log
    assert list(root.iterdir()) == []
    assert pickle.loads(pickle.dumps(caught.value)).log == caught.value.log


def test_error_in_a_header_names_the_header(fast, tmp_path):
    (tmp_path / "kernel.cpp").write_text('#include "bad.h"\n')
    (tmp_path / "bad.h").write_text("int f() { return nothing; }\n")
    with pytest.raises(jit.CompileError, match=r"^bad\.h:1:\d+: error: "):
        jit.compile(tmp_path / "kernel.cpp", toolchain=fast)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "echo '/usr/bin/ld: cannot find -lx' >&2; echo 'collect2: error: ld failed' >&2; exit 1",
            "ld: cannot find -lx",
        ),
        ("echo 'spy: fatal error: no space' >&2; exit 1", "spy: fatal error: no space"),
        ("exit 3", "spy: exit status 3"),
        ("kill -9 $$", "spy: killed by signal 9"),
        ("exit 0", "spy made no library"),
    ],
)
def test_every_way_to_fail_is_a_compile_error(root, tmp_path, body, message):
    tools = script(tmp_path / "spy", body)
    with pytest.raises(jit.CompileError) as caught:
        jit.compile(answer(), toolchain=tools)
    assert caught.value.message == message
    assert list(root.iterdir()) == []


def test_timeout_is_a_compile_error(root, tmp_path):
    tools = script(tmp_path / "slow", "echo thinking >&2; exec sleep 60")
    with pytest.raises(jit.CompileError, match=r"^slow took more than 0\.5 s$") as caught:
        jit.compile(answer(), toolchain=tools, timeout_s=0.5)
    assert caught.value.log == "thinking\n"
    assert list(root.iterdir()) == []


def test_compiler_that_is_gone_is_a_compile_error(root, tmp_path):
    with pytest.raises(jit.CompileError, match=r"^gone cannot be run: "):
        jit.compile(answer(), toolchain=jit.Toolchain(tmp_path / "gone", "1", ()))
    assert list(root.iterdir()) == []


def test_missing_source_is_an_error(tmp_path):
    with pytest.raises(AttnbenchError, match=r"cannot read .*none\.cpp: No such file or directory$"):
        jit.compile(tmp_path / "none.cpp")


def test_library_that_does_not_load_is_a_compile_error(fast):
    library = jit.compile('extern "C" int nowhere(); int (*keep)() = nowhere;', toolchain=fast)
    with pytest.raises(jit.CompileError, match="nowhere"):
        library.load()


# Which compiler


def test_no_compiler_on_path(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(jit.ToolchainMissing) as caught:
        jit.compile(answer())
    assert caught.value.message == "no C++ compiler on PATH"
    assert caught.value.hint == "install g++ (apt-get install g++) or set CXX"


@pytest.mark.parametrize("variable", ["CXX", "ATTNBENCH_CXX"])
def test_named_compiler_is_used_or_missed(monkeypatch, tmp_path, variable):
    monkeypatch.setenv(variable, "no-such-c++")
    with pytest.raises(jit.ToolchainMissing, match="'no-such-c\\+\\+', set by ATTNBENCH_CXX or CXX, was not found"):
        jit.cpp_toolchain()
    script(tmp_path / "mine", "")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(variable, "./mine")
    assert jit.cpp_toolchain().compiler == tmp_path / "mine"


def test_first_of_three_names_is_taken(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("clang++", "g++", "c++"):
        (tmp_path / name).write_text('#!/bin/sh\necho "$0"\n')
        (tmp_path / name).chmod(0o755)
        assert jit.cpp_toolchain().version == str(tmp_path / name)


@pytest.mark.parametrize(("body", "reason"), [("exit 2", "exit status 2"), ("exec sleep 60", "took more than 0.3 s")])
def test_compiler_without_a_version_is_missing(monkeypatch, tmp_path, body, reason):
    monkeypatch.setattr(toolchain, "_VERSION_TIMEOUT_S", 0.3)
    (tmp_path / "c++").write_text(f"#!/bin/sh\n{body}\n")
    (tmp_path / "c++").chmod(0o755)
    with pytest.raises(jit.ToolchainMissing) as caught:
        jit.version_output(tmp_path / "c++")
    assert caught.value.message == f"{tmp_path / 'c++'} --version: {reason}"


# Who may touch an entry


def rebuilt(before: jit.Library, source: str, tools: jit.Toolchain) -> None:
    after = jit.compile(source, toolchain=tools)
    assert (after.cached, after.path) == (False, before.path)
    assert not after.path.is_symlink()
    assert call(after) == 42
    assert jit.compile(source, toolchain=tools).cached
    assert leftovers(after.path.parents[1]) == []


def corrupt_library(entry: Path) -> None:
    library = next(entry.glob("library*"))
    library.write_bytes(library.read_bytes()[:-1] + b"!")


def foreign_owner(path: Path) -> None:
    if os.getuid():
        pytest.skip("only root can give files away")
    os.chown(path, 65534, -1)


ATTACKS = {
    "corrupt library": corrupt_library,
    "no library": lambda entry: next(entry.glob("library*")).unlink(),
    "no record": lambda entry: (entry / "entry.json").unlink(),
    "record is no JSON": lambda entry: (entry / "entry.json").write_text("{"),
    "record is a list": lambda entry: (entry / "entry.json").write_text("[]"),
    "another hash": lambda entry: (entry / "entry.json").write_text(
        json.dumps({"key": entry.name, "sha256": "0" * 64})
    ),
    "another key": lambda entry: (entry / "entry.json").write_text(
        json.dumps(json.loads((entry / "entry.json").read_text()) | {"key": "0" * 64})
    ),
    "group-writable entry": lambda entry: entry.chmod(0o770),
    "world-writable library": lambda entry: next(entry.glob("library*")).chmod(0o702),
    "group-writable record": lambda entry: (entry / "entry.json").chmod(0o620),
    "a pipe among the files": lambda entry: os.mkfifo(entry / "pipe", 0o600),
    "foreign entry": foreign_owner,
    "foreign library": lambda entry: foreign_owner(next(entry.glob("library*"))),
    "foreign record": lambda entry: foreign_owner(entry / "entry.json"),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_entry_that_is_off_is_rebuilt(fast, attack):
    library = jit.compile(answer(), toolchain=fast)
    attack(library.path.parent)
    rebuilt(library, answer(), fast)


@pytest.mark.parametrize("part", ["entry", "library", "record"])
def test_symlink_is_replaced_and_its_target_stays(fast, tmp_path, part):
    library = jit.compile(answer(), toolchain=fast)
    entry = library.path.parent
    link = {"entry": entry, "library": library.path, "record": entry / "entry.json"}[part]
    target = tmp_path / "target"
    link.rename(target)
    link.symlink_to(target)
    before = sorted(tmp_path.glob("target/**/*"))
    assert part != "entry" or cache.default().entries() == []
    rebuilt(library, answer(), fast)
    assert target.exists()
    assert sorted(tmp_path.glob("target/**/*")) == before


def test_entry_that_is_a_file_is_rebuilt(fast):
    library = jit.compile(answer(), toolchain=fast)
    shutil.rmtree(library.path.parent)
    library.path.parent.write_text("in the way")
    rebuilt(library, answer(), fast)


def test_umask_does_not_open_entries(fast):
    previous = os.umask(0)
    try:
        library = jit.compile(answer(), toolchain=fast)
    finally:
        os.umask(previous)
    assert jit.compile(answer(), toolchain=fast).cached
    assert {path.stat().st_mode & 0o077 for path in (library.path, *library.path.parents[1].rglob("*"))} == {0}


def test_root_is_made_private_or_tightened(root, fast):
    jit.compile(answer(), toolchain=fast)
    assert root.stat().st_mode & 0o777 == 0o700
    root.chmod(0o777)
    assert jit.compile(answer(), toolchain=fast).cached
    assert root.stat().st_mode & 0o777 == 0o700


def test_lock_that_is_a_link_is_not_followed(root, fast, tmp_path):
    key = jit.compile(answer(), toolchain=fast).path.parent.name
    cache.default().clear()
    (root / f"{key}.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(AttnbenchError, match="cannot write to the kernel cache"):
        jit.compile(answer(), toolchain=fast)
    assert not (tmp_path / "victim").exists()


# Which root


def unusable(kind: str, path: Path) -> None:
    if kind == "under a file":
        path.parent.write_text("")
    elif kind == "symlink":
        path.parent.mkdir()
        (path.parent / "real").mkdir()
        path.symlink_to(path.parent / "real")
    else:
        path.mkdir(parents=True)
        foreign_owner(path)


@pytest.mark.parametrize("kind", ["under a file", "symlink", "foreign"])
def test_explicit_root_that_cannot_be_used_is_an_error(monkeypatch, tmp_path, kind):
    path = tmp_path / "base" / "attnbench"
    unusable(kind, path)
    monkeypatch.setenv("ATTNBENCH_CACHE_DIR", str(path))
    with pytest.raises(AttnbenchError, match=r"^ATTNBENCH_CACHE_DIR=.* cannot be used: ") as caught:
        jit.compile(answer())
    assert caught.value.hint == "name a folder of your own that can be written, or unset it"


@pytest.mark.parametrize("kind", ["under a file", "symlink", "foreign"])
def test_implicit_root_that_cannot_be_used_is_replaced(monkeypatch, tmp_path, kind):
    path = tmp_path / "base" / "attnbench"
    unusable(kind, path)
    monkeypatch.delenv("ATTNBENCH_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(path.parent))
    root = cache.default().root
    assert not root.is_relative_to(tmp_path / "base")
    assert root.stat().st_mode & 0o777 == 0o700
    assert cache.default().root == root


def test_order_of_roots(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.default().root == tmp_path / "cache"
    monkeypatch.delenv("ATTNBENCH_CACHE_DIR")
    assert cache.default().root == tmp_path / "xdg" / "attnbench"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache.default().root == tmp_path / "home" / ".cache" / "attnbench"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache.default().root == tmp_path / "home" / ".cache" / "attnbench"


SHOW_ROOT = """
import os, sys
from attnbench import jit
if sys.argv[1] == "no passwd":
    import pwd
    def getpwuid(uid): raise KeyError(uid)
    pwd.getpwuid = getpwuid
source = 'extern "C" int answer() { return 42; }'
library = jit.compile(source, flags=["-O0"])
if os.fork() == 0:
    sys.exit()  # runs the atexit functions of the parent
os.wait()
print(library.path.parents[1], library.load().answer(), jit.compile(source, flags=["-O0"]).cached)
"""


@pytest.mark.parametrize(("home", "passwd"), [("/dev/null", ""), ("relative", ""), (None, "no passwd")])
def test_without_a_home_the_cache_lives_as_long_as_the_process(monkeypatch, tmp_path, home, passwd):
    monkeypatch.delenv("ATTNBENCH_CACHE_DIR")
    monkeypatch.delenv("HOME")
    if home:
        monkeypatch.setenv("HOME", home)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    command = [sys.executable, "-c", SHOW_ROOT, passwd]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout.split()
    assert Path(shown[0]).parent == tmp_path / "tmp"
    assert shown[1:] == ["42", "True"]
    assert list((tmp_path / "tmp").iterdir()) == []


# Many processes, killed processes, full disks

COMPILE = """
import sys
from pathlib import Path
from attnbench import jit
path = Path(sys.argv[1])
tools = jit.Toolchain(path, jit.version_output(path), ("-shared", "-fPIC"))
sys.stdin.readline()
library = jit.compile('extern "C" int answer() { return 42; }', toolchain=tools)
print(library.cached, library.load().answer())
"""


def start(tools: jit.Toolchain) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", COMPILE, str(tools.compiler)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_four_processes_compile_once(root, tmp_path):
    tools = script(tmp_path / "counting", f'echo run >> {tmp_path}/log; sleep 0.3; exec {GXX} "$@"')
    processes = [start(tools) for _ in range(4)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    printed = sorted(process.communicate()[0] for process in processes)
    assert printed == ["False 42\n", "True 42\n", "True 42\n", "True 42\n"]
    assert (tmp_path / "log").read_text() == "run\n"
    assert leftovers(root) == []


def test_killed_process_blocks_nobody_and_its_staging_goes(root, tmp_path):
    os.mkfifo(tmp_path / "started")
    hanging = script(tmp_path / "hanging", f"echo half > library.so; echo $$ > {tmp_path}/started; exec sleep 60")
    process = start(hanging)
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    compiler = int((tmp_path / "started").read_text())
    process.kill()
    process.communicate()
    os.kill(compiler, signal.SIGKILL)
    assert sorted(name[64:73] for name in leftovers(root)) == [".lock", ".staging-"]
    script(hanging.compiler, f'exec {GXX} "$@"')
    assert call(jit.compile(answer(), toolchain=hanging)) == 42  # the same key
    assert leftovers(root) == []


def test_staging_of_a_living_process_stays(root, fast):
    key = "0" * 64
    staging = root / f"{key}.staging-abc"
    staging.mkdir(parents=True)
    with cache.default()._lock(key):
        jit.compile(answer(), toolchain=fast)
        assert staging.exists()
    jit.compile(answer(1), toolchain=fast)
    assert not staging.exists()


def test_lock_file_deleted_while_waiting_is_taken_anew(tmp_path):
    path = tmp_path / "lock"
    deleted = os.open(path, os.O_CREAT | os.O_RDWR)
    fcntl.flock(deleted, fcntl.LOCK_EX)
    code = (
        "import fcntl, sys, pathlib; from attnbench.jit import cache; path = pathlib.Path(sys.argv[1]);"
        "fd = open(path); print('open', flush=True); cache._open_locked(path, fcntl.LOCK_EX); print(path.exists())"
    )
    waiting = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert waiting.stdout is not None
    assert waiting.stdout.readline() == "open\n"
    path.unlink()
    os.close(deleted)
    assert waiting.communicate()[0] == "True\n"


def test_full_disk_leaves_nothing(root, fast, tmp_path):
    """A file size limit stands in for the disk; each write that can hit it is hit once."""
    big = "//" + "x" * 200_000 + "\n" + answer()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    jit.compile(answer(), toolchain=fast)
    for limit in (100, 300_000):
        size = f"\nchar big[{limit * 4}] = {{1}};\n" if limit > 200_000 else ""
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(AttnbenchError) as caught:
                jit.compile(big + size, toolchain=fast)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        if limit == 100:
            assert caught.value.message == f"cannot write to the kernel cache {root}: File too large"
        else:
            assert isinstance(caught.value, jit.CompileError)
        assert leftovers(root) == []
        assert len(cache.default().entries()) == 1


# attnbench cache


def test_entries_are_sorted_and_skip_what_is_unreadable(root, fast):
    paths = [jit.compile(answer(value), toolchain=fast).path.parent for value in (3, 1, 2)]
    assert [entry.path for entry in cache.default().entries()] == paths
    record = json.loads((paths[1] / "entry.json").read_text())
    (paths[1] / "entry.json").write_text(json.dumps(record | {"created_s": 1e300}))
    (paths[2] / "entry.json").unlink()
    assert [entry.path for entry in cache.default().entries()] == paths[:1]
    assert cache.default().size_bytes > cache.default().entries()[0].size_bytes


def test_clear_frees_what_is_ours_and_idle(root, fast, tmp_path):
    idle, busy = (jit.compile(answer(value), toolchain=fast).path.parent for value in (1, 2))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").write_text("stays" * 100_000)
    (root / ("a" * 64)).symlink_to(tmp_path / "elsewhere")
    (root / f"{'b' * 64}.staging-x").mkdir()
    (root / f"{'b' * 64}.staging-x" / "half").write_text("12345")
    (idle / "source" / "link").symlink_to(tmp_path / "elsewhere")
    (root / "notes.txt").write_text("somebody's own")
    everything = cache.default().size_bytes
    with cache.default()._lock(busy.name):
        freed = cache.default().clear()
        assert sorted(path.name for path in root.iterdir()) == sorted([busy.name, f"{busy.name}.lock", "notes.txt"])
        assert freed == everything - cache.default().size_bytes
        assert 5 < freed < 500_000
    assert (tmp_path / "elsewhere" / "precious").read_text() == "stays" * 100_000
    assert cache.default().clear() > 0
    assert [path.name for path in root.iterdir()] == ["notes.txt"]
    assert cache.default().clear() == 0


def test_cache_that_was_never_made_is_empty(tmp_path):
    nowhere = jit.Cache(tmp_path / "nowhere")
    assert (nowhere.entries(), nowhere.size_bytes, nowhere.clear()) == ([], 0, 0)


def test_library_is_plain_ctypes(fast):
    assert isinstance(jit.compile(answer(), toolchain=fast).load(), ctypes.CDLL)


def test_torch_is_not_imported():
    code = "import sys, attnbench.jit; print({'torch', 'pandas', 'numpy'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


# Other compilers


def test_a_compile_error_shows_the_line_of_the_source(fast, tmp_path):
    (tmp_path / "broken.cpp").write_text("int x;\n  int f() { return nothing; }\n")
    with pytest.raises(jit.CompileError) as caught:
        jit.compile(tmp_path / "broken.cpp", toolchain=fast)
    assert caught.value.message.endswith(" | int f() { return nothing; }")


def test_nvccs_way_to_name_a_line_is_understood(tmp_path):
    body = "echo 'source/source.cpp(2): error: identifier \"y\" is undefined' >&2; exit 1"
    with pytest.raises(jit.CompileError) as caught:
        jit.compile("int x;\nint z = y;\n", toolchain=script(tmp_path / "nvcc", body))
    assert caught.value.message == 'source.cpp(2): error: identifier "y" is undefined | int z = y;'


def tool(path: Path) -> Path:
    """An executable that answers --version."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\necho fake 2.0\n")
    path.chmod(0o755)
    return path


def test_nvcc_is_looked_for_where_it_may_be(monkeypatch, tmp_path):
    for name in ("ATTNBENCH_NVCC", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(toolchain.settings, "nvcc", lambda: ["/nowhere/nvcc", "/nowhere/else"])
    with pytest.raises(jit.ToolchainMissing, match=r"^there is no nvcc$"):
        jit.cuda_toolchain("sm_80")
    monkeypatch.undo()
    monkeypatch.setenv("ATTNBENCH_NVCC", str(tmp_path / "none"))
    with pytest.raises(jit.ToolchainMissing, match="set by ATTNBENCH_NVCC to "):
        jit.cuda_toolchain("sm_80")
    named = tool(tmp_path / "nvcc")
    monkeypatch.setenv("ATTNBENCH_NVCC", str(named))
    found = jit.cuda_toolchain("sm_90a")
    assert found.compiler == named
    assert "-arch=sm_90a" in found.flags
    assert found.version_output.startswith("fake 2.0\n")
    assert found.version_output != "fake 2.0\n"  # the host compiler's is part of it


def test_without_a_gpu_an_architecture_must_be_named():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert (jit.missing(jit.cuda_toolchain) or "").startswith("this torch is built without CUDA: ")


def test_pto_needs_bisheng_and_headers_and_says_which_is_missing(monkeypatch, tmp_path):
    for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME", "PTO_LIB_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "CANN's compiler bisheng is not on PATH" in (jit.missing(jit.pto_toolchain) or "")
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path / "gone"))
    assert f"bisheng is neither on PATH nor in {tmp_path}/gone/bin" in (jit.missing(jit.pto_toolchain) or "")
    assert f"the toolkit is not in {tmp_path}/gone" in (jit.missing(jit.pto_toolchain) or "")
    monkeypatch.delenv("ASCEND_HOME_PATH")
    compiler = tool(tmp_path / "cann" / "bin" / "bisheng")
    monkeypatch.setenv("PATH", os.defpath)
    monkeypatch.setenv("ASCEND_TOOLKIT_HOME", str(tmp_path / "cann"))
    assert (jit.missing(jit.pto_toolchain) or "").startswith("PTO's headers are not there: set PTO_LIB_PATH")
    monkeypatch.setenv("PTO_LIB_PATH", str(tmp_path / "pto"))
    there_is_none = f"there is no include/pto in PTO_LIB_PATH, {tmp_path / 'pto'}: "
    assert (jit.missing(jit.pto_toolchain) or "").startswith(there_is_none)
    (tmp_path / "pto" / "include" / "pto").mkdir(parents=True)
    found = jit.pto_toolchain()
    assert found.compiler == compiler
    assert {"--npu-arch=dav-2201", f"-I{tmp_path / 'pto' / 'include'}"} <= set(found.flags)
    on_path = tool(tmp_path / "path" / "bisheng")
    monkeypatch.setenv("PATH", f"{on_path.parent}{os.pathsep}{os.defpath}")
    assert jit.pto_toolchain().compiler == on_path


# The limit


def test_beyond_its_limit_the_cache_drops_what_was_not_used_for_longest(fast, monkeypatch):
    paths = [jit.compile(answer(value), toolchain=fast).path.parent for value in (1, 2, 3)]
    for age_s, path in zip((300, 200, 100), paths):
        at_s = (path / "entry.json").stat().st_mtime - age_s
        os.utime(path / "entry.json", (at_s, at_s))
    assert jit.compile(answer(1), toolchain=fast).cached  # so it was used last
    kept = cache.Cache(paths[0].parent)
    total = kept.size_bytes
    monkeypatch.setattr(toolchain.settings, "cache_limit_bytes", lambda: total + 100)
    newest = jit.compile(answer(4), toolchain=fast).path.parent
    assert {entry.path for entry in kept.entries()} == {paths[0], paths[2], newest}
    monkeypatch.setattr(toolchain.settings, "cache_limit_bytes", lambda: 0)
    last = jit.compile(answer(5), toolchain=fast).path.parent
    assert [entry.path for entry in kept.entries()] == [last]


@pytest.mark.parametrize("value", ["-1", "lots", "1.5"])
def test_a_limit_that_is_no_number_of_mib_is_an_error(fast, monkeypatch, value):
    monkeypatch.setenv("ATTNBENCH_CACHE_LIMIT", value)
    with pytest.raises(AttnbenchError, match="ATTNBENCH_CACHE_LIMIT must be a whole number of MiB"):
        jit.compile(answer(), toolchain=fast)
