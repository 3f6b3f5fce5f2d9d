"""node's `ws`, the client most JavaScript programs use."""

import json
import subprocess

from tests.harness import REPOSITORY, Certificate, Tunnel, WebsocketsOrigin, missing, require

CLIENTS = REPOSITORY / "tests" / "clients"


def test_ws_converses_through_the_tunnel(certificate: Certificate) -> None:
    node = require("node", "nodejs")
    if not (CLIENTS / "node_modules" / "ws").is_dir():
        missing("node's ws is not installed: ./scripts/install gets it")
    with WebsocketsOrigin(subprotocols=["v1.echo"]) as origin, Tunnel(origin.address, certificate) as tunnel:
        done = subprocess.run(
            [node, str(CLIENTS / "converse.mjs"), tunnel.uri, str(tunnel.ca)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        record = tunnel.wait_records(1)[0]
    result = json.loads(done.stdout)
    assert result == {
        "subprotocol": "v1.echo",
        "extensions": "permessage-deflate",
        "status": 101,
        "tls": "TLSv1.3",
        "text": "grüße",
        "sameBytes": True,
        "fragmented": "fragmented",
        "pong": "are you there",
        "close": [4003, "done"],
    }
    assert record["status"] == 101
