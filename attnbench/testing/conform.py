"""Owns the main loop of a process that runs the conformance kit on one backend. Knows no other plugin and no table.

Started by check.py, below a keeper; it ends when that closes its end.
"""

from __future__ import annotations

import contextlib
import inspect
import socket
import traceback
from collections.abc import Iterator
from typing import Any
from unittest import SkipTest

from attnbench import registry
from attnbench.errors import in_a_line
from attnbench.problem import DTYPES
from attnbench.registry import BackendInfo, EntryPointRef
from attnbench.testing.conformance import BackendConformance
from attnbench.wire import Channel, Closed

PASSED, SKIPPED, FAILED = "passed", "skipped", "FAILED"


def every_test() -> Iterator[tuple[str, str]]:
    """Every test of the kit in its order: its name without `test_`, and the dtype it is for, or an empty text."""
    for name, function in vars(BackendConformance).items():
        if name.startswith("test_"):
            dtypes = DTYPES if "dtype" in inspect.signature(function).parameters else ("",)
            yield from ((name.removeprefix("test_"), dtype) for dtype in dtypes)


def conform(descriptor: int) -> None:
    """Load the backend that the first message names, then answer each message, a test's name, with how it ended."""
    channel = Channel(socket.socket(fileno=descriptor))
    with contextlib.suppress(Closed):
        hello, _ = channel.receive()
        kit = BackendConformance()
        try:
            source = EntryPointRef.from_json(hello["backend"].pop("source"))
            kit.backend = registry.load(BackendInfo(**hello["backend"], source=source))
        except (Exception, SystemExit) as error:
            channel.send({"outcome": FAILED, "words": f"the plugin did not load: {in_a_line(error)}", "trace": ""})
            return
        channel.send({"outcome": PASSED, "words": "", "trace": ""})
        while True:
            question, _ = channel.receive()
            channel.send(_run(kit, question["test"], question["dtype"]))


def _run(kit: BackendConformance, name: str, dtype: str) -> dict[str, Any]:
    try:
        getattr(kit, f"test_{name}")(*([dtype] if dtype else []))
    except SkipTest as reason:
        return {"outcome": SKIPPED, "words": str(reason), "trace": ""}
    except AssertionError as error:
        return {"outcome": FAILED, "words": str(error), "trace": ""}
    except (Exception, SystemExit) as error:  # a backend may raise anything
        return {"outcome": FAILED, "words": in_a_line(error), "trace": traceback.format_exc()}
    return {"outcome": PASSED, "words": "", "trace": ""}
