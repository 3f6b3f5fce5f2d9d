"""A Unix socket's file belongs to the process that listens there now."""

import signal
import socket
import ssl
from pathlib import Path

from tests.harness import Certificate, RawOrigin, Tunnel, echo_bytes, eventually, upgrade


def _connect(path: Path, certificate: Certificate) -> ssl.SSLSocket:
    plain = socket.socket(socket.AF_UNIX)
    plain.settimeout(15)
    plain.connect(str(path))
    return ssl.create_default_context(cafile=certificate.ca).wrap_socket(plain, server_hostname="localhost")


def test_old_process_does_not_remove_the_socket_of_the_new_one(certificate: Certificate, tmp_path: Path) -> None:
    """The old process drains; a new one listens on the same path meanwhile; then the old one exits."""
    path = tmp_path / "tunnel.sock"
    listen = (f"unix:{path}",)
    with (
        RawOrigin(echo_bytes) as origin,
        Tunnel(origin.address, certificate, listen=listen) as old,
        _connect(path, certificate) as client,
    ):
        assert upgrade(client).status == 101
        old.send_signal(signal.SIGTERM)
        eventually(lambda: not path.exists())
        with Tunnel(origin.address, certificate, listen=listen):
            client.unwrap()
            client.close()
            assert old.wait() == 0
            with _connect(path, certificate) as other:
                assert upgrade(other).status == 101
