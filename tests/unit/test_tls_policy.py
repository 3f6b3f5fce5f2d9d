import ssl

import pytest

from tests.harness import Certificate
from tlstunnel.tls import policy
from tlstunnel.tls.stream import Pair, TlsStream

X25519 = 0x001D
FINITE_FIELDS = range(0x0100, 0x0200)  # RFC 7919


@pytest.mark.parametrize(
    ("versions", "supported"), [((0x0304, 0x0303), True), ((0x0303,), True), ((0x0302, 0x0301), False), ((), False)]
)
def test_a_client_must_offer_a_version_that_is_not_too_old(versions: tuple[int, ...], supported: bool) -> None:
    assert policy.supports_version(versions) == supported


@pytest.mark.parametrize(
    ("protocols", "supported"), [((), True), ((b"h2", b"http/1.1"), True), ((b"h2",), False), ((b"http/1.0",), False)]
)
def test_a_client_that_uses_alpn_must_offer_http_1_1(protocols: tuple[bytes, ...], supported: bool) -> None:
    assert policy.supports_alpn(protocols) == supported


def test_contexts_speak_tls_1_2_and_1_3_and_nothing_that_weakens_them() -> None:
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    policy.apply_to_server_context(server)
    policy.apply_to_client_context(client)
    for context in (server, client):
        assert context.minimum_version == ssl.TLSVersion.TLSv1_2
        assert context.options & ssl.OP_NO_RENEGOTIATION
        assert not context.options & ssl.OP_IGNORE_UNEXPECTED_EOF
    assert server.num_tickets == 1
    assert not server.options & ssl.OP_CIPHER_SERVER_PREFERENCE
    old = {suite["name"] for suite in server.get_ciphers() if suite["protocol"] == "TLSv1.2"}
    assert old == set(policy.TLS_1_2_CIPHERS.split(":"))


def read_groups(hello: bytes) -> list[int]:
    """Return the supported_groups of a ClientHello: extension 10, whose list is two bytes shorter."""
    at = next(
        at
        for at in range(len(hello) - 6)
        if hello[at : at + 2] == b"\x00\x0a"
        and int.from_bytes(hello[at + 2 : at + 4]) == int.from_bytes(hello[at + 4 : at + 6]) + 2
    )
    size = int.from_bytes(hello[at + 4 : at + 6])
    listed = hello[at + 6 : at + 6 + size]
    return [int.from_bytes(listed[at : at + 2]) for at in range(0, size, 2)]


def offered(context: ssl.SSLContext) -> list[int]:
    stream = TlsStream(context, server_hostname="localhost", pair=Pair())
    stream.handshake(b"")
    return read_groups(stream.output)


def test_no_finite_field_is_offered_to_an_origin() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    assert any(group in FINITE_FIELDS for group in offered(context)), "OpenSSL itself offers them"
    policy.apply_to_client_context(context)
    groups = offered(context)
    assert X25519 in groups
    assert not any(group in FINITE_FIELDS for group in groups)


def test_setting_the_groups_leaves_no_error_for_the_next_call(certificate: Certificate) -> None:
    policy.apply_to_client_context(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_verify_locations(cadata=certificate.ca.read_text())
