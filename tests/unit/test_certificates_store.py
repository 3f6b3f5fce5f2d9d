"""The store of certificates: files are read once, contexts bounded, and both taken over at a reload."""

import gc
import os
import ssl
import time
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.harness import assert_below
from tests.pki import DAY, NOW, Authority, cert_pem, client_context, tls_client, tls_server
from tlstunnel.certificates import store
from tlstunnel.certificates.clients import ClientFiles
from tlstunnel.certificates.pairs import PairFiles
from tlstunnel.certificates.store import CONTEXT_LIFETIME, Certificates, ServerContexts, ServerCredentials
from tlstunnel.errors import CertificateError

CA = Authority()


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def served(certificates: Certificates, folder: Path, number: int) -> ServerCredentials:
    return certificates.serve((PairFiles(*CA.pair(folder, f"x{number}")),))


def test_same_files_are_read_once_and_share_a_context(tmp_path: Path) -> None:
    certificates = Certificates()
    files = (PairFiles(*CA.pair(tmp_path, "x")),)
    first, second = certificates.serve(files), certificates.serve((PairFiles(*vars_of(files[0])),))
    assert first is second
    assert first.context() is second.context()
    assert len(list(certificates.sources())) == 1


def vars_of(files: PairFiles) -> tuple[Path, Path]:
    return files.cert, files.key


def test_another_client_policy_is_another_context(tmp_path: Path) -> None:
    certificates = Certificates()
    files = (PairFiles(*CA.pair(tmp_path, "x")),)
    ca = tmp_path / "ca.pem"
    ca.write_bytes(cert_pem(CA.cert))
    policies = [
        None,
        ClientFiles(ca),
        ClientFiles(ca, required=False),
        ClientFiles(ca, allow=("cn:ann",)),
        ClientFiles(ca, allow=("cn:bob",)),
    ]
    all_served = [certificates.serve(files, policy) for policy in policies]
    assert len({id(each.context()) for each in all_served}) == len(policies)
    assert [each.context().verify_mode for each in all_served[:3]] == [
        ssl.CERT_NONE,
        ssl.CERT_REQUIRED,
        ssl.CERT_OPTIONAL,
    ]
    assert len(list(certificates.sources())) == len(policies)  # one pair


def test_contexts_are_created_on_first_use_and_the_least_recently_used_are_dropped(tmp_path: Path) -> None:
    contexts = ServerContexts(most=2)
    certificates = Certificates(contexts)
    sites = [served(certificates, tmp_path, number) for number in range(3)]
    assert len(contexts) == 0
    first = id(sites[0].context())
    sites[1].context()
    assert id(sites[0].context()) == first
    sites[2].context()  # replaces the second, which was used less recently than the first
    assert id(sites[0].context()) == first
    assert len(contexts) == 2


def test_a_context_in_use_is_not_created_twice(tmp_path: Path) -> None:
    contexts = ServerContexts(most=1)
    certificates = Certificates(contexts)
    one, other = served(certificates, tmp_path, 1), served(certificates, tmp_path, 2)
    in_use = one.context()
    other.context()
    assert len(contexts) == 1
    assert one.context() is in_use


def test_unused_contexts_are_freed(tmp_path: Path) -> None:
    contexts = ServerContexts(most=1)
    certificates = Certificates(contexts)
    sites = [served(certificates, tmp_path, number) for number in range(4)]
    for site in sites:
        site.context()
    gc.collect()
    assert len(contexts._alive) == 1


def test_ticket_keys_change_after_a_day(tmp_path: Path) -> None:
    clock = Clock()
    site = served(Certificates(ServerContexts(clock=clock)), tmp_path, 0)
    first = site.context()
    clock.now = CONTEXT_LIFETIME - 1
    assert site.context() is first
    clock.now = CONTEXT_LIFETIME
    second = site.context()
    assert second is not first
    assert site.context() is second


def test_the_old_context_is_used_when_resources_run_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    certificates = Certificates(ServerContexts(clock=clock))
    site, other = served(certificates, tmp_path, 0), served(certificates, tmp_path, 1)
    first = site.context()

    def none_left(name: str, flags: int) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "memfd_create", none_left)
    clock.now = CONTEXT_LIFETIME
    assert site.context() is first
    with pytest.raises(CertificateError, match="cannot be passed to OpenSSL: Too many open files"):
        other.context()
    monkeypatch.undo()
    assert site.context() is first
    clock.now += store.RETRY_SECONDS
    assert site.context() is not first


def test_two_certificates_with_the_same_type_of_key_are_refused(tmp_path: Path) -> None:
    certificates = Certificates()
    first, second = PairFiles(*CA.pair(tmp_path, "a")), PairFiles(*CA.pair(tmp_path, "b"))
    with pytest.raises(CertificateError, match=r"b\.pem: a second certificate with an ECDSA key, besides .*a\.pem"):
        certificates.serve((first, second))
    other = PairFiles(*CA.pair(tmp_path, "c", key=rsa.generate_private_key(65537, 2048)))
    certificates.serve((first, other)).context()


def test_an_error_that_only_openssl_finds_is_reported_when_the_pair_is_loaded(tmp_path: Path) -> None:
    cert, key = CA.pair(tmp_path, "weak", key=rsa.generate_private_key(65537, 1024))
    for _ in range(2):
        with pytest.raises(CertificateError, match=f"{cert}: OpenSSL refuses it: EE_KEY_TOO_SMALL"):
            Certificates().serve((PairFiles(cert, key),))


# A reload.


def settle(*paths: Path) -> None:
    """Wait until the files are old enough that any change shows in their times."""
    while time.time_ns() - max(path.stat().st_ctime_ns for path in paths) < store.UNSETTLED_NS:
        pass


def test_unchanged_files_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = (PairFiles(*CA.pair(tmp_path, "x")),)
    settle(*files[0].paths)
    before = Certificates()
    context = before.serve(files).context()
    monkeypatch.setattr(store, "read_pair", None)
    after = Certificates(before.contexts)
    assert after.serve(files, None, before).context() is context
    after.activate()
    assert after.serve(files).context() is context


def test_changed_files_are_read_and_old_contexts_dropped(tmp_path: Path) -> None:
    pairs = CA.pair(tmp_path, "x")
    before = Certificates()
    old = before.serve((PairFiles(*pairs),)).context()
    CA.pair(tmp_path, "x")
    after = Certificates(before.contexts)
    new = after.serve((PairFiles(*pairs),), None, before)
    assert new.context() is not old
    after.activate()
    assert len(before.contexts) == 1


def test_after_files_break_the_old_pair_is_served(tmp_path: Path) -> None:
    cert, key = CA.pair(tmp_path, "x")
    files = (PairFiles(cert, key),)
    before = Certificates()
    context = before.serve(files).context()
    key.unlink()
    after = Certificates(before.contexts)
    assert after.serve(files, None, before).context() is context
    assert after.complaints() == [f"{key}: cannot be read: No such file or directory"]
    with pytest.raises(CertificateError, match="cannot be read"):
        Certificates().serve(files)


def test_an_expired_pair_does_not_replace_a_valid_one(tmp_path: Path) -> None:
    cert, key = CA.pair(tmp_path, "x")
    files = (PairFiles(cert, key),)
    before = Certificates()
    context = before.serve(files).context()
    CA.pair(tmp_path, "x", start=NOW - 9 * DAY, end=NOW - DAY)
    after = Certificates(before.contexts)
    assert after.serve(files, None, before).context() is context
    assert [line.startswith(f"{cert}: the new certificate expired") for line in after.complaints()] == [True]


def test_an_expired_certificate_is_a_warning_at_start(tmp_path: Path) -> None:
    cert, key = CA.pair(tmp_path, "x", start=NOW - 9 * DAY, end=NOW - DAY)
    certificates = Certificates()
    certificates.serve((PairFiles(cert, key),)).context()
    assert [line.startswith(f"{cert}: the certificate expired on") for line in certificates.warnings(NOW)] == [True]


def test_many_reloads_leave_nothing_behind(tmp_path: Path) -> None:
    certificates = Certificates()
    files = (PairFiles(*CA.pair(tmp_path, "x")),)
    certificates.serve(files).context()
    for _ in range(20):
        CA.pair(tmp_path, "x")
        after = Certificates(certificates.contexts)
        after.serve(files, None, certificates).context()
        after.activate()
        certificates = after
    gc.collect()
    assert len(certificates.contexts) == 1
    assert len([each for each in gc.get_objects() if isinstance(each, Certificates)]) <= 2


@pytest.mark.alone
def test_a_thousand_sites_take_little_memory_and_time(tmp_path: Path) -> None:
    """A tenth of the promise: 30 KiB a site before first use, 5 s for ten thousand (a slow machine: 15)."""
    cert, key = CA.pair(tmp_path, "x")
    for number in range(1000):
        (tmp_path / f"{number}.pem").write_bytes(cert.read_bytes())
        (tmp_path / f"{number}-key.pem").write_bytes(key.read_bytes())
    stores = []

    def seconds() -> float:
        start = time.process_time()
        stores.append(Certificates())
        for number in range(1000):
            stores[-1].serve((PairFiles(tmp_path / f"{number}.pem", tmp_path / f"{number}-key.pem"),))
        return time.process_time() - start

    before = resident()
    assert_below(1.5, seconds)
    assert (resident() - before) / 1000 / len(stores) < 30 * 1024


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_pair_is_served_after_its_files_are_gone(tmp_path: Path) -> None:
    cert, key = CA.pair(tmp_path, "x")
    ca = tmp_path / "ca.pem"
    ca.write_bytes(cert_pem(CA.cert))
    client = client_context(ca)
    site = Certificates().serve((PairFiles(cert, key),), ClientFiles(ca, required=False))
    for path in (cert, key, ca):
        path.unlink()
    with tls_server(site.context()) as address, tls_client(address, client):
        pass
