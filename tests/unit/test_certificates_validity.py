"""When the end of a certificate or a revocation list deserves a warning."""

from datetime import timedelta

import pytest

from tests.pki import NOW
from tlstunnel.certificates.validity import Validity, find_ending, find_outdated

HOUR = timedelta(hours=1)


@pytest.mark.parametrize(
    ("lifetime", "renewed_at", "notice"),
    [
        (24, 8, 4),  # a list that is issued every day
        (
            160,
            80,
            160 / 3 - 24,
        ),  # Let's Encrypt's certificates of six days, and how long before the end they are renewed
        (45 * 24, 15 * 24, 14 * 24),
        (90 * 24, 30 * 24, 21 * 24),
        (398 * 24, 30 * 24, 21 * 24),
        (3650 * 24, 0, 21 * 24),
    ],
)
def test_a_warning_comes_a_day_after_the_ordinary_renewal(lifetime: float, renewed_at: float, notice: float) -> None:
    validity = Validity(NOW, NOW + lifetime * HOUR)
    assert validity.notice / HOUR == pytest.approx(notice)
    assert not validity.is_ending(NOW)
    assert not validity.is_ending(validity.end - max(renewed_at, notice + 0.01) * HOUR)
    assert validity.is_ending(validity.end - (notice - 0.01) * HOUR)


def test_what_is_not_valid_is_named() -> None:
    early, now, late = (Validity(NOW + start * HOUR, NOW + (start + 2) * HOUR) for start in (1, -1, -3))
    assert find_outdated("a list", (now,), NOW) is None
    assert find_outdated("a list", (now, early), NOW) == f"a list is not valid before {early.begin:%Y-%m-%d %H:%M} UTC"
    assert find_outdated("a list", (now, late), NOW) == f"a list expired on {late.end:%Y-%m-%d %H:%M} UTC"
    assert find_ending("a list", (now, early), NOW) is None
    assert find_ending("a list", (early, now), now.end) == f"a list expires on {now.end:%Y-%m-%d %H:%M} UTC"
