"""The refusal of a request that cannot be counted now.

Tested by tests/promises/test_shared_counts.py.
"""

from tlstunnel.handshake.refusal import Refusal
from tlstunnel.journal.events import Reason
from tlstunnel.state.counters import CountersUnavailable


def refuse_uncounted(error: CountersUnavailable) -> Refusal:
    """Return the 503, as ``state.on_failure = "refuse"`` says."""
    text = "requests cannot be counted now; try again in 1 s"
    return Refusal(503, Reason.NOT_COUNTED, text, ((b"Retry-After", b"1"),), str(error))
