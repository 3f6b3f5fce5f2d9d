"""What the firewall and edge workers see of a connection, in addition to the request.

Tested by tests/unit/test_firewall_facts.py.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """A client's connection, at the time of one request. Unknown values are "".

    `ip` is the client's address: the peer's, or the one reported by a proxy that the tunnel trusts. `tls_version` is
    such as ``TLSv1.3``, `site` the first of the site's names. `certificate` is the client's, in DER, for edge workers
    only.
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
