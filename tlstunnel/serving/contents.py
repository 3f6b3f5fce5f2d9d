"""What is in the files that a configuration names, so that a reload can report which of them have changed."""

import glob
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

from tlstunnel.config import SiteConfig
from tlstunnel.firewall.lists import NamedLists
from tlstunnel.tunnel.sites import Sites

KeyT = TypeVar("KeyT")

_TLS_FILES = ("origin_ca", "origin_cert", "origin_key")


@dataclass(frozen=True, slots=True)
class Contents:
    """Digests of what was loaded.

    Certificates and client authorities are identified by their file, lists by their name, other files by their kind and
    path. They are compared with those of the next reload. A certificate or a list that was renewed in between counts,
    too.
    """

    certificates: Mapping[Path, bytes]
    clients: Mapping[Path, bytes]
    lists: Mapping[str, int]
    files: Mapping[str, bytes]


def read_contents(configured: Sequence[SiteConfig], sites: Sites, lists: NamedLists, folder: Path | None) -> Contents:
    """Return the contents of what was just loaded. Files in `folder` are named relative to it."""
    policies = [site.served.clients for site in sites]
    return Contents(
        {pair.cert: pair.digest for site in sites for pair in site.served.pairs},
        {policy.files.ca: policy.digest for policy in policies if policy is not None},
        {name: lists[name].fingerprint for name in lists.names},
        {f"{kind} {_shorten(file, folder)}": _digest(file) for kind, file in dict.fromkeys(_list_files(configured))},
    )


def describe_reloaded(before: Contents, after: Contents, sites: Sites, lists: NamedLists, now: datetime) -> list[str]:
    """Return a line for everything that both have, with different contents."""
    found = [f"{file}: reloaded" for file in _find(before.files, after.files)]
    replaced = set(_find(before.certificates, after.certificates))
    changed = set(_find(before.clients, after.clients))
    for site in sites if replaced or changed else ():
        for pair in site.served.pairs:
            if pair.cert in replaced:
                replaced.discard(pair.cert)  # several sites may share it
                kind = f" ({pair.kind})" if len(site.served.pairs) > 1 else ""
                found.append(f"certificate {site.name}{kind}: replaced, {pair.days_left(now)} days")
        policy = site.served.clients
        if policy is not None and policy.files.ca in changed:
            changed.discard(policy.files.ca)
            found.append(f"client certificates {site.name}: authorities or revocation lists reloaded")
    for name in _find(before.lists, after.lists):
        count = lists[name].count
        found.append(f"list {name}: {count} {'entry' if count == 1 else 'entries'}")
    return found


def _list_files(configured: Sequence[SiteConfig]) -> Iterator[tuple[str, str]]:
    for site in configured:
        if site.worker is not None and (file := site.worker.rpartition(":")[0]).endswith(".py"):
            yield "worker", file
        for key in _TLS_FILES:
            if (path := getattr(site, key)) is not None:
                yield key, str(path)
        if site.managed_rules is not None and site.managed_rules.rules is not None:
            for file in sorted(glob.glob(site.managed_rules.rules)):  # noqa: PTH207 - an absolute glob
                yield "managed rules", file


def _find(before: Mapping[KeyT, object], after: Mapping[KeyT, object]) -> list[KeyT]:
    return [key for key, value in after.items() if key in before and before[key] != value]


def _digest(file: str) -> bytes:
    try:
        return sha256(Path(file).read_bytes()).digest()
    except OSError:  # it was just replaced
        return b""


def _shorten(file: str, folder: Path | None) -> str:
    path = Path(file)
    return str(path.relative_to(folder) if folder is not None and path.is_relative_to(folder) else path)
