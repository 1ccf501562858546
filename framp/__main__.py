"""``python -m framp``: the ``framp`` command."""

from framp.cli import main

main()
