"""attnbench.processes: a real tree of processes, whoever of a process's threads started them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from attnbench import processes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")

TREE = """
import os, subprocess, threading, time

def tell(process):
    os.write(1, f"{process.pid}\\n".encode())  # in one piece, as two threads tell

def start():
    tell(subprocess.Popen(["sleep", "600"], start_new_session=True))
    time.sleep(600)

start_by_thread = threading.Thread(target=start, daemon=True)
start_by_thread.start()
tell(subprocess.Popen(["sleep", "600"]))
time.sleep(600)
"""


@pytest.fixture
def tree() -> Iterator[set[int]]:
    """The process ids of a child of ours and its two children, one of which a second thread started."""
    child = subprocess.Popen([sys.executable, "-c", TREE], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    started = {child.pid, int(child.stdout.readline()), int(child.stdout.readline())}
    yield started
    for pid in started:
        os.kill(pid, 9)
    child.wait()


def ours(pids: set[int], found: dict[int, list[str]]) -> set[int]:
    return pids & found.keys()


def test_all_descendants_are_found_whichever_thread_started_them(tree: set[int]) -> None:
    found = processes.descendants(os.getpid())
    assert ours(tree, found) == tree
    # D too: one that has just been started may still be waiting for the disk.
    assert {found[pid][processes.STATE] for pid in tree} <= set("RSD")
    assert {int(found[pid][processes.PARENT]) for pid in tree} == {os.getpid(), top_of(tree)}


def top_of(tree: set[int]) -> int:
    """The one of them that has children."""
    (parent,) = (pid for pid in tree if processes.descendants(pid))
    return parent


def test_a_kernel_without_lists_of_children_is_searched_and_gives_the_same(
    tree: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    by_list = processes.descendants(os.getpid())
    monkeypatch.setattr(processes.os.path, "exists", lambda _: False)
    assert ours(tree, processes.descendants(os.getpid())) == ours(tree, by_list) == tree


def test_a_stopped_one_shows_it_and_a_dead_one_that_nobody_waited_for_is_still_there(tree: set[int]) -> None:
    top = top_of(tree)
    (first, second) = sorted(tree - {top})
    os.kill(first, 19)
    os.kill(second, 9)
    until = time.monotonic() + 10
    wanted = {first: "T", second: "Z"}
    while time.monotonic() < until:
        states = {pid: fields[processes.STATE] for pid, fields in processes.descendants(top).items()}
        if states == wanted:
            break
        time.sleep(0.01)
    assert states == wanted


def test_of_a_process_that_is_gone_there_is_nothing() -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    assert processes.stat(child.pid) is None
    assert processes.descendants(child.pid) == {}
