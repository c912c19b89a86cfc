"""Owns the main loop of a describing process, which loads plugins one by one and says what each brings.

Started by discovery.py, below a keeper; it ends when that closes its end. Knows no catalogue.
"""

from __future__ import annotations

import contextlib
import socket
from typing import Any

from attnbench import registry
from attnbench.errors import in_a_line
from attnbench.registry import EntryPointRef
from attnbench.wire import VERSION, Channel, Closed


def describe(descriptor: int) -> None:
    """Answer at the other end of the socket until it is gone: first the version, then a message for each question."""
    channel = Channel(socket.socket(fileno=descriptor))
    with contextlib.suppress(Closed):
        channel.send({"version": VERSION})
        while True:
            question, _ = channel.receive()
            _answer(channel, question)


def _answer(channel: Channel, question: dict[str, Any]) -> None:
    if question["do"] == "list":
        channel.send({"entry_points": [source.to_json() for source in registry.entry_points()]})
        return
    source = EntryPointRef.from_json(question["source"])
    description = registry.describe(source)
    number = question["number"]
    try:
        channel.send({"number": number, "description": description.to_json()})
    except Closed:
        raise
    except Exception as error:  # it is too large, or not made of what JSON knows
        words = f"what it brings cannot be told: {in_a_line(error)}"
        refused = registry.Description(source, load_s=description.load_s, error=words)
        channel.send({"number": number, "description": refused.to_json()})
