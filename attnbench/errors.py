"""Owns the one exception a user is meant to read, and the exit codes. Knows nothing of what failed."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What the process tells its caller; a contract, see `attnbench --help`."""

    OK = 0
    FAILED = 1
    """Something ended INCORRECT, TAMPERED, IMPLAUSIBLE, COMPILE_ERROR, RUNTIME_ERROR, OOM, TIMEOUT or CRASHED."""
    USAGE = 2
    """A bad argument, or input that cannot be read."""
    NOTHING_PASSED = 3
    PLUGIN_FAILED = 4
    """A plugin asked for by name failed to load."""
    INTERRUPTED = 130


class AttnbenchError(Exception):
    """An error with one clear line and, where there is one, a hint at the next step.

    `message` and `hint` are plain text without a trailing full stop; whoever prints them escapes them.
    """

    def __init__(self, message: str, hint: str | None = None, exit_code: ExitCode = ExitCode.USAGE) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = exit_code


def in_a_line(error: BaseException) -> str:
    """What any exception says, in one line, though its own __str__ may raise: its type and its first line of words.

    An AttnbenchError, which is made for users, goes without its type and with its hint.
    """
    try:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    except Exception:
        lines = []
    text = lines[0] if lines else "no message"
    if isinstance(error, AttnbenchError):
        return f"{text} ({error.hint})" if error.hint else text
    return f"{type(error).__name__}: {text}"
