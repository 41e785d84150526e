"""Text of others in Markdown: file names, class names, reasons and versions stay what they are."""

from __future__ import annotations

import re

_LINE_BREAKS = re.compile(r"\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*")
# Controls, and marks that turn the direction of what follows.
_INVISIBLE = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
# What CommonMark and GitHub's tables take as their own. An underscore within a word is none, and
# neither are the brackets of an interval behind its number, which people read in the source, too.
_END = r"(?:[-+]?[\d.]+%?|–)"
_INTERVAL = rf"(?<=[^\s]\s)\[{_END}, {_END}\](?![(\[:])"
_MARKUP = re.compile(rf"({_INTERVAL})|([\\`*{{}}\[\]|~]|(?<![^\W_])_|_(?![^\W_]))")
# What begins a heading, a list, a quotation or a rule at the start of a line.
_BLOCK = re.compile(r"^\s*(?=[>#]|[-+](?:[\s-]|$))")
_NUMBERED = re.compile(r"^\s*(\d+)([.)])(?=\s|$)")
_INDENT = re.compile(r"^[ \t]{2,}")


def markdown_text(text: str) -> str:
    """`text` as it shows in GitHub-flavoured Markdown: no markup, HTML, new line, or mention.

    Source: https://spec.commonmark.org/0.31.2/#backslash-escapes and
    https://github.github.com/gfm/#tables-extension-
    """
    plain = _INVISIBLE.sub("\ufffd", _LINE_BREAKS.sub(" ", text))
    plain = _MARKUP.sub(lambda found: found[1] or f"\\{found[2]}", _INDENT.sub(" ", plain))
    plain = plain.replace("&", "&amp;").replace("<", "&lt;")
    plain = _NUMBERED.sub(r"\1\\\2", _BLOCK.sub(r"\\", plain))
    # The site would call a user of that name, or link another issue.
    return re.sub(r"@|#(?=\d)", lambda sign: f"{sign[0]}\u200b", plain)
