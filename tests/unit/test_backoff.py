"""The delays between attempts."""

from tlstunnel.backoff import Backoff


def test_doubles_up_to_the_longest() -> None:
    backoff = Backoff(0.5, 3.0)
    delays = [backoff.after(0.0)]
    while len(delays) < 5:
        delays.append(backoff.after(delays[-1]))
    assert delays == [0.5, 1.0, 2.0, 3.0, 3.0]


def test_restarts_after_a_success() -> None:
    backoff = Backoff(0.5, 3.0)
    assert backoff.after(0.0) == backoff.first


def test_jitter_only_lengthens() -> None:
    backoff = Backoff(1.0, 8.0, jitter=0.1)
    spread = [backoff.spread(4.0) for _ in range(200)]
    assert min(spread) >= 4.0
    assert max(spread) <= 4.4
    assert len(set(spread)) > 100
    assert Backoff(1.0, 8.0).spread(4.0) == 4.0
