import ssl

import pytest

from tlstunnel.tls import policy


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
