"""An origin that goes away and comes back is served again at once: an earlier failure does not delay clients."""

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator

from tests.harness import (
    Certificate,
    Tunnel,
    connect_tls,
    eventually,
    handshake_request,
    receive_exactly,
    upgrade,
)
from tests.promises.wire import read_until_end, send_request

# A process of its own, so that it can be killed.
ORIGIN = """
import sys
from tests.harness import RawOrigin, echo_bytes
with RawOrigin(echo_bytes, port=int(sys.argv[1])) as origin:
    print(origin.port, flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def _origin(port: int) -> Iterator[tuple[subprocess.Popen[str], int]]:
    command = [sys.executable, "-c", ORIGIN, str(port)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


def test_a_flapping_origin_is_served_whenever_it_is_up(certificate: Certificate) -> None:
    with contextlib.ExitStack() as stack:
        process, port = stack.enter_context(_origin(0))
        tunnel = stack.enter_context(Tunnel(f"127.0.0.1:{port}", certificate))
        for round_ in range(3):
            with connect_tls(tunnel) as client:
                assert upgrade(client).status == 101
                client.sendall(b"still here?")
                assert receive_exactly(client, 11) == b"still here?"

                process.send_signal(signal.SIGKILL)
                process.wait()
                assert read_until_end(client) == b""
            assert send_request(tunnel, handshake_request()).status == 502
            assert send_request(tunnel, handshake_request()).status == 502

            process, _ = stack.enter_context(_origin(port))
            with connect_tls(tunnel) as client:
                assert upgrade(client).status == 101, f"round {round_}: the first one after the origin's return"
        records = tunnel.wait_records(3 * 4)
        by_origin = [record for record in records if record["ended_by"] == "origin"]
        assert len(by_origin) == 3, records
        assert len({record["id"] for record in records}) == len(records) == 12
        eventually(lambda: len(tunnel.records("connection")) == 12)
