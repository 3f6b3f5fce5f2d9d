"""A clock that all processes of a machine share and that nobody can set.

Tested by tests/unit/test_state_valkey_election.py.
"""

import time


def read_clock() -> float:
    """Return the seconds since the machine has started, those in which it was suspended too."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
