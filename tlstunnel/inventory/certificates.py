"""The certificates that sites are served with.

Tested by tests/unit/test_inventory_certificates.py.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from cryptography import x509

from tlstunnel.certificates.describe import describe
from tlstunnel.certificates.pairs import Pair
from tlstunnel.commands.sites import CertificateStatus
from tlstunnel.errors import CertificateError
from tlstunnel.tunnel.sites import Site

MOST_SITES = 100
"""Sites that are named with a certificate; the others are counted."""

MOST_NAMES = 100

_LEAF = re.compile(rb"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----\n?", re.DOTALL)


@dataclass(slots=True)
class Served:
    """A certificate that is served, and the sites that have it."""

    pair: Pair
    sites: list[str] = field(default_factory=list)


class CertificateIndex:
    """Collects the certificates of sites, one site at a time."""

    def __init__(self) -> None:
        self._served: dict[tuple[str, bytes], Served] = {}

    def add(self, site: Site) -> None:
        """Add those of a site."""
        for pair in site.served.pairs:
            served = self._served.setdefault((str(pair.cert), pair.digest), Served(pair))
            served.sites.append(site.name)

    def list_by_end(self) -> Sequence[Served]:
        """Return all, those that expire first at the top."""
        return sorted(self._served.values(), key=lambda served: (served.pair.validity.end, str(served.pair.cert)))


def find_complaints(sources: Iterable[tuple[object, str]]) -> dict[int, str]:
    """Return what is wrong with the files of values that are served all the same, by the identity of the value."""
    return {id(value): complaint for value, complaint in sources if complaint}


def describe_certificate(served: Served, complaint: str, now: datetime) -> CertificateStatus:
    """Return the fields of a certificate, which takes a tenth of a millisecond."""
    pair = served.pair
    match = _LEAF.search(pair.pem)
    assert match is not None, "a pair has a leaf"
    problem = complaint or pair.find_warning(now) or ""
    try:
        found = describe(x509.load_pem_x509_certificate(match[0]))
        issuer, subject, serial, key = found.issuer, found.subject, found.serial, found.key
    except (CertificateError, ValueError) as error:
        issuer = subject = serial = key = ""
        problem = problem or str(error)
    return CertificateStatus(
        sites=served.sites[:MOST_SITES],
        more_sites=max(len(served.sites) - MOST_SITES, 0),
        names=sorted(pair.hosts)[:MOST_NAMES],
        file=str(pair.cert),
        issuer=issuer,
        subject=subject,
        serial=serial,
        key=key,
        not_before=pair.validity.begin.timestamp(),
        not_after=pair.validity.end.timestamp(),
        days=round((pair.validity.end - now).total_seconds() / 86_400, 2),
        problem=problem,
    )
