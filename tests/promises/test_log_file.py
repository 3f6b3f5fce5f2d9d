"""The log in a file has every line, also when it is rotated under load, and only what is wanted of addresses."""

import json
import signal
import subprocess
import threading
from collections import Counter
from pathlib import Path
from typing import Any

from tests.harness import PROGRAM, TIMEOUT, Certificate, RawOrigin, Tunnel, connect_tls, echo_bytes, eventually, upgrade
from tests.promises.firewalled import config_for
from tlstunnel.processes.reach import send_command


def read(*files: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def connections(*files: Path) -> Counter[str]:
    return Counter(line["path"] for line in read(*files) if line["event"] == "connection")


def test_no_line_is_lost_when_it_is_rotated_under_load(certificate: Certificate, tmp_path: Path) -> None:
    log = tmp_path / "tunnel.log"
    top = f'[log]\nfile = "{log}"\naddress = "hash"\nfields = ["path", "client", "user_agent"]\n'
    rotated: list[Path] = []
    with RawOrigin(echo_bytes) as origin:
        config = config_for(origin.address, certificate, top=top)
        with Tunnel(None, certificate, config=config, arguments=("--processes", "2")) as tunnel:

            def connect(name: int) -> None:
                for number in range(25):
                    with connect_tls(tunnel) as client:
                        upgrade(client, path=f"/{name}/{number}", headers=[("User-Agent", f"test/{name}")])

            threads = [threading.Thread(target=connect, args=(name,)) for name in range(2)]
            for thread in threads:
                thread.start()
            for number in range(3):
                eventually(lambda: log.exists() and len(connections(log)) > 2)
                rotated.append(log.rename(log.with_name(f"tunnel.log.{number}")))
                tunnel.send_signal(signal.SIGHUP)
                eventually(log.exists)
            for thread in threads:
                thread.join()
            expected = Counter(f"/{name}/{number}" for name in range(2) for number in range(25))
            eventually(lambda: connections(*rotated, log) == expected)
            tunnel.wait_records(50)
        lines = read(*rotated, log)
    assert lines[0]["event"] != "connection"
    assert lines[-1]["event"] == "stopped"
    assert "threads abandoned" not in {line["event"] for line in lines}
    record = next(line for line in lines if line["event"] == "connection")
    assert record.keys() == {"event", "level", "timestamp", "id", "client", "path", "user_agent"}
    clients = {line["client"] for line in lines if line["event"] == "connection"}
    assert len(clients) == 1
    assert clients.pop().startswith("~")
    assert "127.0.0.1" not in {value for line in lines for value in line.values() if isinstance(value, str)}


def test_a_file_that_cannot_be_opened_is_an_error(certificate: Certificate, tmp_path: Path) -> None:
    config = config_for("127.0.0.1:9", certificate, top='[log]\nfile = "missing/tunnel.log"\n')
    file = tmp_path / "tlstunnel.toml"
    file.write_text(config)
    result = subprocess.run(
        [*PROGRAM, "start", "--config", file, "--control", tmp_path / "control.sock"],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert result.returncode == 1
    assert f"log.file: {tmp_path}/missing/tunnel.log: cannot be opened: No such file or directory" in result.stderr


def test_an_upgrade_keeps_the_hashes_and_the_loads(certificate: Certificate, tmp_path: Path) -> None:
    log = tmp_path / "tunnel.log"
    top = f'[log]\nfile = "{log}"\naddress = "hash"\n'
    with RawOrigin(echo_bytes) as origin:
        with Tunnel(None, certificate, config=config_for(origin.address, certificate, top=top)) as tunnel:
            for path in ("/before", "/after"):
                with connect_tls(tunnel) as client:
                    assert upgrade(client, path=path).status == 101
                tunnel.wait_records(1 if path == "/before" else 2)
                if path == "/before":
                    tunnel.run_command("upgrade")
            loads = send_command(tunnel.control, {"do": "loads"})["loads"]
        assert [load["what"] for load in loads] == ["upgrade", "start"]
        assert "uid" in loads[0]["who"]
    clients = {line["path"]: line["client"] for line in read(log) if line["event"] == "connection"}
    assert clients["/before"] == clients["/after"]
    assert {"ready", "upgraded", "stopped"} <= {line["event"] for line in read(log)}
