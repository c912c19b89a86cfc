"""Makes docs/cli.md from the command line itself. Run: python tools/cli_docs.py, or with --check to compare only."""

from __future__ import annotations

import argparse
import html
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.main import get_command

from attnbench import cli

PAGE = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
LINE_LENGTH = 120
INTRO = """# Commands

<!-- made by: python tools/cli_docs.py -->
Data goes to stdout, progress and notes to stderr. Lists are separated by commas. `attnbench COMMAND --help` prints what
stands here."""


def page() -> str:
    """The text of docs/cli.md."""
    return "\n\n".join([INTRO, *_sections(get_command(cli.app), "attnbench")]) + "\n"


def _sections(command: Any, name: str, parent: Any = None) -> Iterator[str]:
    """A command's own section, then its subcommands'. typer's classes differ between versions, but all have these."""
    context = command.context_class(command, info_name=name, parent=parent)
    path = context.command_path
    yield f"## {path}"
    yield f"```text\nUsage: {path} {' '.join(command.collect_usage_pieces(context))}\n```"
    for paragraph in (command.help or "").strip().split("\n\n"):
        yield textwrap.fill(_text(paragraph), LINE_LENGTH, break_long_words=False, break_on_hyphens=False)
    children = {word: command.get_command(context, word) for word in getattr(command, "commands", {})}
    if children:
        rows = [(_code(word), _text((child.help or "").split("\n\n")[0])) for word, child in children.items()]
        yield _table(("command", "what it does"), rows)
    records = [record for option in command.get_params(context) if (record := option.get_help_record(context))]
    yield _table(("option", "meaning", "default"), [_row(*record) for record in records])
    for word, child in children.items():
        yield from _sections(child, word, context)


def _row(name: str, meaning: str) -> tuple[str, str, str]:
    """An option's name, meaning and default, which help has in brackets at the end."""
    found = re.fullmatch(r"(.*?)\s*\[(?:default: (?P<default>.*)|(?P<required>required))\]", meaning, re.DOTALL)
    if found is None:
        return _code(name), _text(meaning), ""
    default = found["default"]
    return _code(name), _text(found[1]), "must be given" if default is None else _text(default.strip("()"))


def _code(words: str) -> str:
    """A code span; as HTML where it holds a bar, which Markdown's dialects escape in different ways within a table."""
    return f"<code>{html.escape(words).replace('|', '&#124;')}</code>" if "|" in words else f"`{words}`"


def _text(words: str) -> str:
    """Plain words, of which nothing is taken for markup."""
    line = html.escape(" ".join(words.split()), quote=False).replace("|", "&#124;")
    return re.sub(r"[\\`*]", r"\\\g<0>", line)


def _table(headers: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [headers, ("---",) * len(headers), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--check", action="store_true", help="write nothing; exit 1 where docs/cli.md is not current")
    made = page()
    if not options.parse_args().check:
        PAGE.write_text(made, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != made:
        sys.exit("docs/cli.md is not what the command line says: run python tools/cli_docs.py and commit it")


if __name__ == "__main__":
    main()
