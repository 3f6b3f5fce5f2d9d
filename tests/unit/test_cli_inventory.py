"""Tables of sites, origins and certificates."""

from tlstunnel.cli.inventory import render_table
from tlstunnel.commands.sites import CertificateStatus, OriginStatus, SiteStatus


def test_sites() -> None:
    sites = [
        SiteStatus(names=["a.test"], tunnels=3, refused={"blocked": 2, "origin": 1}, origins=2, ejected=1),
        SiteStatus(names=["xn--bcher-kva.test"], shown="bücher.test", throttled=True, certificate_days=12.3),
    ]
    heading, first, second = render_table("sites", sites)
    assert heading.split()[:4] == ["site", "tunnels", "guideline", "opened"]
    assert first.split()[:5] == ["a.test", "3", "none", "0", "3"]
    assert "1/2" in first
    assert second.startswith("bücher.test")
    assert second.endswith("12 days      throttled")


def test_an_origin_with_a_problem_says_which() -> None:
    origins = [
        OriginStatus(site="a.test", address="127.0.0.1:1", problem="of yesterday"),
        OriginStatus(
            site="a.test", route="/x", address="127.0.0.1:2", state="ejected", until=0.0, problem="re\x1bfused"
        ),
    ]
    lines = list(render_table("origins", origins))
    assert "ejected until 00:00:00 UTC" in lines[2]
    assert lines[3:] == ["a.test/x: 127.0.0.1:2: re\\x1bfused"]


def test_certificates() -> None:
    certificate = CertificateStatus(
        sites=["a.test", "b.test"],
        more_sites=1,
        names=["a.test"],
        file="/a.pem",
        issuer="CN=CA",
        subject="CN=a",
        serial="1",
        key="ECDSA P-256",
        not_before=0.0,
        not_after=86_400.0,
        days=-3.0,
        problem="it has expired",
    )
    _, row, problem = render_table("certificates", [certificate])
    assert row.split("  ")[0] == "a.test and 2 more"
    assert "1970-01-02" in row
    assert problem == "/a.pem: it has expired"


def test_nothing_to_show() -> None:
    assert list(render_table("origins", [])) == ["no origins"]
