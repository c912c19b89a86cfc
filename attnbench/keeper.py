"""Owns the life of one worker process and all its descendants: none outlives the runner, whatever either does.

The keeper is a small process between the two that runs no plugin code. It obeys single bytes on a control socket, and
takes the socket's end, which comes with the runner's, however that ends, as the order to kill. What a worker leaves
behind becomes its child, since it is a subreaper, so a `setsid` does not escape it. Where the system has no subreaper
(macOS) what left the worker's process group survives.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import sys
import time
from typing import NoReturn

from attnbench import processes

STOP, CONTINUE, DONE, NOT_DONE = b"s", b"c", b".", b"!"
"""Stop all descendants; let them go on; the keeper's answers to either, once it is so or where it cannot be."""
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
SWEEPS, SWEEP_S = 2000, 0.0005
"""A descendant may fork while it is looked for; each sweep finds what the last one missed. A second in all."""


def keep(control: int) -> None:
    """Become the keeper, and return in a new process, the worker. The keeper ends as the worker does."""
    keeper = os.getpid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    worker = os.fork()
    if worker:
        _watch(worker, control)
    if sys.platform == "linux":  # a worker that kills its keeper goes with it
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != keeper:
            os._exit(1)
    os.close(control)
    os.setsid()


def _watch(worker: int, control: int) -> NoReturn:
    runner = socket.socket(fileno=control)
    for descriptor in range(3, 256):  # the worker's end of its own socket must close with the worker
        if descriptor != control:
            with contextlib.suppress(OSError):
                os.close(descriptor)
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # without a handler, wakeup_fd is not written
    signal.set_wakeup_fd(wake)
    while True:
        _reap(worker)  # also what died before the handler stood
        ready, _, _ = select.select([control, woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
        if control in ready:
            try:
                order = runner.recv(1)
            except OSError:
                order = b""
            if order not in (STOP, CONTINUE):
                _kill_all(worker)
                os._exit(0)
            done = True
            if order == STOP:
                done = _stop_all(worker)
            else:
                _signal_all(worker, signal.SIGCONT)
            with contextlib.suppress(OSError):
                runner.send(DONE if done else NOT_DONE)


def _reap(worker: int) -> None:
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == worker:
                _kill_all(worker)
                _end_as(ended[1])


def _end_as(status: int) -> NoReturn:
    """End with the worker's exit code, or by its signal, without a core dump of our own."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        with contextlib.suppress(OSError, ValueError):
            import resource

            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 1)


def _signal_all(worker: int, number: int) -> None:
    with contextlib.suppress(OSError):
        os.killpg(worker, number)
    for pid in processes.descendants(os.getpid()):
        with contextlib.suppress(OSError):
            os.kill(pid, number)


def _stop_all(worker: int) -> bool:
    """Stop all descendants, and wait until they stand still; whether they do."""
    for _ in range(SWEEPS):
        _signal_all(worker, signal.SIGSTOP)
        below = processes.descendants(os.getpid()).values()
        if all(fields[processes.STATE] in "TtZX" for fields in below):
            return True
        time.sleep(SWEEP_S)
    return False


def _kill_all(worker: int) -> None:
    for _ in range(SWEEPS):
        _signal_all(worker, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not processes.descendants(os.getpid()):
            return
        time.sleep(SWEEP_S)
