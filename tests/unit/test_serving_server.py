"""How often the server checks deadlines. `tests/promises` test the rest, above all `test_ending.py`."""

import pytest

from tlstunnel.config import Timeout, Timeouts
from tlstunnel.serving.server import _choose_precision

TIMEOUTS = Timeouts()


@pytest.mark.parametrize("key", Timeouts.__struct_fields__)
def test_every_timeout_counts_for_the_precision_of_deadlines(key: str) -> None:
    values = {name: getattr(TIMEOUTS, name) for name in Timeouts.__struct_fields__}
    assert _choose_precision(TIMEOUTS, 10) == 0.25
    assert _choose_precision(Timeouts(**values | {key: Timeout(0.5)}), 10) == pytest.approx(0.05)


def test_the_timeouts_of_workers_count_too() -> None:
    assert _choose_precision(TIMEOUTS, 0.2) == pytest.approx(0.02)
    assert _choose_precision(TIMEOUTS, 0.001) == 0.01
