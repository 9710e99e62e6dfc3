"""Text of others on its way to a terminal."""

from __future__ import annotations

import unicodedata

_JOINERS = "\u200c\u200d"  # Persian, Indian scripts and emoji are not written without them; they hide nothing


def shown(text: object) -> str:
    r"""Return a text as one line that can be printed: what would steer a terminal, or turn text around, is spelt out.

    Example:
        >>> shown("red \x1b[31m, \u202eback, two\nlines")
        'red \\x1b[31m, \\u202eback, two\\nlines'
    """
    return "".join(c if _harmless(c) else repr(c)[1:-1] for c in str(text))


def _harmless(character: str) -> bool:
    # Cc, Cf, Cs, Co, Cn: controls, format characters (among them all that set a direction), no characters.
    category = unicodedata.category(character)
    return character in _JOINERS or not (category[0] == "C" or category in ("Zl", "Zp"))
