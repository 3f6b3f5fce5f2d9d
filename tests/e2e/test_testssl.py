"""testssl.sh: what it finds at a tunnel with the default settings (docs/tls.md). A minute: `./scripts/soak`."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.harness import Certificate, Tunnel, require

EXCLUDED = {
    "engine_problem": "the openssl that testssl.sh runs has no GOST engine",
    "HTTP_status_code": "426 is the answer to a request that asks for no upgrade",
    "cert_revocation": "a test authority has neither CRL nor OCSP",
    "cipher_order": "the client chooses: every suite is a good one, and it knows which is fast for it. So does "
    "Mozilla's profile intermediate",
}
"""The findings that are not faults of the settings, by testssl.sh's identifiers, and why."""

HARMLESS = {"OK", "INFO", "LOW"}
"""Anything else fails: MEDIUM, HIGH and CRITICAL, and WARN and FATAL, with which something was not tested."""

NEEDED = {
    "SSLv2", "SSLv3", "TLS1", "TLS1_1", "TLS1_2", "TLS1_3", "heartbleed", "CCS", "ticketbleed", "ROBOT",
    "secure_renego", "secure_client_renego", "CRIME_TLS", "POODLE_SSL", "SWEET32", "FREAK", "DROWN", "LOGJAM", "BEAST",
    "LUCKY13", "RC4",
}  # fmt: skip
"""The tests that must have run."""


@pytest.mark.soak
def test_testssl_finds_nothing(certificate: Certificate, tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    # Debian calls it testssl, its authors testssl.sh.
    command = [require("testssl", "testssl.sh"), "--quiet", "--color", "0", "--warnings", "off", "--sneaky"]
    command += ["--ip", "127.0.0.1", "--nodns", "none", "--add-ca", str(certificate.ca), "--jsonfile", str(found)]
    with Tunnel(None, certificate, measured=True) as tunnel:
        target = f"localhost:{tunnel.port}"
        done = subprocess.run([*command, target], capture_output=True, text=True, timeout=270, check=False)
    assert found.exists(), done.stdout + done.stderr
    findings = json.loads(found.read_text())
    assert {finding["id"] for finding in findings} >= NEEDED
    faults = [finding for finding in findings if finding["severity"] not in HARMLESS and finding["id"] not in EXCLUDED]
    assert not faults
    assert not [finding for finding in findings if "ffdhe" in finding["finding"]]
