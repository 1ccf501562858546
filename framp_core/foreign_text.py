"""Text that someone else wrote, made short and printable before it is kept or shown."""

import re
from collections.abc import Collection

LONGEST_LINE = 1_000
"""Characters of a reason; an error of this package needs half of that."""
LONGEST_TRACEBACK = 4_000
"""Characters of a traceback; its last lines say what failed."""
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def printable(text: object, longest: int = LONGEST_LINE, *, lines: bool = False, tail: bool = False) -> str:
    r"""The text as it can stand in a log, a table or on a terminal, which it cannot steer.

    What does not print (control characters, escape sequences, marks that turn the direction of writing, lone
    surrogates) is written as Python would, such as ``\x1b``. A backslash stays one, so that this changes nothing that
    it gave before.

    Args:
        text: of any length, which is cut before anything else is done with it; another type than str is named alone.
        longest: characters of the result, the note on what was cut among them; at least 60.
        lines: whether line ends and tabs stay.
        tail: whether the end is kept rather than the beginning.
    """
    if not isinstance(text, str):
        return f"<{type(text).__name__}>"
    kept = text[-longest:] if tail else text[:longest]
    shown = "".join(char if char.isprintable() or (lines and char in "\n\t") else _escaped(char) for char in kept)
    if max(len(text), len(shown)) <= longest:
        return shown
    note = f"[cut, of {len(text):,} characters]"
    room = longest - len(note) - 1
    return f"{note} {shown[-room:]}" if tail else f"{shown[:room]} {note}"


def listed(names: Collection[str]) -> str:
    """The first of some names, each quoted and cut, and how many more there are; ``nothing`` if there are none."""
    first = [repr(name[:40]) for name, _ in zip(names, range(5), strict=False)]
    return ", ".join(first) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "nothing"


def without_colours(text: str) -> str:
    """Text of a log without the terminal's colour codes."""
    return _COLOUR.sub("", text)


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")
