"""Commands that a message tells its reader to type."""

import shlex


def framp_command(*words: object) -> str:
    """The ``framp`` command with these words, quoted where a shell would read them otherwise."""
    return shlex.join(["framp", *map(str, words)])
