"""The help of every command is complete and correct."""

import re
import shlex
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from tlstunnel.cli import cli


def list_commands(
    command: click.Command, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from list_commands(inner, (*path, name))


COMMANDS = list(list_commands(cli))
LEAVES = [(path, command) for path, command in COMMANDS if not isinstance(command, click.Group)]


def read_help(path: tuple[str, ...]) -> str:
    result = CliRunner().invoke(cli, [*path, "--help"], prog_name="tlstunnel", terminal_width=80)
    assert result.exit_code == 0
    return result.output


@pytest.mark.parametrize("path", [path for path, _ in COMMANDS], ids=" ".join)
def test_no_line_is_cut_off(path: tuple[str, ...]) -> None:
    text = read_help(path)
    assert not re.search(r"\.\.\.$", text.partition("Commands:")[2], re.MULTILINE)
    for line in text.splitlines():
        assert len(line) <= 80, line


@pytest.mark.parametrize(("path", "command"), LEAVES, ids=[" ".join(path) for path, _ in LEAVES])
def test_each_command_has_an_example_that_works(path: tuple[str, ...], command: click.Command) -> None:
    _, _, examples = read_help(path).partition("\n  Example")
    found = [line.strip() for line in examples.splitlines()[1:] if line.strip()]
    assert found
    for example in found:
        words = shlex.split(example.partition(" > ")[0])
        assert words[: len(path) + 1] == ["tlstunnel", *path]
        command.make_context(path[-1], words[len(path) + 1 :])  # raises if an option or argument is wrong


@pytest.mark.parametrize(("path", "command"), LEAVES, ids=[" ".join(path) for path, _ in LEAVES])
def test_every_option_is_explained(path: tuple[str, ...], command: click.Command) -> None:
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help, f"{path}: {option.name}"


def test_the_defaults_of_addresses_and_control_sockets() -> None:
    text = " ".join(read_help(("start",)).split())
    assert "[default: those of the file, else 0.0.0.0:8443 and [::]:8443, or 127.0.0.1:8443" in text
    folders = "$RUNTIME_DIRECTORY, else $XDG_RUNTIME_DIR/tlstunnel or /run/tlstunnel]"
    assert f"[default: control-PORT.sock in {folders}" in text
    for name in ("reload", "upgrade", "status", "drain", "stop"):
        assert folders in " ".join(read_help((name,)).split())
