"""Owns the hygiene of text from outside: what may reach a terminal or a file at all. Knows no format's escapes."""

from __future__ import annotations

import os
import re


def printable(text: str) -> str:
    """`text` without terminal codes, other control characters and bidi controls; line breaks and tabs stay."""
    text = re.sub(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-_])", "", text)
    return "".join(c for c in text if c in "\n\t" or (c.isprintable() and c not in "\u2028\u2029"))


def one_line(text: str) -> str:
    """`printable` text with every run of white space as one space."""
    return " ".join(printable(text).split())


def without_home(text: str) -> str:
    """`text` with the user's home folder written as ~."""
    home = os.path.expanduser("~")
    return re.sub(rf"{re.escape(home)}(?!\w)", "~", text) if len(home) > 1 else text


def no_formula(text: str) -> str:
    """A cell of text that no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
