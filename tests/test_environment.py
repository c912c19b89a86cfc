"""attnbench.environment: what a run records of the machine, and what it never does."""

from __future__ import annotations

import json
import os
import platform
import socket
import sys
from pathlib import Path

import pytest
import torch

from attnbench import contention, environment
from attnbench.contention import Load
from attnbench.devices.cpu import cpu_name
from attnbench.environment import ENVIRONMENT_VARIABLES, command, fingerprint
from attnbench.registry import BackendInfo, Catalogue, EntryPointRef, PluginInfo
from attnbench.text import without_home

HERE = EntryPointRef("toy-dist", "1.5", "toy", "toy_module")
ELSEWHERE = EntryPointRef("toy-dist", "1.7", "toy", "toy_module", "/home/jane/python")
THIRD = EntryPointRef("other-dist", "2.1", "other", "other_module", "/home/jane/other/python")
CATALOGUE = Catalogue(
    plugins=(
        PluginInfo(ELSEWHERE, ("t",), (), 0.1, None),
        PluginInfo(HERE, ("toy",), (), 0.1, None),
        PluginInfo(THIRD, ("u",), (), 0.1, None),
        PluginInfo(EntryPointRef("broken-dist", "2", "broken", "m"), (), (), 0.1, "File /home/jane/secret.py\nError"),
    ),
    backends=(
        BackendInfo("toy", "cpu", "", "", True, None, HERE, (("ovens", "1.2"), ("pans", ""))),
        BackendInfo("t", "cpu", "", "", True, None, ELSEWHERE, (("torch", "2.6.0"), ("ovens", "0.9"))),
        BackendInfo("u", "cpu", "", "", True, None, THIRD, (("torch", "2.7.1"), ("ovens", "0.8"), ("pans", ""))),
    ),
    suites=(),
)


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch):
    """None of the settings that a fingerprint records, not even those that the other tests need."""
    for name in ENVIRONMENT_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_the_fingerprint_is_an_allow_list():
    assert set(fingerprint(CATALOGUE)) == {
        "python",
        "platform",
        "kernel",
        "cpu",
        "cpu_count",
        "threads",
        "torch_cpu_capability",
        "cuda",
        "cudnn",
        "nvidia_driver",
        "libraries",
        "libraries_of_other_interpreters",
        "plugins",
        "plugins_of_other_interpreters",
        "sources",
        "variables",
        "pto_toolchain",
        "defaults_of_unset_variables",
    }


CUDNNS = [(91_900, "9.19.0"), (8_902, "8.9.2"), (90_501, "9.5.1"), (None, None)]


@pytest.mark.parametrize(("number", "words"), CUDNNS)
def test_the_version_of_cudnn_is_read_from_its_number(monkeypatch, number, words):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: number)
    assert fingerprint(CATALOGUE)["cudnn"] == words


def test_the_driver_is_what_its_kernel_module_says(tmp_path):
    told = tmp_path / "version"
    assert environment._driver_version(told) is None
    told.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.04  Tue\nGCC version:  gcc 13.3.0\n")
    assert environment._driver_version(told) == "580.159.04"
    told.write_text("")
    assert environment._driver_version(told) is None


def test_the_fingerprint_says_what_a_number_depends_on():
    found = fingerprint(CATALOGUE)
    assert found["python"] == platform.python_version()
    assert found["threads"] == torch.get_num_threads()
    assert found["cpu"] == cpu_name()
    assert found["cpu_count"] == len(os.sched_getaffinity(0))
    assert found["libraries"]["torch"] == torch.__version__
    assert found["libraries"]["attnbench"]
    assert found["libraries"]["ovens"] == "1.2"
    assert "pans" not in found["libraries"], "it is not installed"
    assert found["libraries_of_other_interpreters"] == {
        "t on cpu": {"torch": "2.6.0", "ovens": "0.9"},
        "u on cpu": {"torch": "2.7.1", "ovens": "0.8"},
    }
    assert found["plugins"] == {"toy-dist": "1.5"}
    assert found["plugins_of_other_interpreters"] == {"toy-dist": "1.7", "other-dist": "2.1"}
    assert "torch-npu" not in found["libraries"]
    assert found["defaults_of_unset_variables"] == {}


def test_no_name_of_user_or_host_and_no_secret_is_in_it(monkeypatch):
    host = "host-a1b2c3.example.org"
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    monkeypatch.setattr(platform, "node", lambda: host)
    monkeypatch.setattr(platform, "release", lambda: f"6.1.0-{host}")
    secrets = {
        "HOME": "/home/jane",
        "USER": "jane",
        "HOSTNAME": host,
        "HF_TOKEN": "hf_s3cr3t",
        "PATH": "/home/jane/bin",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "/home/jane/threads")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "$(cat token hf_s3cr3t)")
    text = json.dumps(fingerprint(CATALOGUE))
    for secret in ("jane", host, "hf_s3cr3t", os.getcwd()):
        assert secret not in text
    assert json.loads(text)["kernel"] == "6.1.0"


@pytest.mark.parametrize("value", ["2", "0,1,2", "0-7", "close", "PASSIVE", "FALSE", ""])
def test_settings_that_move_timings_are_recorded(monkeypatch, value):
    for name in ENVIRONMENT_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert fingerprint(CATALOGUE)["variables"] == {}
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    monkeypatch.setenv("OMP_SECRET", "x")
    assert fingerprint(CATALOGUE)["variables"] == {"OMP_NUM_THREADS": value}


def test_beside_torch_npu_the_default_of_a_variable_that_is_not_set_is_recorded(monkeypatch):
    monkeypatch.setattr(environment, "installed_version", lambda name: "2.13.0")
    queue_and_more = {"ASCEND_LAUNCH_BLOCKING": "0", "PER_STREAM_QUEUE": "0", "TASK_QUEUE_ENABLE": "1"}
    assert fingerprint(CATALOGUE)["defaults_of_unset_variables"] == queue_and_more
    monkeypatch.setenv("TASK_QUEUE_ENABLE", "2")
    found = fingerprint(CATALOGUE)
    assert found["variables"] == {"TASK_QUEUE_ENABLE": "2"}
    assert "TASK_QUEUE_ENABLE" not in found["defaults_of_unset_variables"]


@pytest.mark.parametrize("value", ["/home/jane", "~/x", "a b", "a=b", "a\nb", "x" * 41, "ü"])
def test_a_value_that_is_no_number_list_or_word_is_left_out(monkeypatch, value):
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert "OMP_NUM_THREADS" not in fingerprint(CATALOGUE)["variables"]


# The command line


@pytest.mark.parametrize(
    ("word", "kept"),
    [
        ("run", "run"),
        ("--seqlen-q", "--seqlen-q"),
        ("128,1k", "128,1k"),
        ("--iters=20", "--iters=20"),
        ("/home/jane/suites/mine.toml", "mine.toml"),
        ("--suite=/home/jane/mine.toml", "--suite=mine.toml"),
        ("../private/mine.toml", "mine.toml"),
        ("/home/jane/runs/", "runs"),
        ("sdpa=/home/jane/venv/bin/python", "sdpa=python"),
        ("--python=sdpa=/home/jane/venv/bin/python", "--python=sdpa=python"),
        ("/home/jane/lr=1", "lr=1"),
        ("/home/jane/lr=1/mine.toml", "mine.toml"),
        ("--out=/home/jane/lr=1/run", "--out=run"),
    ],
)
def test_the_command_keeps_what_was_run_and_not_where(word, kept):
    assert command([word]) == ["attnbench", kept]


def test_the_command_is_this_processs_without_its_program(monkeypatch):
    monkeypatch.setattr(environment.sys, "argv", ["/home/jane/bin/attnbench", "run", "--out", "/home/jane/x"])
    assert command() == ["attnbench", "run", "--out", "x"]


# Home


@pytest.mark.parametrize(
    ("home", "text", "cleaned"),
    [
        ("/home/jane", "in /home/jane/x.py", "in ~/x.py"),
        ("/home/jane/", "in /home/jane/x.py and '/home/jane'", "in ~/x.py and '~'"),
        ("/home/jane", "/home/janet/x and /home/jane", "/home/janet/x and ~"),
        ("/", "in /etc/x", "in /etc/x"),
        ("/root", "no path", "no path"),
    ],
)
def test_the_home_folder_becomes_a_tilde(monkeypatch, home, text, cleaned):
    monkeypatch.setenv("HOME", home)
    assert without_home(text) == cleaned


def test_the_busy_share_is_what_others_and_the_hypervisor_take(monkeypatch):
    samples = iter(
        [
            Load(processors=2, total=1000, idle=100, steal=5, own=10),
            Load(processors=2, total=1100, idle=130, steal=15, own=20),
        ]
    )
    monkeypatch.setattr(contention, "sample", lambda: next(samples))
    assert environment.busy_share(0) == pytest.approx(0.6)  # 100 ticks, of which 30 idle and 10 own


def test_without_proc_stat_there_is_no_busy_share(monkeypatch):
    monkeypatch.setattr(contention, "sample", lambda: None)
    assert environment.busy_share(0) is None


def test_what_another_system_cannot_do_is_told_and_linux_can_do_all(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    assert environment.limitations() == ()
    monkeypatch.setattr(sys, "platform", "darwin")
    outlive, load = environment.limitations()
    assert "may outlive attnbench" in outlive
    assert "load of other programs and of other virtual machines is not read" in load


def test_two_backends_from_files_and_two_of_one_name_are_all_in_what_a_run_records(tmp_path):
    plugins = []
    for folder, file, distribution in (("a", "k.py", "k.py"), ("b", "k.py", "k.py"), ("a", "l.py", "l.py")):
        path = tmp_path / folder / file
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{folder} {file}")
        ref = EntryPointRef(distribution, "", "K", f"{path}:K")
        plugins.append(PluginInfo(ref, ("k",), (), 0.1, None, (str(path),)))
    before = environment.fingerprint(Catalogue(tuple(plugins), (), ()))["sources"]
    assert before.keys() == {"k.py:K", "l.py:K"}
    for plugin in plugins:
        path = Path(plugin.sources[0])
        was = path.read_text()
        path.write_text("changed")
        assert environment.fingerprint(Catalogue(tuple(plugins), (), ()))["sources"] != before
        path.write_text(was)


def test_what_compiles_for_an_npu_is_recorded_without_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnbench import jit

    assert fingerprint(CATALOGUE)["pto_toolchain"] == []
    said = "bisheng 8.5.0\nInstalledDir: /opt/somebody\n\nVersion=9.1.0\nC:\\there\n"
    monkeypatch.setattr(jit, "pto_toolchain", lambda: jit.Toolchain(Path("bisheng"), said, ()))
    assert fingerprint(CATALOGUE)["pto_toolchain"] == ["bisheng 8.5.0", "Version=9.1.0"]
