"""Certificates with the sites that are served with them."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import cast

from tlstunnel.certificates import issue
from tlstunnel.certificates.pairs import PairFiles, read_pair
from tlstunnel.inventory.certificates import MOST_SITES, CertificateIndex, describe_certificate, find_complaints
from tlstunnel.tunnel.sites import Site


def site(name: str, *pairs: object) -> Site:
    return cast(Site, SimpleNamespace(name=name, served=SimpleNamespace(pairs=pairs)))


def test_a_certificate_is_described_once_for_all_its_sites(tmp_path: Path) -> None:
    issued = issue.create(["a.test", "b.test"], tmp_path)
    pair = read_pair(PairFiles(issued.cert, issued.key))
    index = CertificateIndex()
    for number in range(MOST_SITES + 1):
        index.add(site(f"s{number}.test", pair))
    (served,) = index.list_by_end()
    status = describe_certificate(served, "", datetime.now(UTC))
    assert (len(status.sites), status.more_sites) == (MOST_SITES, 1)
    assert set(status.names) >= {"a.test", "b.test"}
    assert status.file == str(issued.cert)
    assert status.key.startswith("ECDSA")
    assert status.issuer
    assert status.days > 0
    assert status.problem == ""


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    issued = issue.create(["a.test"], tmp_path)
    pair = read_pair(PairFiles(issued.cert, issued.key))
    index = CertificateIndex()
    index.add(site("a.test", pair))
    (served,) = index.list_by_end()
    complaints = find_complaints([(pair, "the new file is damaged"), (object(), "")])
    assert describe_certificate(served, complaints[id(pair)], datetime.now(UTC)).problem == "the new file is damaged"
    late = describe_certificate(served, "", pair.validity.end + timedelta(days=2))
    assert late.days == -2.0
    assert "expired" in late.problem
