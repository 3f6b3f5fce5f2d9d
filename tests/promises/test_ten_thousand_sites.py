"""Ten thousand sites, each with a pair of its own: the start takes seconds, and 30 KiB a site before first use.

How many seconds depends on the machine (5 to 6 s of CPU time in docs/performance.md). So the start is compared with
what no server can avoid: parsing the file, and reading each certificate and key.
"""

import time
import tomllib
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509 import load_pem_x509_certificates

from tests.harness import Certificate, RawOrigin, Tunnel, connect_tls, echo_bytes, upgrade

SITES = 10_000
START_FACTOR = 6.0
"""CPU time of the start, as a multiple of that of the unavoidable part (4.0 measured)."""
SMALLEST = 2_000
"""Sites for which the start has time at least, since a part of it does not depend on their number."""
SITE_BYTES = 30 * 1024


def _configuration(folder: Path, certificate: Certificate, origin: str, sites: int) -> str:
    """The first site is localhost, which clients request; the pairs are equal, but each has files of its own."""
    cert, key = certificate.cert.read_bytes(), certificate.key.read_bytes()
    lines = ['listen = ["127.0.0.1:0"]']
    for number in range(sites):
        (folder / f"{number}.pem").write_bytes(cert)
        (folder / f"{number}-key.pem").write_bytes(key)
        name = "localhost" if number == 0 else f"site-{number}.example.com"
        lines += [
            "[[sites]]",
            f'names = ["{name}"]',
            f'cert = "{folder}/{number}.pem"',
            f'key = "{folder}/{number}-key.pem"',
            f'origins = ["{origin}"]',
        ]
    return "\n".join(lines)


def _measure_unavoidable(config: str) -> float:
    """Return the CPU seconds for parsing the file and reading each pair once."""
    started = time.process_time()
    for site in tomllib.loads(config)["sites"]:
        certificate, *_ = load_pem_x509_certificates(Path(site["cert"]).read_bytes())
        key = load_pem_private_key(Path(site["key"]).read_bytes(), None)
        assert key.public_key() == certificate.public_key()
    return time.process_time() - started


@pytest.mark.parametrize("sites", [pytest.param(1_000), pytest.param(SITES, marks=pytest.mark.soak)])
def test_start_memory_and_reload(certificate: Certificate, tmp_path: Path, sites: int) -> None:
    with RawOrigin(echo_bytes) as origin:
        with Tunnel(config=_configuration(tmp_path, certificate, origin.address, 1), measured=True) as tunnel:
            alone, alone_seconds = tunnel.rss(), tunnel.cpu_seconds()
        config = _configuration(tmp_path, certificate, origin.address, sites)
        unavoidable = _measure_unavoidable(config)
        started = time.monotonic()
        with Tunnel(config=config, certificate=certificate, measured=True) as tunnel:
            whole = time.monotonic() - started
            took, size = tunnel.cpu_seconds() - alone_seconds, (tunnel.rss() - alone) / sites
            print(
                f"{sites} sites: started in {whole:.2f} s, {took:.2f} s more CPU ({took / unavoidable:.1f} times the "
                f"unavoidable part), {size / 1024:.1f} KiB a site"
            )
            assert took < START_FACTOR * unavoidable * max(1, SMALLEST / sites)
            assert size < SITE_BYTES
            with connect_tls(tunnel) as client:
                assert upgrade(client).status == 101
                before = time.monotonic()
                changed = tunnel.reload(config.replace("site-7.example.com", "site-seven.example.com"))
                print(f"reloaded in {time.monotonic() - before:.2f} s")
                assert sorted(changed) == ["site site-7.example.com: removed", "site site-seven.example.com: added"]
                client.sendall(b"still here")
                assert client.recv(100) == b"still here"
