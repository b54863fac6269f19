"""Text from outside on a terminal or a page: names of files, cases and labels may hold anything.

A control character can move the cursor, colour the rest of the screen or rename the window; a bidirectional one turns
a line round, and a half of a surrogate pair, which stands for a byte of a file name that is no UTF-8, cannot be written
at all. They are spelled out, so that a reader sees what is there.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

KEPT_CHARACTERS = "\u00a0\u3000\u200c\u200d"
"""Not printable as Python sees it, but harmless: two spaces, and two that words of some languages are spelled with."""

_LINE = re.compile(r"[^\n]+")


def spell_out(text: str) -> str:
    """A name with what cannot be printed spelled out, as in `\\x1b`; line breaks too."""
    if text.isprintable():
        # Most text, and pictures of a megabyte.
        return text
    return "".join(
        character
        if character.isprintable() or character in KEPT_CHARACTERS
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def shorten(text: str, most: int) -> str:
    """The beginning of a text that has more than so many characters."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def printable(text: str) -> str:
    """A message with what cannot be printed spelled out; its line breaks and tabs stay."""
    return _LINE.sub(lambda line: "\t".join(map(spell_out, line[0].split("\t"))), text)


def printable_json(text: str) -> str:
    """JSON for a terminal: what cannot be printed stands only within its strings, and is escaped as JSON does."""
    if all(line.isprintable() for line in text.split("\n")):
        return text
    return "".join(
        character if character.isprintable() or character == "\n" else _escape_json(character) for character in text
    )


def _escape_json(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2))


class PrintableFormatter(logging.Formatter):
    """Log lines of which nothing reaches the terminal but text, and in which names and paths stay on one line."""

    def format(self, record: logging.LogRecord) -> str:
        # A whole message may have several lines, and so may an error.
        if isinstance(record.args, tuple) and record.msg != "%s":
            # A copy: other handlers get the record too.
            record = logging.makeLogRecord({**record.__dict__, "args": tuple(map(_on_one_line, record.args))})
        return printable(super().format(record))


def _on_one_line(argument: object) -> object:
    return spell_out(str(argument)) if isinstance(argument, (str, Path)) else argument
