"""``tlstunnel status``: shows the processes of a running tunnel, or what it serves.

Tested by tests/promises/test_processes.py.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from tlstunnel.cli.control import control_options, run_command
from tlstunnel.cli.examples import render_examples
from tlstunnel.cli.inventory import show_inventory
from tlstunnel.cli.tables import align, count, render_duration, render_size
from tlstunnel.metrics import families
from tlstunnel.metrics.families import Family

HEADINGS = ("process", "generation", "version", "age", "state", "tunnels", "handshakes", "memory")


@click.command(
    short_help="Show the processes of a running tunnel, its sites, origins or certificates.",
    epilog=render_examples("tlstunnel status", "tlstunnel status --origins", "tlstunnel status --sites --json"),
)
@click.option("--sites", "what", flag_value="sites", help="Show the sites and what they have used.")
@click.option("--origins", "what", flag_value="origins", help="Show the origins; one with a problem says which.")
@click.option("--certificates", "what", flag_value="certificates", help="Show the certificates; the next to end first.")
@control_options
def command(*, control: Path | None, as_json: bool, what: str | None) -> None:
    """Show the processes of the tunnel. Each upgrade starts a new generation. Memory is proportional (PSS)."""
    if what is not None:
        return show_inventory(what, control, as_json=as_json)
    show_processes(control, as_json=as_json)


def show_processes(control: Path | None, *, as_json: bool) -> None:
    """Show the processes."""
    response = run_command(control, "status", as_json=as_json)
    if response is None:
        return
    state = f", shutting down ({response['ending']})" if response["ending"] else ""
    click.echo(
        f"tlstunnel {response['version']}, generation {response['generation']}, process {response['process']}{state}"
    )
    click.echo(f"listening on {', '.join(response['listening']) or 'nothing'}")
    if response.get("dashboard"):  # earlier releases have none
        click.echo(f"dashboard: {response['dashboard']}")
    if response.get("dashboard_problem"):
        click.echo(f"no dashboard: {response['dashboard_problem']}")
    rows = [
        [
            *(str(one[name]) for name in ("process", "generation", "version")),
            render_duration(one["seconds"]),
            one["state"],
            *("?" if one[name] is None else str(one[name]) for name in ("tunnels", "handshakes")),
            _render_memory(one["pss_kib"]),
        ]
        for one in response["processes"]
    ]
    ledger = response.get("ledger")  # earlier releases have none
    rows += [_make_row(name, response[name]) for name in ("ledger", "admin") if response.get(name) is not None]
    rows.append([str(response["process"]), "", "", "", "parent", "", "", _render_memory(response["pss_kib"])])
    for line in align([HEADINGS, *rows]):
        click.echo(line)
    for line in _render_counting(ledger, response["processes"]):
        click.echo(line)
    if (response.get("admin") or {}).get("state") == "not responding":
        click.echo("admin: not responding")
    if (election := response.get("election")) is not None:
        click.echo(_render_election(election))
    for throttle in response.get("throttles", ()):
        click.echo(_render_throttle(throttle))
    for shortage in response.get("shortages", ()):
        click.echo(f"running short: {shortage}")
    for line in _render_totals(response.get("metrics", {})):
        click.echo(line)


def _make_row(name: str, process: Mapping[str, Any]) -> list[str]:
    return [
        *(str(process[key]) for key in ("process", "generation", "version")),
        render_duration(process["seconds"]),
        name,
        "",
        "",
        _render_memory(process["pss_kib"]),
    ]


def _render_election(election: Mapping[str, Any]) -> str:
    if election["here"]:
        return f"notices: sent by this machine, {election['holder']}"
    if election["holder"]:
        return f"notices: sent by another machine, {election['holder']}"
    return "notices: no machine is elected to send them at the moment, so they wait"


def _render_throttle(throttle: Mapping[str, Any]) -> str:
    addresses = throttle["addresses"]
    who = throttle["site"] + (f" for {count(addresses, 'address', 'addresses')}" if addresses else "")
    rate = f"{throttle['amount']} new handshakes in {throttle['window']} s"
    return f"throttled: {who}, to {rate}, until {datetime.fromtimestamp(throttle['until'], UTC):%Y-%m-%d %H:%M} UTC"


def _render_counting(ledger: Mapping[str, Any] | None, processes: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Return what the ledger does, and which processes do without it."""
    if ledger is not None and ledger["answering"] is None:
        yield "ledger: not responding"
    elif ledger is not None:
        yield (
            f"ledger: counts in {ledger['answering']}, {ledger['questions_per_second']:g} questions per second,"
            f" {ledger['connections']} connections, {ledger['keys']} keys, {ledger['leases']} leases"
        )
        yield from _render_history(ledger.get("history"))
    for one in processes:
        if one.get("counting", "").startswith("local"):
            yield f"process {one['process']} counts alone: {one['counting'].removeprefix('local: ')}"


def _render_history(history: Mapping[str, Any] | None) -> Iterator[str]:
    """Return where the history is, and how far it is written."""
    if history is None:
        return
    if not history["path"]:
        yield f"history: none: {history['problem']}"
        return
    last = history["last"]
    until = "empty" if last is None else f"until {datetime.fromtimestamp(last + 60, UTC):%Y-%m-%d %H:%M} UTC"
    lost = f", {history['lost']} minutes lost" if history["lost"] else ""
    yield f"history: {history['path']}, {render_size(history['bytes'])}, {until}{lost}"
    if history["problem"]:
        yield f"history: not written, {history['waiting']} minutes wait: {history['problem']}"


def _render_totals(metrics: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[str]:
    """Return the main totals of all processes since the start, including those that have exited."""

    def total(family: Family, **labels: str) -> int:
        series = metrics.get(family.name, ())
        return sum(one["value"] for one in series if labels.items() <= one["labels"].items())

    if not metrics:  # from a release without them
        return
    refused = total(families.TLS_HANDSHAKES_FAILED) + total(families.CONNECTIONS_NOT_ACCEPTED)
    yield (
        f"since the start: {total(families.CONNECTIONS_ACCEPTED)} connections, {refused} failed before TLS was"
        f" established, {total(families.TUNNELS_OPENED)} tunnels opened"
    )
    up, down = (total(families.BYTES, direction=direction) for direction in ("up", "down"))
    yield f"moved: {render_size(up)} up, {render_size(down)} down"


def _render_memory(kib: int | None) -> str:
    return "?" if kib is None else f"{kib / 1024:.0f} MiB"
