"""What the command prints, on whatever it is given to print on: other encodings, closed streams, readers that leave."""

import codecs
import io
import os
import sys
from typing import Any

from rich.console import Console

from framp_core.errors import OutputError

_PLAINER = {"\N{MINUS SIGN}": "-", "\N{EN DASH}": "-", "\N{HORIZONTAL ELLIPSIS}": "."}
_ERRORS = "framp-plainer"


def prepare_streams() -> None:
    """Let the standard streams take any text, and let no file that is opened later become one of them.

    What an encoding lacks is printed as ``?``, and a minus as a hyphen: a table is worth more than its frame, and no
    run ends in an encoding error. A stream that is closed (``>&-``) leaves its number to the next file that is opened,
    into which the processes of a run would then print.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    codecs.register_error(_ERRORS, _plainer)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ERRORS)


def _plainer(error: UnicodeError) -> tuple[str, int]:
    """A letter for each one, since tables are laid out before."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_PLAINER.get(letter, "?") for letter in error.object[error.start : error.end]), error.end


class Terminal(Console):
    """A console on which the work does not depend: it goes on, and ends as it ends, when nobody reads any more."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print, see :meth:`rich.console.Console.print`.

        Raises:
            OutputError: what is printed goes to a file that cannot be written.
        """
        try:
            super().print(*objects, **options)
        except OSError as error:
            self._print_no_more()
            raise OutputError(
                f"what is printed cannot be written ({error}); what a run has written to its folder is not concerned"
            ) from error

    def say(self, text: str) -> None:
        """Print a line as it is: paths and what clients say may hold what rich takes for markup."""
        self.print(text, markup=False, highlight=False, soft_wrap=True)

    def on_broken_pipe(self) -> None:
        """The reader has gone, as that of ``framp status RUN | head -1``, which is no error."""
        self._print_no_more()

    def _print_no_more(self) -> None:
        self.quiet = True
        # The stream holds what it could not write, and would try again at the end of the process.
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())
