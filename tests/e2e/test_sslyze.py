"""sslyze: what an auditor of TLS servers finds at a tunnel with the default settings (docs/tls.md)."""

import json
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.harness import REPOSITORY, Certificate, Tunnel, missing

PROGRAM = REPOSITORY / "build" / "sslyze" / "bin" / "sslyze"
"""Installed by scripts/install, in a virtual environment of its own."""

SUITES = {
    "TLS_1_2": {
        "ECDHE-ECDSA-AES128-GCM-SHA256",
        "ECDHE-ECDSA-AES256-GCM-SHA384",
        "ECDHE-ECDSA-CHACHA20-POLY1305",
    },
    "TLS_1_3": {"TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256"},
}

BESIDE_MOZILLAS_PROFILE = {
    "maximum_certificate_lifespan": "a test certificate's 397 days, which are Apple's limit; the profile has 366",
    "tls_curves": "X448 and P-521: Python's ssl has no call that chooses groups (docs/tls.md)",
}
"""The differences from the profile `intermediate`, with reasons."""


class Audit(NamedTuple):
    """The results of sslyze: its verdict on the profile, and the result of each of its scans."""

    words: str
    scans: dict[str, Any]


@pytest.fixture(scope="module")
def audit(certificate: Certificate, tmp_path_factory: pytest.TempPathFactory) -> Audit:
    if not PROGRAM.exists():
        missing("sslyze not found: ./scripts/install gets it")
    file = tmp_path_factory.mktemp("sslyze") / "result.json"
    with Tunnel(None, certificate) as tunnel:
        # With a profile it runs all scans that belong to the profile; these do not.
        command = [str(PROGRAM), f"--json_out={file}", "--early_data", "--resum", "--mozilla_config", "intermediate"]
        command += ["--certinfo_ca_file", str(tunnel.ca), f"localhost:{tunnel.port}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert file.exists(), done.stderr
    return Audit(done.stdout, _scans(file))


def _scans(file: Path) -> dict[str, Any]:
    """Return the result of each requested scan; all must have succeeded."""
    (server,) = json.loads(file.read_text())["server_scan_results"]
    assert server["scan_status"] == "COMPLETED", server["connectivity_error_trace"]
    scans = {name: scan for name, scan in server["scan_result"].items() if scan["status"] != "NOT_SCHEDULED"}
    assert {scan["status"] for scan in scans.values()} == {"COMPLETED"}, scans
    return {name: scan["result"] for name, scan in scans.items()}


def _accepted(audit: Audit) -> dict[str, list[dict[str, Any]]]:
    """Return the suites accepted with each version, without versions that have none."""
    results = [result for name, result in audit.scans.items() if name.endswith("_cipher_suites")]
    assert len(results) == 6
    return {result["tls_version_used"]: suites for result in results if (suites := result["accepted_cipher_suites"])}


def test_tls_1_2_and_1_3_and_only_good_suites(audit: Audit) -> None:
    accepted = {
        version: {suite["cipher_suite"]["openssl_name"] for suite in suites}
        for version, suites in _accepted(audit).items()
    }
    assert accepted == SUITES


def test_every_suite_is_forward_secret(audit: Audit) -> None:
    kinds = {suite["ephemeral_key"]["type_name"] for suites in _accepted(audit).values() for suite in suites}
    assert kinds == {"ECDH"}


@pytest.mark.parametrize(
    ("scan", "result"),
    [
        ("tls_compression", {"supports_compression": False}),
        ("tls_1_3_early_data", {"supports_early_data": False}),
        ("openssl_ccs_injection", {"is_vulnerable_to_ccs_injection": False}),
        ("heartbleed", {"is_vulnerable_to_heartbleed": False}),
        ("robot", {"robot_result": "NOT_VULNERABLE_RSA_NOT_SUPPORTED"}),
        ("tls_fallback_scsv", {"supports_fallback_scsv": True}),
        ("tls_extended_master_secret", {"supports_ems_extension": True}),
        (
            "session_renegotiation",
            {
                "supports_secure_renegotiation": True,
                "is_vulnerable_to_client_renegotiation_dos": False,
                "client_renegotiations_success_count": 0,
            },
        ),
    ],
)
def test_known_attacks_and_what_prevents_them(audit: Audit, scan: str, result: dict[str, object]) -> None:
    assert audit.scans[scan] == result


def test_tickets_resume_every_time(audit: Audit) -> None:
    """Session identifiers resume if the client closed its connection in order, which sslyze does not always do."""
    assert audit.scans["session_resumption"]["tls_ticket_resumption_result"] == "FULLY_SUPPORTED"


def test_the_curves(audit: Audit) -> None:
    curves = {curve["name"] for curve in audit.scans["elliptic_curves"]["supported_curves"]}
    assert curves == {"X25519", "X448", "secp256r1", "secp384r1", "secp521r1"}


def test_the_certificate(audit: Audit) -> None:
    (deployment,) = audit.scans["certificate_info"]["certificate_deployments"]
    assert deployment["received_chain_has_valid_order"]
    stores = {result["trust_store"]["name"]: result for result in deployment["path_validation_results"]}
    assert stores["Supplied CA file"]["was_validation_successful"]


def test_mozillas_profile_intermediate(audit: Audit) -> None:
    _, _, words = audit.words.partition('Mozilla\'s "intermediate" configuration')
    assert words, audit.words
    found = {line.strip()[2:].partition(":")[0] for line in words.splitlines() if line.strip().startswith("* ")}
    assert found == set(BESIDE_MOZILLAS_PROFILE), words
    (curves,) = (line for line in words.splitlines() if "* tls_curves" in line)
    assert "are supported, but should be rejected" in curves
    assert {name for name in ("X448", "secp521r1", "X25519", "secp256r1", "secp384r1") if name in curves} == {
        "X448",
        "secp521r1",
    }
