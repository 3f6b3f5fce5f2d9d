"""Whether it is up to this machine to deliver notices, and what other machines have delivered and decided. No I/O.

Each machine makes its own notices, at about the same time as the others, since all have the history of all. One of them
delivers (docs/plans.md#several-machines). Machines tell each other what was delivered in one text for each delivery: a
hash of the site, the standing and the channel, and when the notice was made. In the same way they tell what people have
decided (`tlstunnel.plans.decisions`).
"""

import re
from collections.abc import Callable, Iterable
from hashlib import blake2b

from tlstunnel.plans.decisions import MOST_DECISIONS, Decision, parse_decision, render_decision
from tlstunnel.plans.notice_file import Delivery, Target
from tlstunnel.plans.notices import SAME_SECONDS
from tlstunnel.plans.values import Notice
from tlstunnel.state.clock import read_clock

MOST_DELIVERED = 20_000
"""Deliveries that are remembered. The oldest are forgotten."""

_DELIVERED = re.compile(r"([0-9a-f]{24}):([0-9]{1,12})")


class Duty:
    """The duty of one of several machines; that of a single one with `alone`.

    `publish` is called with what this machine has delivered. `clock` is the one by which the duty ends.
    """

    def __init__(
        self,
        publish: Callable[[list[str]], None] = lambda _: None,
        *,
        alone: bool = False,
        clock: Callable[[], float] = read_clock,
    ) -> None:
        self.alone = alone
        self._publish = publish
        self._clock = clock
        self._until = 0.0
        self._delivered: dict[str, None] = {}
        self._made: dict[str, list[int]] = {}
        """When the notices of the deliveries with the same hash were made."""
        self._decisions: dict[Decision, None] = {}
        """What was decided on other machines, and is not followed yet."""

    @property
    def is_ours(self) -> bool:
        """Whether this machine is to deliver, at this moment."""
        return self.alone or self._clock() < self._until

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """What was decided on other machines, and is not followed yet."""
        return tuple(self._decisions)

    def note_followed(self, decision: Decision) -> None:
        """Note that a decision was stored."""
        self._decisions.pop(decision, None)

    def tell(self, decisions: Iterable[Decision]) -> None:
        """Tell other machines what was decided on this one."""
        if not self.alone:
            texts = [text for one in decisions if (text := render_decision(one)) is not None]
            if texts:
                self._publish(texts)

    def learn(self, until: float, delivered: Iterable[str]) -> bool:
        """Note until when it is up to this machine, and what was delivered. Return whether there is anything to do.

        What is not understood is ignored.
        """
        before = self.is_ours
        self._until = until
        new = self._add(delivered)
        return new or (self.is_ours and not before)

    def note_delivered(self, notice: Notice, target: Target) -> None:
        """Tell other machines what this one has delivered."""
        if not self.alone:
            text = f"{_hash(notice, target)}:{max(round(notice.created), 0)}"
            self._add([text])
            self._publish([text])

    def was_delivered(self, delivery: Delivery) -> bool:
        """Return whether a machine has delivered this, or what another machine has made in its place."""
        made = self._made.get(_hash(delivery.notice, delivery.target), ())
        return any(abs(one - delivery.notice.created) < SAME_SECONDS for one in made)

    def _add(self, delivered: Iterable[str]) -> bool:
        added = False
        for text in delivered:
            if text in self._delivered:
                continue
            if (match := _DELIVERED.fullmatch(text)) is None:
                self._note_decision(text)
                continue
            self._delivered[text] = None
            self._made.setdefault(match[1], []).append(int(match[2]))
            added = True
        while len(self._delivered) > MOST_DELIVERED:
            oldest = next(iter(self._delivered))
            del self._delivered[oldest]
            hashed = oldest.partition(":")[0]
            del self._made[hashed][0]
            if not self._made[hashed]:
                del self._made[hashed]
        return added

    def _note_decision(self, text: str) -> None:
        decision = parse_decision(text)
        if decision is not None:
            self._decisions[decision] = None
            if len(self._decisions) > MOST_DECISIONS:
                del self._decisions[next(iter(self._decisions))]


def _hash(notice: Notice, target: Target) -> str:
    """Return what deliveries of all machines have in common. That is not the address: one may have a newer one."""
    parts = (notice.site, notice.standing, target.channel, "operator's" if target.address == "" else notice.recipient)
    return blake2b("\0".join(parts).encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()
