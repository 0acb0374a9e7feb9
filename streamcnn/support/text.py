"""Escaping of text from outside, such as names of files and classes, so that it is safe to show."""

from __future__ import annotations

import re
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

_USER = re.compile(r"(?<=://)[^/\s]*@")
_QUERY = re.compile(r"(https?://[^\s?'\"]*)\?[^\s'\")]*", re.IGNORECASE)


def printable(text: object, *, keep: str = "") -> str:
    r"""``text`` with every character that a terminal would act on as its escape sequence.

    Control characters, those that change the writing direction, other invisible ones, and bytes of file names
    that are not text become ``\x1b``, ``\u202e`` and so on.

    Parameters
    ----------
    text
        The text to show.
    keep
        Characters to leave as they are, such as ``"\n"`` in a text of several lines.
    """
    characters = str(text)
    if characters.isprintable():
        return characters
    return "".join(
        each if each.isprintable() or each in keep else each.encode("unicode_escape").decode()
        for each in characters
    )


def without_secrets(text: str) -> str:
    """``text`` without the users, passwords and queries of URLs in it, which may grant access."""
    if "://" not in text:
        return text
    return _QUERY.sub(r"\1?...", _USER.sub("...@", text))


def html_text(text: object) -> str:
    """``text`` for an HTML page, in its body or in an attribute."""
    return escape(printable(text, keep="\n"), quote=True)


def as_text(text: object) -> Text:
    """``text`` for a console of rich, which reads brackets in plain strings as markup; lines are kept."""
    from rich.text import Text

    return Text(printable(text, keep="\n"))
