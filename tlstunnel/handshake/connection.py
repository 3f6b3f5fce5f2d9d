"""What is known about a connection and its request beside the request itself: for the firewall and edge workers."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """A client's connection, as one request sees it. What is not known is "".

    `ip` is the client's address as far as the tunnel trusts whoever reported it, `tls_version` such as ``TLSv1.3``,
    `site` the first of the site's names. `certificate` is the client's, in DER, and only there for edge workers.
    """

    ip: str
    tls_version: str = ""
    tls_cipher: str = ""
    tls_sni: str = ""
    tls_ja4: str = ""
    client_subject: str = ""
    site: str = ""
    certificate: bytes | None = None
    request_id: str = ""
