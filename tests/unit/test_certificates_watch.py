"""The renewal of certificates while they are served."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator, MutableMapping
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import structlog
from cryptography.hazmat.primitives.serialization import Encoding

from tests.pki import DAY, NOW, Authority, cert_pem, key_pem, new_key
from tlstunnel.certificates import store, watch
from tlstunnel.certificates.clients import ClientFiles
from tlstunnel.certificates.pairs import PairFiles
from tlstunnel.certificates.store import Certificates, ServerCredentials
from tlstunnel.certificates.watch import Watch

CA = Authority()
Line = MutableMapping[str, Any]


@pytest.fixture
def log() -> Iterator[list[Line]]:
    with structlog.testing.capture_logs() as lines:
        yield lines


def warnings(log: list[Line]) -> list[str]:
    return [str(line["reason"]) for line in log if line["log_level"] == "warning"]


class Watched:
    """A site and the watch of its files, which are checked when a test calls `look`."""

    def __init__(self, folder: Path, clients: ClientFiles | None = None, **pair: Any) -> None:
        self.folder = folder
        self.cert, self.key = CA.pair(folder, "x", **pair)
        self.certificates = Certificates()
        self.served: ServerCredentials = self.certificates.serve((PairFiles(self.cert, self.key),), clients)
        self.context = self.served.context()

    def look(self, times: int = 1) -> bool:
        """Check the files so many times. Return whether something new is served since the last call."""

        async def several() -> None:
            watch = Watch(self.certificates)
            for _ in range(times):
                await watch.check(list(self.certificates.sources()))
            await watch.close()

        asyncio.run(several())
        before, self.context = self.context, self.served.context()
        return self.context is not before


def test_a_new_pair_is_served_and_logged(tmp_path: Path, log: list[Line]) -> None:
    site = Watched(tmp_path)
    assert not site.look(3)
    assert log == []
    CA.pair(tmp_path, "x", end=NOW + 60 * DAY + DAY / 2)
    assert site.look()
    assert [line["detail"] for line in log] == [f"{site.cert}: a new certificate is served, with 60 days left"]
    assert not site.look(3)
    assert len(log) == 1


def test_a_file_rewritten_with_the_same_content_is_not_logged(tmp_path: Path, log: list[Line]) -> None:
    site = Watched(tmp_path)
    site.cert.write_bytes(site.cert.read_bytes())
    assert not site.look(2)
    assert log == []


def test_two_renames_in_a_row_are_not_an_error(tmp_path: Path, log: list[Line]) -> None:
    """The certificate is replaced first, and both are checked before the key is replaced."""
    site = Watched(tmp_path)
    (tmp_path / "new").mkdir()
    cert, key = CA.pair(tmp_path / "new", "x")
    cert.replace(site.cert)
    assert not site.look()
    key.replace(site.key)
    assert site.look()
    assert warnings(log) == []


def test_a_link_to_another_folder_is_followed(tmp_path: Path) -> None:
    """As Kubernetes and certbot replace certificates."""
    for name in ("one", "two", "live"):
        (tmp_path / name).mkdir()
    CA.pair(tmp_path / "two", "x")
    site = Watched(tmp_path / "one")
    link = tmp_path / "data"
    link.symlink_to(tmp_path / "one")
    site.served = site.certificates.serve((PairFiles(link / "x.pem", link / "x-key.pem"),))
    site.look()
    (tmp_path / "next").symlink_to(tmp_path / "two")
    (tmp_path / "next").replace(link)
    assert site.look()


def broken(site: Watched, how: str) -> str:
    """Break the site's files, and return how the warning must begin."""
    if how == "mismatch":
        site.key.write_bytes(key_pem(new_key()))
        return f"{site.key}: the private key does not match the certificate in {site.cert}"
    if how == "gone":
        site.key.unlink()
        return f"{site.key}: cannot be read: No such file or directory"
    if how == "half":
        site.cert.write_bytes(site.cert.read_bytes()[:300])
        return f"{site.cert}: contains a damaged certificate"
    CA.pair(site.folder, "x", start=NOW - 9 * DAY, end=NOW - DAY)
    return f"{site.cert}: the new certificate expired on "


BREAKS = ["mismatch", "gone", "half", "expired"]


@pytest.mark.parametrize("how", BREAKS)
def test_an_invalid_pair_is_logged_once_and_the_old_one_is_served(tmp_path: Path, log: list[Line], how: str) -> None:
    site = Watched(tmp_path)
    expected = broken(site, how)
    assert not site.look()
    assert log == []
    assert not site.look()
    assert [reason.startswith(expected) for reason in warnings(log)] == [True]
    assert not site.look(3)
    assert len(log) == 1
    CA.pair(tmp_path, "x")  # repaired
    assert site.look()
    assert len(warnings(log)) == 1


@pytest.mark.parametrize("how", BREAKS)
def test_every_change_to_an_invalid_pair_is_logged(tmp_path: Path, log: list[Line], how: str) -> None:
    site = Watched(tmp_path)
    site.key.write_bytes(b"x")
    site.look(2)
    CA.pair(tmp_path, "x")
    broken(site, how)
    site.look(2)
    assert len(warnings(log)) == 2


def test_an_expired_pair_may_replace_an_expired_one(tmp_path: Path) -> None:
    site = Watched(tmp_path, start=NOW - 9 * DAY, end=NOW - 2 * DAY)
    CA.pair(tmp_path, "x", start=NOW - 9 * DAY, end=NOW - DAY)
    assert site.look()


def test_a_pair_that_is_not_valid_yet_is_served_once_it_is(
    tmp_path: Path, log: list[Line], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Watched(tmp_path)
    CA.pair(tmp_path, "x", start=NOW + DAY)
    assert not site.look(2)
    assert [f"{site.cert}: the new certificate is not valid before" in reason for reason in warnings(log)] == [True]

    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return NOW + DAY

    monkeypatch.setattr("tlstunnel.certificates.store.datetime", Tomorrow)
    assert not site.look(2)  # refused files are not read at each check
    for source in site.certificates.sources():
        source._retry_at = 0.0  # a minute later
    assert site.look()


def test_a_passphrase_is_watched_too(tmp_path: Path) -> None:
    site = Watched(tmp_path)
    words = tmp_path / "words"
    words.write_bytes(b"wrong")
    source = store.PairSource(PairFiles(site.cert, site.key, passphrase_file=words))
    assert words in source.paths


def test_authorities_and_revocation_lists_are_watched(tmp_path: Path, log: list[Line]) -> None:
    ca, crl = tmp_path / "ca.pem", tmp_path / "crl.pem"
    ca.write_bytes(cert_pem(CA.cert))
    crl.write_bytes(CA.revoke().public_bytes(Encoding.PEM))
    site = Watched(tmp_path, ClientFiles(ca, crl))
    assert not site.look(2)
    revoked = CA.sign(new_key())
    crl.write_bytes(CA.revoke(revoked).public_bytes(Encoding.PEM))
    assert site.look()
    assert [line["detail"] for line in log] == [f"{ca}: new authorities or revocation lists are in use"]
    crl.write_bytes(CA.revoke(end=NOW - DAY).public_bytes(Encoding.PEM))
    assert not site.look(2)
    assert [reason.startswith(f"{crl}: a revocation list expired on") for reason in warnings(log)] == [True]


# In a running loop.


def in_loop(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await work()

    asyncio.run(bounded())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "ROUND_SECONDS", 0.02)


def differs(served: ServerCredentials, digest: bytes) -> bool:
    return served.digest != digest


@pytest.mark.usefixtures("quick")
def test_a_renewal_is_noticed_automatically(tmp_path: Path, log: list[Line]) -> None:
    site = Watched(tmp_path)

    async def work() -> None:
        watching = Watch(site.certificates)
        watching.start()
        for _ in range(3):
            before = site.served.digest
            CA.pair(tmp_path, "x")
            await until(partial(differs, site.served, before))
        await watching.close()

    in_loop(work)
    assert warnings(log) == []


@pytest.mark.usefixtures("quick")
def test_after_a_reload_the_next_store_is_watched(tmp_path: Path, log: list[Line]) -> None:
    site = Watched(tmp_path)
    other = PairFiles(*CA.pair(tmp_path, "other"))

    async def work() -> None:
        watching = Watch(site.certificates)
        watching.start()
        site.key.unlink()
        after = Certificates(site.certificates.contexts)
        first = after.serve((PairFiles(site.cert, site.key),), None, site.certificates)
        second = after.serve((other,), None, site.certificates)
        assert first.context() is site.context
        old = second.context()
        watching.switch_to(after)
        CA.pair(tmp_path, "other")
        await until(lambda: second.context() is not old)
        await watching.close()

    in_loop(work)
    assert warnings(log) == [f"{site.key}: cannot be read: No such file or directory"]


@pytest.mark.usefixtures("quick")
def test_a_bug_does_not_end_the_watch(tmp_path: Path, log: list[Line], monkeypatch: pytest.MonkeyPatch) -> None:
    site = Watched(tmp_path)
    with monkeypatch.context() as patch:

        async def work() -> None:
            patch.setattr(watch, "_check_all", None)
            watching = Watch(site.certificates)
            watching.start()
            await until(lambda: any(line["log_level"] == "error" for line in log))
            patch.undo()
            patch.setattr(watch, "ROUND_SECONDS", 0.02)
            CA.pair(tmp_path, "x")
            await until(lambda: site.served.context() is not site.context)
            await watching.close()

        in_loop(work)


def test_without_files_the_watch_does_not_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        watching = Watch(Certificates())
        watching.start()
        await asyncio.sleep(0)
        await watching.close()

    in_loop(work)
    asyncio.run(Watch(Certificates()).close())


def test_days_left_are_logged_and_each_warning_appears_once(tmp_path: Path, log: list[Line]) -> None:
    certificates = Certificates()
    for number, days in enumerate((100, 20, 50)):
        pair = CA.pair(tmp_path, str(number), start=NOW - 80 * DAY, end=NOW + days * DAY)
        certificates.serve((PairFiles(*pair),))
    watching = Watch(certificates)
    watching.log_expiry(NOW)
    watching.log_expiry(NOW)
    info, warning, again = log
    assert (
        info
        == again
        == {
            "event": "certificates",
            "count": 3,
            "first": str(tmp_path / "1.pem"),
            "days_left": 20,
            "log_level": "info",
        }
    )
    assert f"1.pem: the certificate expires on {NOW + 20 * DAY:%Y-%m-%d}" in warning["reason"]
    watching.warn_of_expiry(NOW + 15 * DAY)  # nothing new
    assert log[-1] is again
    watching.warn_of_expiry(NOW + 20 * DAY + DAY / 24)
    assert "1.pem: the certificate expired on" in log[-1]["reason"]


def test_beyond_a_limit_warnings_are_only_counted(
    tmp_path: Path, log: list[Line], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "MAX_WARNINGS", 2)
    certificates = Certificates()
    for number in range(5):
        pair = CA.pair(tmp_path, str(number), start=NOW - 20 * DAY, end=NOW + DAY)
        certificates.serve((PairFiles(*pair),))
    Watch(certificates).log_expiry(NOW)
    assert warnings(log)[2:] == ["3 more of these warnings"]
