"""The stages of a connection before its first request: PROXY header, hello, choice of the site, TLS handshake.

Tested by tests/promises/test_hello_in_pieces.py and test_proxy_protocol.py.
"""

import ssl

from tlstunnel.certificates.clients import ClientRefused, explain_failure
from tlstunnel.errors import CertificateError
from tlstunnel.escaping import printable
from tlstunnel.handshake.refusal import Refusal, render_refusal
from tlstunnel.journal.events import Reason
from tlstunnel.sockets import proxy_protocol
from tlstunnel.sockets.channel import ClientGone
from tlstunnel.tls import hello as tls_hello
from tlstunnel.tls.policy import supports_alpn, supports_version
from tlstunnel.tls.stream import TlsStream
from tlstunnel.tls.truncation import Truncated
from tlstunnel.tunnel.client import Client
from tlstunnel.tunnel.ends import Dropped
from tlstunnel.tunnel.sites import Site

_PLAIN_HTTP = render_refusal(
    Refusal(
        400,
        Reason.HELLO_PLAIN_HTTP,
        "this port speaks TLS. In a browser, open https:// with the same address; programs connect to wss://",
    ),
    None,
)
"""Without an id: it is counted, and not logged each time."""

_TLS_HINT = "the client used http:// or ws://; this port needs https:// or wss://"


async def read_proxy_header(client: Client) -> None:
    """Read the PROXY header; what came after it is the hello. The client's address in it is trusted. Raises Dropped."""
    channel = client.channel
    try:
        data = await channel.buffer(1)
        while (header := proxy_protocol.read_header(data)) is None:
            data = await channel.buffer(proxy_protocol.bytes_needed(data))
        channel.consume(header.length)
    except proxy_protocol.BadHeader as error:
        raise Dropped(Reason.PROXY_MALFORMED, detail=error.reason) from None
    except ClientGone:
        raise Dropped(Reason.PROXY_CLIENT_CLOSED) from None
    except TimeoutError:
        raise Dropped(Reason.PROXY_TIMED_OUT) from None
    if header.source is not None:
        client.peer = header.source
        if reason := client.serving.firewall.check_address(header.source):
            raise Dropped(reason)


async def read_hello(client: Client) -> tls_hello.ClientHello:
    """Read the ClientHello, and leave it in the channel: OpenSSL needs all of it. Raises Dropped."""
    channel = client.channel
    try:
        data = await channel.buffer(1)
        while (hello := tls_hello.read_client_hello(data)) is None:
            data = await channel.buffer(tls_hello.bytes_needed(data))
    except tls_hello.PlainHTTP:
        raise Dropped(Reason.HELLO_PLAIN_HTTP, _PLAIN_HTTP, _TLS_HINT) from None
    except tls_hello.NotTLS:
        raise Dropped(Reason.HELLO_NOT_TLS) from None
    except tls_hello.BadHello as error:
        raise Dropped(Reason.HELLO_MALFORMED, tls_hello.alert(error.alert), error.reason) from None
    except ClientGone:
        raise Dropped(Reason.HELLO_CLIENT_CLOSED) from None
    except TimeoutError:
        raise Dropped(Reason.HELLO_TIMED_OUT) from None
    return hello


def choose_site(client: Client, hello: tls_hello.ClientHello) -> Site:
    """Choose the site by the hello. Raises Dropped for what cannot be served, before any cryptography is paid for."""
    client.sni, client.ja4 = printable(hello.server_name or ""), hello.ja4
    if not supports_version(hello.versions):
        raise Dropped(Reason.HELLO_TLS_VERSION, tls_hello.alert(tls_hello.PROTOCOL_VERSION))
    # A key exchange over ffdhe8192 blocks all tunnels for 160 ms (docs/tls.md), and no client needs one.
    if hello.finite_field:
        raise Dropped(Reason.HELLO_FINITE_FIELD, tls_hello.alert(tls_hello.HANDSHAKE_FAILURE))
    # Python's OpenSSL completes the TLS handshake without a common protocol, against RFC 7301 section 3.2.
    if not supports_alpn(hello.alpn):
        raise Dropped(Reason.HELLO_ALPN, tls_hello.alert(tls_hello.NO_APPLICATION_PROTOCOL))
    site = client.serving.sites.choose(hello.server_name)
    if site is None:
        raise Dropped(Reason.HELLO_NO_SITE, tls_hello.alert(tls_hello.UNRECOGNIZED_NAME))
    client.site = site
    return site


async def accept_tls(client: Client, site: Site) -> None:
    """Make the TLS handshake, before the deadline that holds since the connection was accepted. Raises Dropped."""
    try:
        tls = TlsStream(site.context)
    except CertificateError as error:
        raise Dropped(Reason.TLS_OUT_OF_RESOURCES, detail=str(error)) from None
    try:
        await client.channel.begin_tls(tls)
    except TimeoutError:
        raise Dropped(Reason.TLS_TIMED_OUT) from None
    except Truncated:
        raise Dropped(Reason.TLS_CLIENT_CLOSED) from None
    except ssl.SSLError as error:
        reason, detail = explain_failure(error)
        raise Dropped(reason, detail=detail) from None
    except OSError as error:
        raise Dropped(Reason.TLS_CLIENT_CLOSED, detail=error.strerror or str(error)) from None
    certificate = tls.certificate
    try:
        client.subject = site.check_client(certificate)
    except ClientRefused as refused:
        # The client gets it as the response to its request: in TLS 1.3 it is too late for an alert.
        client.certificate_refusal = refused
    if site.edge is not None or site.edits.proxy_header == "v2-tls":
        # Even if the subject is empty: workloads often have their names in the subjectAltName alone.
        client.certificate = certificate
    client.tls_version, client.cipher = tls.version, tls.cipher
