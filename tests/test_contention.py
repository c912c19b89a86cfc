"""attnbench.contention: ticks from a /proc of the test's own, and what they say went on in between."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from attnbench import processes
from attnbench.contention import Load, Share, between, sample

ME = os.getpid()


@pytest.fixture
def proc(tmp_path, monkeypatch):
    """A /proc in a folder: call it with the first line of stat, and add processes."""
    monkeypatch.setattr(processes, "PROC", tmp_path)

    def add(*lines):
        for pid, name, parent, *ticks in lines:
            (tmp_path / str(pid)).mkdir(exist_ok=True)
            text = f"{pid} ({name}) S {parent} 1 1 0 -1 4194560 1 2 3 4 {' '.join(map(str, ticks))} 20 0 1 0 100\n"
            (tmp_path / str(pid) / "stat").write_text(text)

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2})
    (tmp_path / "stat").write_text(
        "cpu  9100 910 950 9700 940 95 95 990 933 92\ncpu0 60 4 20 300 30 2 1 50 33 2\n"
        "cpu1 9000 900 900 9000 900 90 90 900 900 90\ncpu2 40 6 30 400 10 3 4 40 0 0\nintr 5\n"
    )
    add((1, "init", 0, 5000, 5000, 5000, 5000), (ME, "attnbench", 1, 7, 2, 30, 4))
    return add


def test_ticks_are_those_of_the_processors_that_this_process_may_use(proc):
    # Guests' time stands in user's already.
    assert sample() == Load(processors=2, total=1000, idle=740, steal=90, own=43)


def test_own_is_the_whole_tree_whatever_its_processes_are_called(proc):
    proc(
        (ME + 1, "worker", ME, 100, 0, 0, 0),
        (ME + 2, "a) R 1 (b", ME + 1, 0, 20, 3, 0),
        (ME + 9, "other", 1, 9, 9, 9, 9),
    )
    assert sample().own == 43 + 100 + 23


def test_a_child_that_has_ended_moves_to_its_parent(proc, tmp_path):
    proc((ME + 1, "worker", ME, 100, 50, 0, 0))
    before = sample()
    (tmp_path / str(ME + 1) / "stat").unlink()
    proc((ME, "attnbench", 1, 7, 2, 30 + 110, 4 + 50))
    assert sample().own - before.own == 10


def load(total, idle, steal=0, own=0):
    return Load(processors=2, total=total, idle=idle, steal=steal, own=own)


@pytest.mark.parametrize(
    ("before", "after", "share"),
    [
        (load(1000, 500), load(1100, 600), Share(2, 0.0, 0.0)),
        (load(1000, 500, 20, 40), load(1200, 550, 40, 110), Share(2, 0.3, 0.1)),  # 200: 50 idle, 20 stolen, 70 own, 60
        (load(1000, 500, 0, 40), load(1100, 500, 0, 140), Share(2, 0.0, 0.0)),
        (load(1000, 500, 0, 40), load(1100, 500, 0, 143), Share(2, 0.0, 0.0)),  # own ticks round otherwise
        (load(1000, 500, 0, 90), load(1100, 580, 0, 80), Share(2, 0.2, 0.0)),  # a child nobody waited for has ended
        (load(1000, 500), load(1100, 400), Share(2, 1.0, 0.0)),  # idle ran backwards, as iowait may
        (load(1000, 500, 50), load(1100, 550, 40), Share(2, 0.6, 0.0)),
        (load(1000, 500), load(1000, 500), Share(2, 0.0, 0.0)),
    ],
)
def test_shares_are_of_all_processors_time_and_stay_within_0_and_1(before, after, share):
    found = between(before, after)
    assert (found.others, found.steal) == pytest.approx((share.others, share.steal))


@pytest.mark.parametrize("text", [None, "", "cpu  1 2 3 4 5 6 7 8\n", "cpu0 1 2 3\n", "cpu0 a b c d e f g h\n"])
def test_without_a_readable_proc_there_is_no_load(tmp_path, monkeypatch, text):
    monkeypatch.setattr(processes, "PROC", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    if text is not None:
        (tmp_path / "stat").write_text(text)
    assert sample() is None


BURN = "import time; end = time.process_time() + 0.4\nwhile time.process_time() < end: pass"


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.parametrize("waited", [True, False])
def test_what_a_child_burns_is_attnbenchs_own(waited):
    before = sample()
    child = subprocess.Popen([sys.executable, "-c", f"{BURN}\n{'' if waited else 'time.sleep(60)'}"])
    try:
        if waited:
            child.wait(30)
        else:
            deadline = time.monotonic() + 30
            while sample().own - before.own < 40 and time.monotonic() < deadline:
                time.sleep(0.05)
        after = sample()
    finally:
        child.kill()
        child.wait()
    assert (after.own - before.own) / os.sysconf("SC_CLK_TCK") >= 0.38
    found = between(before, after)
    assert 0 <= found.others <= 1
    assert 0 <= found.steal <= 1
