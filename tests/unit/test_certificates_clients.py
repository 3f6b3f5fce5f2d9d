"""Client certificates: which clients are accepted, what the origin gets, and which sessions resume."""

import ssl
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given
from hypothesis import strategies as st

from tests.pki import (
    DAY,
    NOW,
    Authority,
    cert_pem,
    client_context,
    key_pem,
    new_key,
    read_until,
    s_client,
    tls_client,
    tls_server,
    typing,
)
from tlstunnel.certificates import clients
from tlstunnel.certificates.clients import (
    ClientFiles,
    ClientRefused,
    explain_failure,
    find_common_name,
    is_allowed,
    read_policy,
    read_subject,
)
from tlstunnel.certificates.contexts import make_context
from tlstunnel.certificates.pairs import PairFiles, read_pair
from tlstunnel.certificates.store import Certificates, ServerCredentials
from tlstunnel.certificates.validity import Validity
from tlstunnel.errors import CertificateError

CA = Authority()
KEY = new_key()
VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]


def der(cert: x509.Certificate) -> bytes:
    return cert.public_bytes(Encoding.DER)


# The subject.


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (["ann"], "CN=ann"),
        (["Müller"], r"CN=M\C3\BCller"),
        (["a,b+c"], r"CN=a\,b\+c"),
        (["a\r\nX-Admin: 1"], r"CN=a\0D\0AX-Admin: 1"),
        (["\u202eann"], r"CN=\E2\80\AEann"),
        (["\x7f"], r"CN=\7F"),
        (["back\\slash"], r"CN=back\\slash"),
        (["ann", "bob"], "CN=bob,CN=ann"),
        ([], ""),
    ],
)
def test_subject(values: list[str], text: str) -> None:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, value) for value in values])
    assert read_subject(der(CA.sign(KEY, name))) == text


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=16), min_size=1, max_size=3))
def test_any_subject_is_visible_ascii_and_can_be_read_back(values: list[str]) -> None:
    name = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, value) for value in values])
    text = read_subject(der(CA.sign(KEY, name)))
    assert text.isascii()
    assert text.isprintable()
    if not any("\0" in value for value in values):
        assert x509.Name.from_rfc4514_string(text) == name


def test_a_subject_that_is_too_long_is_refused() -> None:
    name = x509.Name([x509.NameAttribute(NameOID.USER_ID, f"{number:050}") for number in range(100)])
    with pytest.raises(CertificateError, match="more than 4096 characters"):
        read_subject(der(CA.sign(KEY, name)))


def test_an_invalid_certificate_has_no_subject() -> None:
    with pytest.raises(CertificateError):
        read_subject(b"\x30\x00")
    assert not is_allowed(b"\x30\x00", ("cn:ann",))


# The list of allowed clients.

ANN = der(
    CA.sign(
        KEY,
        "ann",
        [
            x509.DNSName("Ann.Example.com"),
            x509.DNSName("*.example.org"),
            x509.UniformResourceIdentifier("spiffe://x/ann"),
        ],
    )
)


@pytest.mark.parametrize(
    ("allow", "expected"),
    [
        ((), True),
        (("cn:ann",), True),
        (("cn:Ann",), False),
        (("cn:bob", "cn:ann"), True),
        (("cn:an",), False),
        (("dns:ann",), False),
        (("dns:ann.example.com",), True),
        (("dns:ANN.example.com",), True),
        (("dns:a.example.org",), False),
        (("dns:*.example.org",), True),
        (("cn:ann.example.com",), False),
        (("uri:spiffe://x/ann",), True),
        (("uri:spiffe://x/Ann",), False),
        (("uri:spiffe://x/",), False),
        (("uri:spiffe://x/bob",), False),
    ],
)
def test_allow_list(allow: tuple[str, ...], expected: bool) -> None:
    assert is_allowed(ANN, allow) is expected


def test_several_common_names_match_nothing() -> None:
    names = [x509.NameAttribute(NameOID.COMMON_NAME, value) for value in ("ann", "bob")]
    cert = der(CA.sign(KEY, x509.Name(names)))
    assert not is_allowed(cert, ("cn:ann", "cn:bob", "cn:ann,bob"))
    assert is_allowed(cert, ("dns:localhost",))


CN, ORG = NameOID.COMMON_NAME, NameOID.ORGANIZATION_NAME


@pytest.mark.parametrize(
    ("attributes", "name"),
    [
        ([(CN, "ann")], "ann"),
        ([(CN, "M\u00fcller, of sales")], "M\u00fcller, of sales"),
        ([(CN, "alice"), (ORG, "x,CN=admin")], "alice"),
        ([(ORG, "x+CN=admin")], ""),
        ([(CN, "alice"), (CN, "admin")], ""),
        ([(CN, "admin\0.example")], ""),
        ([(CN, "admin\r\n")], ""),
        ([(CN, "admin\u202e")], ""),
        ([], ""),
    ],
)
def test_a_common_name_cannot_be_forged(attributes: list[tuple[x509.ObjectIdentifier, str]], name: str) -> None:
    # One by one, because a set of several attributes would be sorted.
    subject = x509.Name([x509.NameAttribute(oid, value) for oid, value in attributes])
    assert find_common_name(der(CA.sign(KEY, subject))) == name
    assert find_common_name(b"no certificate") == ""


# Authorities and revocation lists.


@pytest.fixture
def ca(tmp_path: Path) -> Path:
    (tmp_path / "ca.pem").write_bytes(cert_pem(CA.cert))
    return tmp_path / "ca.pem"


def crl_pem(*lists: x509.CertificateRevocationList) -> bytes:
    return b"".join(each.public_bytes(Encoding.PEM) for each in lists)


def reason(files: ClientFiles) -> str:
    with pytest.raises(CertificateError) as caught:
        read_policy(files)
    return str(caught.value)


def test_errors_name_the_file(ca: Path, tmp_path: Path) -> None:
    crl = tmp_path / "crl.pem"
    assert reason(ClientFiles(crl)) == f"{crl}: cannot be read: No such file or directory"
    assert reason(ClientFiles(ca, crl)) == f"{crl}: cannot be read: No such file or directory"
    crl.write_bytes(b"hello")
    assert reason(ClientFiles(ca, crl)) == f"{crl}: contains no certificate revocation list, or a damaged one"
    other = Authority("Other")
    crl.write_bytes(crl_pem(CA.revoke(), other.revoke())[:-100])
    assert reason(ClientFiles(ca, crl)) == (f"{crl}: is incomplete: it has BEGIN X509 CRL 2x, END X509 CRL 1x")
    crl.write_bytes(crl_pem(other.revoke()))
    assert reason(ClientFiles(ca, crl)) == (
        f"{crl}: contains no revocation list of an authority in {ca}: every client would be refused"
    )
    crl.write_bytes(crl_pem(CA.revoke(key=other.key)))
    assert reason(ClientFiles(ca, crl)) == (
        f"{crl}: a revocation list is not signed by the authority in {ca} that it names"
    )


def test_a_revocation_list_may_be_der(ca: Path, tmp_path: Path) -> None:
    crl = tmp_path / "crl"
    crl.write_bytes(CA.revoke().public_bytes(Encoding.DER))
    in_der = read_policy(ClientFiles(ca, crl))
    crl.write_bytes(crl_pem(CA.revoke()))
    assert read_policy(ClientFiles(ca, crl)).lists == in_der.lists == (Validity(NOW - DAY, NOW + DAY),)


def test_an_expired_policy_is_a_warning_and_replaces_nothing(ca: Path, tmp_path: Path) -> None:
    crl = tmp_path / "crl.pem"
    crl.write_bytes(crl_pem(CA.revoke()))
    good = read_policy(ClientFiles(ca, crl))
    crl.write_bytes(crl_pem(CA.revoke(end=NOW - DAY)))
    stale = read_policy(ClientFiles(ca, crl))
    assert good.find_warning(NOW) is None
    assert str(stale.find_warning(NOW)).startswith(f"{crl}: a revocation list expired on ")
    assert stale.find_objection(good, NOW) == stale.find_warning(NOW)
    assert stale.find_objection(stale, NOW) is good.find_objection(stale, NOW) is None
    ca.write_bytes(cert_pem(CA.cert, Authority("Old", end=NOW - DAY).cert))
    assert str(read_policy(ClientFiles(ca)).find_warning(NOW)).startswith(f"{ca}: an authority expired on ")


def test_a_policy_that_expires_soon_is_a_warning_and_no_objection(ca: Path, tmp_path: Path) -> None:
    crl = tmp_path / "crl.pem"
    crl.write_bytes(crl_pem(CA.revoke(end=NOW + 6 * DAY)))
    good = read_policy(ClientFiles(ca, crl))
    later = NOW + 5 * DAY
    assert good.find_warning(NOW) is None
    assert good.find_warning(later) == (
        f"{crl}: a revocation list expires on {NOW + 6 * DAY:%Y-%m-%d %H:%M} UTC, and its authority's clients will be"
        " refused; renew it"
    )
    assert good.find_objection(good, later) is None
    ca.write_bytes(cert_pem(Authority("Ends", end=NOW + DAY / 8).cert))
    assert str(read_policy(ClientFiles(ca)).find_warning(NOW)).startswith(f"{ca}: an authority expires on ")


def test_only_the_last_list_of_an_issuer_counts(ca: Path, tmp_path: Path) -> None:
    crl = tmp_path / "crl.pem"
    crl.write_bytes(crl_pem(CA.revoke()) + crl_pem(CA.revoke(end=NOW - DAY)))
    assert read_policy(ClientFiles(ca, crl)).find_warning(NOW) is None


# Why OpenSSL refuses a client.


def shake_hands(server: ssl.SSLContext, client: ssl.SSLContext) -> ssl.SSLError | None:
    """Make a TLS handshake in memory. Return the server's error."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    there = server.wrap_bio(up, down, server_side=True)
    here = client.wrap_bio(down, up, server_hostname="localhost")
    for side in (here, there, here, there, here):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
        except ssl.SSLError as error:
            return error
    return None


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize(
    "reason",
    [
        "accepted",
        "tls: no client certificate",
        "tls: client certificate from unknown issuer",
        "tls: client certificate expired",
        "tls: client certificate not yet valid",
        "tls: client certificate revoked",
        "tls: client certificate for another purpose",
        "tls: client certificate not trusted",
        "tls: no revocation list",
        "tls: revocation list expired",
    ],
)
def test_each_cause_of_a_refusal_has_a_reason(tmp_path: Path, reason: str, version: ssl.TLSVersion) -> None:
    ca, crl = tmp_path / "ca.pem", tmp_path / "crl.pem"
    authority, key = Authority(), new_key()
    start, end, issuer, usage = NOW - DAY, NOW + DAY, authority, ExtendedKeyUsageOID.CLIENT_AUTH
    if "unknown issuer" in reason:
        issuer = Authority("Other")
    elif "not trusted" in reason:  # the authority's name, but not its key
        issuer = Authority()
        issuer.name = authority.name
    elif "not yet" in reason:
        start = NOW + DAY / 2
    elif "certificate expired" in reason:
        end = NOW - DAY / 2
    elif "purpose" in reason:
        usage = ExtendedKeyUsageOID.SERVER_AUTH
    cert = issuer.sign(key, "ann", (), start, end, usage=usage)
    ca.write_bytes(cert_pem(authority.cert))
    if "no revocation" in reason:  # of the intermediate authority
        middle = Authority("Middle", issuer=authority)
        ca.write_bytes(cert_pem(middle.cert, authority.cert))
        cert = middle.sign(key, "ann", ())
    revoked = [cert] if "revoked" in reason else []
    list_end = NOW - DAY / 2 if "list exp" in reason else NOW + DAY
    crl.write_bytes(crl_pem(authority.revoke(*revoked, end=list_end, unusual=True)))  # so that OpenSSL reads it
    server = make_context((read_pair(PairFiles(*CA.pair(tmp_path, "server"))),), read_policy(ClientFiles(ca, crl)))
    (tmp_path / "trusted.pem").write_bytes(cert_pem(CA.cert))
    client = client_context(tmp_path / "trusted.pem", version)
    if "no client" not in reason:
        (tmp_path / "client.pem").write_bytes(cert_pem(cert) + key_pem(key))
        client.load_cert_chain(tmp_path / "client.pem")
    error = shake_hands(server, client)
    assert ("accepted" if error is None else explain_failure(error)[0]) == reason


def test_other_failures_of_tls_have_openssls_name() -> None:
    error = ssl.SSLError(1, "[SSL: NO_SHARED_CIPHER] no shared cipher")
    error.reason = "NO_SHARED_CIPHER"
    assert explain_failure(error) == ("tls: handshake failed", "NO_SHARED_CIPHER")


# Over real connections.


class Parties:
    """A site that requires client certificates, and clients with and without one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca = folder / "ca.pem"
        self.ca.write_bytes(cert_pem(CA.cert))
        self.files = (PairFiles(*CA.pair(folder, "site")),)
        self.ann = CA.pair(folder, "ann", "ann")

    def site(self, *, crl: Path | None = None, required: bool = True, allow: tuple[str, ...] = ()) -> ServerCredentials:
        return Certificates().serve(self.files, ClientFiles(self.ca, crl, required, allow))

    def open(self) -> ServerCredentials:
        """Another site with the same certificate, which requires no client certificates."""
        return Certificates().serve(self.files)


@pytest.fixture
def parties(tmp_path: Path) -> Parties:
    return Parties(tmp_path)


@contextmanager
def seen_by(site: ServerCredentials) -> Iterator[tuple[ssl.SSLContext, list[str]]]:
    """Provide the site's context, and a list of the subject of each connection, or why it was refused."""
    seen: list[str] = []

    class Looking(ssl.SSLSocket):
        def do_handshake(self, block: bool = False) -> None:
            super().do_handshake(block)
            try:
                seen.append(site.check_client(self.getpeercert(binary_form=True)))
            except ClientRefused as refused:
                seen.append(f"refused: {refused}")

    context = site.context()
    context.sslsocket_class = Looking
    yield context, seen


def subject_seen(site: ServerCredentials, client: ssl.SSLContext, times: int = 1) -> list[str]:
    with seen_by(site) as (context, seen), tls_server(context) as address:
        for _ in range(times):
            with tls_client(address, client):
                pass
    return seen


def refused(site: ServerCredentials, client: ssl.SSLContext) -> str:
    """Return the alert that a client reads. With TLS 1.3 its own part of the TLS handshake is complete by then."""
    with tls_server(site.context()) as address, pytest.raises(ssl.SSLError) as caught, tls_client(address, client):
        pass
    return str(caught.value.reason)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_client_with_a_certificate_is_accepted(parties: Parties, version: ssl.TLSVersion) -> None:
    client = client_context(parties.ca, version, pair=parties.ann)
    assert subject_seen(parties.site(), client) == ["CN=ann"]
    assert subject_seen(parties.site(allow=("cn:ann",)), client) == ["CN=ann"]
    assert subject_seen(parties.site(allow=("cn:bob",)), client) == [
        "refused: the client certificate is not in client_allow"
    ]
    assert subject_seen(parties.open(), client) == [""]


@pytest.mark.parametrize(
    ("version", "alert"),
    [(VERSIONS[0], "SSLV3_ALERT_HANDSHAKE_FAILURE"), (VERSIONS[1], "TLSV13_ALERT_CERTIFICATE_REQUIRED")],
)
def test_a_client_without_a_certificate_gets_an_alert(parties: Parties, version: ssl.TLSVersion, alert: str) -> None:
    client = client_context(parties.ca, version)
    assert refused(parties.site(), client) == alert
    assert subject_seen(parties.site(required=False), client) == [""]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("required", [True, False])
@pytest.mark.parametrize(
    ("authority", "alert"),
    [("Other CA", "TLSV1_ALERT_UNKNOWN_CA"), ("Test CA", "TLSV1_ALERT_DECRYPT_ERROR")],  # another, and an impostor
)
def test_a_client_of_another_authority_is_refused(
    parties: Parties, version: ssl.TLSVersion, required: bool, authority: str, alert: str
) -> None:
    stranger = Authority(authority).pair(parties.folder, "stranger", "ann")
    assert refused(parties.site(required=required), client_context(parties.ca, version, pair=stranger)) == alert


@pytest.mark.parametrize("version", VERSIONS)
def test_an_expired_client_is_refused(parties: Parties, version: ssl.TLSVersion) -> None:
    old = CA.pair(parties.folder, "old", "ann", start=NOW - 9 * DAY, end=NOW - DAY)
    assert refused(parties.site(), client_context(parties.ca, version, pair=old)) == "SSLV3_ALERT_CERTIFICATE_EXPIRED"


@pytest.mark.parametrize("version", VERSIONS)
def test_a_revoked_client_is_refused(parties: Parties, version: ssl.TLSVersion) -> None:
    crl = parties.folder / "crl.pem"
    bob = CA.pair(parties.folder, "bob", "bob")
    crl.write_bytes(crl_pem(CA.revoke(x509.load_pem_x509_certificate(parties.ann[0].read_bytes()))))
    site = parties.site(crl=crl)
    ann = client_context(parties.ca, version, pair=parties.ann)
    # Also in the session that resumes the first.
    assert subject_seen(site, ann, 2) == ["refused: the client certificate has been revoked"] * 2
    assert subject_seen(site, client_context(parties.ca, version, pair=bob)) == ["CN=bob"]


@pytest.mark.parametrize("version", VERSIONS)
def test_an_unusual_list_is_left_to_openssl(parties: Parties, version: ssl.TLSVersion) -> None:
    crl = parties.folder / "crl.pem"
    crl.write_bytes(crl_pem(CA.revoke(x509.load_pem_x509_certificate(parties.ann[0].read_bytes()), unusual=True)))
    site = parties.site(crl=crl)
    assert refused(site, client_context(parties.ca, version, pair=parties.ann)) == "SSLV3_ALERT_CERTIFICATE_REVOKED"


def test_intermediates_are_looked_up_in_the_revocation_lists_too(parties: Parties) -> None:
    middle = Authority("Middle", CA)
    leaf = middle.pair(parties.folder, "leaf", "leaf")
    leaf[0].write_bytes(leaf[0].read_bytes() + cert_pem(middle.cert))
    client = client_context(parties.ca, pair=leaf)
    crl = parties.folder / "crl.pem"
    crl.write_bytes(crl_pem(CA.revoke(), middle.revoke()))
    assert subject_seen(parties.site(crl=crl), client) == ["CN=leaf"]
    crl.write_bytes(crl_pem(CA.revoke(middle.cert), middle.revoke()))
    assert refused(parties.site(crl=crl), client) == "SSLV3_ALERT_CERTIFICATE_REVOKED"


def test_an_intermediate_may_be_the_only_authority(parties: Parties) -> None:
    middle, crl = Authority("Middle", CA), parties.folder / "crl.pem"
    leaf = middle.pair(parties.folder, "leaf", "leaf")
    client = client_context(parties.ca, pair=leaf)
    ann = client_context(parties.ca, pair=parties.ann)
    parties.ca.write_bytes(cert_pem(middle.cert))
    assert subject_seen(parties.site(), client) == ["CN=leaf"]
    crl.write_bytes(crl_pem(middle.revoke()))  # without the root's
    assert subject_seen(parties.site(crl=crl), client) == ["CN=leaf"]
    crl.write_bytes(crl_pem(middle.revoke(x509.load_pem_x509_certificate(leaf[0].read_bytes()))))
    assert subject_seen(parties.site(crl=crl), client) == ["refused: the client certificate has been revoked"]
    assert refused(parties.site(), ann) == "TLSV1_ALERT_UNKNOWN_CA"


# Sessions.


def resumed(first: ssl.SSLContext, second: ssl.SSLContext, client: ssl.SSLContext) -> bool:
    """Return whether a session that began with ``first`` is resumed with ``second``."""
    with tls_server(first, second) as address:
        with tls_client(address, client) as one:
            assert not one.session_reused
            session = one.session
        with tls_client(address, client, session) as two:
            return bool(two.session_reused)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_ticket_of_another_site_does_not_resume_if_certificates_are_required(
    parties: Parties, version: ssl.TLSVersion
) -> None:
    """Python gives every context one session id context: only their own ticket keys keep them apart (seen)."""
    without, with_one = client_context(parties.ca, version), client_context(parties.ca, version, pair=parties.ann)
    free, strict = parties.open().context(), parties.site().context()
    alert = {VERSIONS[0]: "SSLV3_ALERT_HANDSHAKE_FAILURE", VERSIONS[1]: "TLSV13_ALERT_CERTIFICATE_REQUIRED"}[version]
    with pytest.raises(ssl.SSLError, match=alert):
        resumed(free, strict, without)
    with pytest.raises(ssl.SSLError, match=alert):
        resumed(parties.site(required=False).context(), strict, without)
    assert not resumed(free, strict, with_one)
    assert not resumed(strict, free, with_one)
    # Verify that the test would notice a resumption.
    assert resumed(free, free, without)
    assert resumed(strict, strict, with_one)


def test_no_session_is_stored_for_a_client_without_tickets(parties: Parties) -> None:
    """With its id it could be resumed in TLS 1.2, and thousands of sessions would take memory."""
    client = client_context(parties.ca, VERSIONS[0])
    client.options |= ssl.OP_NO_TICKET
    context = parties.open().context()
    assert not resumed(context, context, client)
    assert context.session_stats()["number"] == 0


@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
def test_a_ticket_of_another_site_does_not_resume_with_openssl(parties: Parties, version: str) -> None:
    """With an independent client."""
    free, strict = parties.open().context(), parties.site().context()
    session = parties.folder / "session.pem"

    def ask(address: tuple[str, int], *options: str, waits_for: str = "^hello") -> str:
        process: subprocess.Popen[str] = s_client(address, version, *options)
        with typing(process) as type_line:
            output = read_until(process, waits_for)
            type_line("Q")
            return output + read_until(process, "(?!)")

    with tls_server(free) as address:
        assert "New, TLS" in ask(address, "-sess_out", str(session))
        assert "Reused, TLS" in ask(address, "-sess_in", str(session))
    with tls_server(strict) as address:
        offered = ask(address, "-sess_in", str(session), waits_for="alert number")
    assert "Reused" not in offered
    assert "hello" not in offered.splitlines()
    assert ("alert certificate required" if version == "-tls1_3" else "alert handshake failure") in offered


@pytest.mark.parametrize("version", VERSIONS)
def test_a_resumed_session_is_checked_like_a_new_one(parties: Parties, version: ssl.TLSVersion) -> None:
    """Tickets carry the certificate, which is checked against what is allowed when the session resumes."""
    client = client_context(parties.ca, version, pair=parties.ann)
    site = parties.site(allow=("cn:ann",))
    with seen_by(site) as (context, seen), tls_server(context) as address:
        with tls_client(address, client) as first:
            session = first.session
        with tls_client(address, client, session) as second:
            assert second.session_reused
    assert seen == ["CN=ann", "CN=ann"]


@pytest.mark.parametrize("version", VERSIONS)
def test_an_expired_certificate_does_not_resume(
    parties: Parties, version: ssl.TLSVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = client_context(parties.ca, version, pair=parties.ann)
    with seen_by(parties.site()) as (context, seen), tls_server(context) as address:
        with tls_client(address, client) as first:
            session = first.session
        monkeypatch.setattr(clients, "_read_expiry", lambda _: NOW - DAY)
        with tls_client(address, client, session) as second:
            assert second.session_reused
    assert seen == ["CN=ann", "refused: the client certificate has expired"]


def change_allow(parties: Parties) -> ClientFiles:
    return ClientFiles(parties.ca, allow=("cn:bob",))


def change_authorities(parties: Parties) -> ClientFiles:
    parties.ca.write_bytes(cert_pem(CA.cert, Authority("Second").cert))
    return ClientFiles(parties.ca)


def change_lists(parties: Parties) -> ClientFiles:
    crl = parties.folder / "crl.pem"
    crl.write_bytes(crl_pem(CA.revoke()))
    return ClientFiles(parties.ca, crl)


def change_nothing(parties: Parties) -> ClientFiles:
    return ClientFiles(parties.ca)


@pytest.mark.parametrize("change", [change_allow, change_authorities, change_lists, change_nothing])
@pytest.mark.parametrize("version", VERSIONS)
def test_tickets_are_void_once_the_policy_changes(
    parties: Parties, version: ssl.TLSVersion, change: Callable[[Parties], ClientFiles]
) -> None:
    client = client_context(parties.ca, version, pair=parties.ann)
    before = Certificates()
    first = before.serve(parties.files, ClientFiles(parties.ca)).context()
    after = Certificates(before.contexts)
    second = after.serve(parties.files, change(parties), before).context()
    after.activate()
    assert resumed(first, second, client) is (change is change_nothing)
