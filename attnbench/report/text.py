"""Owns how text from plugins and files is made harmless in each output format. Knows no number."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence

from tabulate import tabulate, tabulate_formats

from attnbench.text import no_formula, one_line

NONE = "—"
"""What stands in a cell that has nothing to show."""
TIE, FASTEST = "≈", "★"
CSV = "csv"
FORMATS: tuple[str, ...] = (*tabulate_formats, CSV)

_LATEX = {ord(c): f"\\{c}" for c in "&%$#_{}"} | {
    ord("\\"): r"\textbackslash{}",
    ord("~"): r"\textasciitilde{}",
    ord("^"): r"\textasciicircum{}",
}
_LATEX_SIGNS = {ord(TIE): r"\ensuremath{\approx}", ord(FASTEST): r"\ensuremath{\star}"}
"""Those that LaTeX does not know as letters."""
_MARKDOWN = {ord(c): f"\\{c}" for c in "\\|*`~"} | {ord("&"): "&amp;", ord("<"): "&lt;", ord(">"): "&gt;"}
_JIRA = {ord(c): f"\\{c}" for c in "\\{}[]|!"}
_MEDIAWIKI = {ord(c): f"&#{ord(c)};" for c in "{}[]|'~"}
_ESCAPED_BY_TABULATE = frozenset({"html", "latex", "latex_booktabs", "latex_longtable"})
_MARKUP_WITH_BARS = frozenset({"asciidoc", "moinmoin", "orgtbl", "textile", "youtrack"})


def escape(text: str, style: str) -> str:
    """One line of `text` that `style`, a tabulate format, shows as it is: no control codes, no markup of its own."""
    line = one_line(text)
    if style in ("github", "pipe"):
        # A bracket makes a link only before another; a lone one, as in a pip command, stays as it is to be copied.
        return re.sub(r"\](?=[(\[:])", r"\\]", line.translate(_MARKDOWN))
    if style in ("html", "unsafehtml"):
        return html.escape(line)
    if style.startswith("latex"):
        return line.translate(_LATEX)
    if style == "jira":
        return line.translate(_JIRA)
    if style == "mediawiki":
        return html.escape(line, quote=False).translate(_MEDIAWIKI)
    if style == "rst":
        # A cell is a body of its own, where a list or a directive may begin.
        return _unlisted(re.sub(r"[\\*`|]|_(?!\w)", r"\\\g<0>", line))
    if style == "tsv":
        return no_formula(line)
    # No escape serves all these dialects; the broken bar looks like the bar that would end the cell.
    return line.replace("|", "¦") if style in _MARKUP_WITH_BARS else line


def _unlisted(line: str) -> str:
    """`line`, in a dialect of backslashes, so that it begins no list, heading or directive."""
    line = re.sub(r"\A(\w+)(?=[.)](?:\s|\Z))", r"\1\\", line)
    return f"\\{line}" if re.match(r"[!-/:-@[^-`{-~]", line) and not line.startswith("&") else line


LARGEST_SHARE = 10.0
"""A larger one only says that there were too few blocks, and would take the width of the table."""


def counted(count: int, noun: str) -> str:
    """1 problem, 2 problems."""
    return f"{count} {noun}" + ("" if count == 1 else "s")


def share(value: float, digits: int) -> str:
    """A share in percent, or that it is beyond what means anything."""
    return f"{value:.{digits}%}" if value <= LARGEST_SHARE else f"over {LARGEST_SHARE:.0%}"


def code(text: str) -> str:
    """One line of `text` as a code span of Markdown, in which nothing is markup."""
    line = one_line(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{fence}{line}{fence}" if fence == "`" else f"{fence} {line} {fence}"


def heading(text: str, style: str) -> str:
    """A table's title in `style`."""
    if style in ("github", "pipe"):
        return f"### {escape(text, style)}"
    return f"<h3>{escape(text, style)}</h3>" if style in ("html", "unsafehtml") else paragraph(text, style)


def paragraph(text: str, style: str) -> str:
    """A line of prose in `style`; a comment in LaTeX, where a table's caption is the author's."""
    if style in ("html", "unsafehtml"):
        return f"<p>{escape(text, style)}</p>"
    line = escape(text, style)
    if style in ("github", "pipe"):
        return _unlisted(line)
    return f"% {line}" if style.startswith("latex") else line


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], style: str, left: Sequence[str] = ()) -> str:
    """A table of ready-made text in a tabulate format; columns not named in `left` are right-aligned."""
    if style in _ESCAPED_BY_TABULATE:
        clean: Callable[[str], str] = one_line
    else:
        clean = lambda text: escape(text, style)  # noqa: E731
    shown = tabulate(
        [[clean(cell) for cell in row] for row in rows],
        headers=[clean(name) for name in headers],
        tablefmt=style,
        disable_numparse=True,
        colalign=["left" if name in left else "right" for name in headers] if rows else None,
    )
    return shown.translate(_LATEX_SIGNS) if style.startswith("latex") else str(shown)
