"""Commands run in the test's own process, as the program runs them: with problems printed, and an exit status."""

import sys

import click
from click.testing import CliRunner, Result

from tlstunnel.cli import main


def run_main(*words: str) -> Result:
    """Run the command line with these words."""

    @click.command(context_settings={"ignore_unknown_options": True})
    @click.argument("words", nargs=-1)
    def program(words: tuple[str, ...]) -> None:
        sys.argv = ["tlstunnel", *words]
        main()

    before = sys.argv
    try:
        return CliRunner().invoke(program, words, catch_exceptions=False)
    finally:
        sys.argv = before
