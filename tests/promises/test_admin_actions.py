"""Every action has a line in the log that says who has given it, whichever way it came."""

import getpass
import os
import signal
from pathlib import Path

import pytest

from tests.harness import Certificate, RawOrigin, connect_tls, eventually, upgrade
from tests.promises.administered import ALICE, Admin, administered
from tests.promises.counted import hold
from tlstunnel.errors import ControlError
from tlstunnel.processes.reach import send_command


def test_audit_lines(certificate: Certificate, tmp_path: Path) -> None:
    me = f"{getpass.getuser()} (uid {os.getuid()})"
    with administered(certificate, tmp_path, site="guideline = 1") as tunnel:
        admin = Admin(tunnel)
        eventually(
            lambda: admin.ask("POST", "/api/v1/sites/localhost/mute", body={"seconds": 9}, token=ALICE).status == 200
        )
        admin.ask("POST", "/api/v1/sites/x%0ay/mute", body={"seconds": 9}, token=ALICE)
        send_command(tunnel.control, {"do": "reload"})
        with pytest.raises(ControlError):
            send_command(tunnel.control, {"do": "ack", "id": "nothing"})
        good = tunnel.file.read_text()
        tunnel.file.write_text("listen = 1")
        assert admin.ask("POST", "/api/v1/reload", body={}, token=ALICE).status == 409
        tunnel.file.write_text(good)
        tunnel.wait_record(lambda one: one.get("command") == "reload" and one.get("result") == "refused")
        before = len(tunnel.records("action"))
        for _ in range(3):  # none of these is an action
            admin.get("/api/v1/status")
            admin.ask("POST", "/api/v1/reload", body={})
            send_command(tunnel.control, {"do": "status"})
        actions = [
            {name: record[name] for name in ("command", "who", "via", "result", "fields", "reason") if name in record}
            for record in tunnel.records("action")
            if "being" not in record.get("reason", "")
        ]
        assert len(tunnel.records("action")) == before
    assert actions[0] == {
        "command": "mute",
        "who": "token alice",
        "via": "HTTP",
        "result": "done",
        "fields": {"site": "localhost", "seconds": 9.0},
    }
    assert actions[1]["result"] == "refused"
    assert actions[1]["fields"]["site"] == "x\\ny", "nothing is logged unescaped"
    assert "there is no site" in actions[1]["reason"]
    assert actions[2] == {"command": "reload", "who": me, "via": "control socket", "result": "done"}
    assert (actions[3]["command"], actions[3]["result"], actions[3]["who"]) == ("ack", "refused", me)
    assert (actions[4]["command"], actions[4]["result"], actions[4]["via"]) == ("reload", "refused", "HTTP")
    assert "nothing was changed" in actions[4]["reason"]
    assert len(actions) == 5


@pytest.mark.parametrize("how", ["HTTP", "control socket", "signal"])
def test_a_drain_is_seen_at_once(certificate: Certificate, tmp_path: Path, how: str) -> None:
    """A load balancer has to stop sending connections while they are still accepted."""
    top = 'release.drain_wait = "5s"'
    with (
        RawOrigin(hold) as origin,
        administered(certificate, tmp_path, origin=origin.address, top=top) as tunnel,
        connect_tls(tunnel) as sock,
    ):
        assert upgrade(sock).status == 101
        admin = Admin(tunnel)
        assert admin.get("/readyz") == {"ready": True, "reason": ""}
        waiting = None
        if how == "HTTP":
            reply = admin.ask("POST", "/api/v1/drain", body={}, token=ALICE)
            assert (reply.status, reply.json) == (202, {})
        elif how == "control socket":
            waiting = tunnel.start_command("drain")
        else:
            tunnel.send_signal(signal.SIGTERM)
        eventually(lambda: admin.ask("GET", "/readyz").status == 503)
        assert admin.ask("GET", "/readyz").json == {"ready": False, "reason": "the tunnel is shutting down"}
        assert admin.get("/healthz") == {"alive": True}
        with connect_tls(tunnel) as late:
            assert upgrade(late).status == 101, "until drain_wait is over"
        if how != "signal":
            (action,) = tunnel.records("action")
            assert (action["command"], action["via"], action["result"]) == ("drain", how, "begun")
        tunnel.send_signal(signal.SIGTERM)  # the second one ends it at once
        assert tunnel.wait() == 0
        if waiting is not None:
            waiting.wait()


@pytest.mark.parametrize(("style", "shown"), [("prefix", "127.0.0.0/24"), ("hash", "~")])
def test_addresses_are_shown_as_the_log_shows_them(
    certificate: Certificate, tmp_path: Path, style: str, shown: str
) -> None:
    with administered(certificate, tmp_path, top=f'log.address = "{style}"', site="guideline = 1") as tunnel:
        admin = Admin(tunnel)
        assert shown in admin.get("/api/v1/session")["who"]
        assert admin.ask("GET", "/api/v1/status", token="wrong").status == 401
        admin.log_in()
        assert all(
            shown in record["client"] for event in ("token refused", "login") for record in tunnel.records(event)
        )
        throttle = {"rate": "9/second", "seconds": 9, "why": "a flood", "abuse": True, "addresses": ["127.0.0.1/32"]}
        eventually(
            lambda: admin.ask("POST", "/api/v1/sites/localhost/throttle", body=throttle, token=ALICE).status == 200
        )
        (held,) = {one["addresses"][0] for one in admin.get("/api/v1/usage")["throttles"]}
        assert held.startswith(shown)
        audit = tunnel.wait_record(lambda one: one.get("command") == "throttle" and one.get("result") == "done")
        assert held in audit["fields"]["addresses"]
        admin.ask("POST", "/api/v1/tunnels/end", body={"client": "127.0.0.1"}, token=ALICE)
        audit = tunnel.wait_record(lambda one: one.get("command") == "end tunnels")
        assert audit["fields"]["client"] == held
        assert not [line for line in tunnel.log.splitlines() if '"127.0.0.1' in line and "listening" not in line]
