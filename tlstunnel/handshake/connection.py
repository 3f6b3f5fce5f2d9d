"""What is known about a client and its connection when its request is judged: for the firewall, sites and edge."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """A client's connection. What is not known is "".

    `ip` is the client's address as far as the tunnel trusts whoever reported it, `tls_version` such as ``TLSv1.3``,
    `site` the first of the site's names.
    """

    ip: str
    tls_version: str = ""
    tls_cipher: str = ""
    tls_sni: str = ""
    tls_ja4: str = ""
    client_subject: str = ""
    site: str = ""
