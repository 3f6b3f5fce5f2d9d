"""``tlstunnel status``: the processes of a running tunnel."""

from collections.abc import Sequence
from pathlib import Path

import click

from tlstunnel.cli.control import control_options, run_command

UNITS = ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))

HEADINGS = ("process", "generation", "version", "age", "state", "tunnels", "handshakes", "memory")


@click.command()
@control_options
def command(*, control: Path | None, as_json: bool) -> None:
    """Its processes, by generation: each upgrade begins one. Memory is the share of each (PSS)."""
    response = run_command(control, "status", as_json=as_json)
    if response is None:
        return
    state = f", ending ({response['ending']})" if response["ending"] else ""
    click.echo(
        f"tlstunnel {response['version']}, generation {response['generation']}, process {response['process']}{state}"
    )
    click.echo(f"listening on {', '.join(response['listening']) or 'nothing any more'}")
    rows = [
        [
            *(str(one[name]) for name in ("process", "generation", "version")),
            _age(one["seconds"]),
            one["state"],
            *(str(one[name]) for name in ("tunnels", "handshakes")),
            _memory(one["pss_kib"]),
        ]
        for one in response["processes"]
    ]
    rows.append([str(response["process"]), "", "", "", "parent", "", "", _memory(response["pss_kib"])])
    for line in _table([HEADINGS, *rows]):
        click.echo(line)


def _age(seconds: float) -> str:
    size, unit = next((unit for unit in UNITS if seconds >= unit[0]), UNITS[-1])
    return f"{seconds / size:.0f} {unit}"


def _memory(kib: int | None) -> str:
    return "?" if kib is None else f"{kib / 1024:.0f} MiB"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
