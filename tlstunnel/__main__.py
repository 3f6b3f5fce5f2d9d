"""``python -m tlstunnel``: the command line."""

from tlstunnel.cli import main

main()
