"""Owns one Python process below a keeper: its start, the channel to it, and its end. Knows not what it is asked."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading

from attnbench import keeper
from attnbench.text import one_line, without_home
from attnbench.wire import Channel

END_TIMEOUT_S = 10.0
LAST_WORDS_S = 5.0
"""For the keeper to say how a process ended whose end of the channel is closed."""
LAST_BYTES, LINE_LENGTH = 4096, 300
"""How much of what a process writes to stderr is kept, and how much of its last line goes into a reason."""
STDERR_END_S = 1.0
"""For what is left in the pipe; who has it open longer, where the system has no subreaper, is not waited for."""
NO_ATTNBENCH, OTHER_ATTNBENCH = 86, 87
"""Exit codes of an interpreter without attnbench, and of one whose attnbench is too old to know what is asked of it."""

# sys.path holds the current folder first, which must not stand in for an installed module.
_PROGRAM = f"""
import sys
sys.path[:] = [path for path in sys.path if path]
try:
    from attnbench.keeper import keep
    from attnbench.MODULE import MAIN
except ModuleNotFoundError as error:
    if error.name == "attnbench":
        sys.exit({NO_ATTNBENCH})
    if error.name in ("attnbench.keeper", "attnbench.MODULE"):
        sys.exit({OTHER_ATTNBENCH})
    raise
keep(int(sys.argv[1]))
MAIN(int(sys.argv[2]))
"""


class Child:
    """A process that runs a function of attnbench's over a channel, with all that it starts."""

    def __init__(self, python: str, main: str) -> None:
        """Start the function that module `attnbench.main` calls by its own last name, without waiting for it.

        Raises OSError where the interpreter cannot be executed.
        """
        program = _PROGRAM.replace("MODULE", main).replace("MAIN", main.rpartition(".")[2])
        ours, theirs = socket.socketpair()
        self._control, control = socket.socketpair()
        self._control.settimeout(END_TIMEOUT_S)
        self.channel = Channel(ours)
        self._last = b""
        read_end, stderr = os.pipe()
        with theirs, control, open(stderr, "wb"):
            descriptors = [control.fileno(), theirs.fileno()]
            try:
                self._keeper = subprocess.Popen(
                    [python, "-c", program, *map(str, descriptors)],
                    stdin=subprocess.DEVNULL,
                    stdout=2,  # what it prints is no data of attnbench's
                    stderr=stderr,
                    pass_fds=descriptors,
                    start_new_session=True,
                )
            except OSError:
                self.channel.close()
                self._control.close()
                os.close(read_end)
                raise
        self._passing_on = threading.Thread(target=self._pass_on, args=(read_end,), daemon=True)
        self._passing_on.start()

    def _pass_on(self, descriptor: int) -> None:
        """Pass what the process writes to stderr on to this one's, at once, and keep its end."""
        with open(descriptor, "rb", buffering=0) as stream:
            while data := stream.read(1 << 16):
                self._last = (self._last + data)[-LAST_BYTES:]
                with contextlib.suppress(OSError):  # where nobody reads it any more, the process must not wait for that
                    while data:
                        data = data[os.write(2, data) :]

    def order(self, order: bytes) -> bool:
        """Have the keeper stop or continue the process and all below it; whether it has.

        It has not where the keeper is gone, with its process or because that killed it, or something will not stop.
        """
        try:
            self._control.sendall(order)
            return self._control.recv(1) == keeper.DONE
        except OSError:
            return False

    def exit_code(self, wait_s: float) -> int | None:
        """The process's exit code, or less the signal that ended it; None where it goes on for longer than that."""
        try:
            return self._keeper.wait(wait_s)
        except subprocess.TimeoutExpired:
            return None

    def close(self) -> None:
        """End the process and all that it started."""
        self.channel.close()
        self._control.close()
        if self.exit_code(END_TIMEOUT_S) is None:  # an interpreter that is none has no keeper, but leads its session
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._keeper.pid, signal.SIGKILL)
            self._keeper.wait()
        self._passing_on.join(STDERR_END_S)

    def last_words(self) -> str:
        """To follow `ending`: the last line that the process, which has ended, wrote to stderr; empty without one."""
        self._passing_on.join(STDERR_END_S)
        lines = map(one_line, without_home(self._last.decode(errors="replace")).splitlines())
        line = next((line for line in reversed(list(lines)) if line), "")
        return f"; last on stderr: {line[:LINE_LENGTH]}" if line else ""


def ending(code: int) -> str:
    """How a process ended by itself, in words: `exit code 3`, `killed by SIGSEGV`."""
    if code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:  # a real-time signal has no name
        name = f"signal {-code}"
    return f"killed by {name}"
