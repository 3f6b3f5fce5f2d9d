"""The guard before libmodsecurity: what it refuses, what it must accept, and that it is fast for any input."""

import time
from urllib.parse import quote, unquote_to_bytes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.corpus import corpus
from tlstunnel.firewall.managed.guard import MAX_ARGUMENTS, MAX_RUN, find_problem

LONG = "(" * (MAX_RUN + 1)


@pytest.mark.parametrize(
    "target",
    [
        f"/?x={LONG}",
        f"/?{LONG}=x",
        f"/{LONG}",
        "/?x=" + quote(LONG, safe=""),
        "/?x=" + quote(quote(LONG, safe=""), safe=""),
        "/?x=" + "%u0028" * (MAX_RUN + 1),
        "/?x=" + "%0a" * (MAX_RUN + 1),
        "/?x=" + "+" * (MAX_RUN + 1),
        "/?x=" + "%24(" * ((MAX_RUN + 1) // 2),
    ],
)
def test_run_in_the_target_is_refused(target: str) -> None:
    assert find_problem(target.encode(), ()) == "more than 31 punctuation characters in a row in the target"


@pytest.mark.parametrize("name", [b"Cookie", b"User-Agent", b"Referer", b"X-Own"])
def test_run_in_a_field_is_refused(name: bytes) -> None:
    reason = "more than 31 punctuation characters in a row in a field"
    assert find_problem(b"/", ((name, b"a=" + LONG.encode()),)) == reason
    assert find_problem(b"/", ((name, b"a=" + quote(LONG, safe="").encode()),)) == reason


def test_the_bounds_are_exact() -> None:
    assert find_problem(b"/x" + b"(" * MAX_RUN + b"x", ()) is None
    assert find_problem(b"/x" + b"(" * (MAX_RUN + 1) + b"x", ()) is not None
    arguments = "&".join(f"a{number}=1" for number in range(MAX_ARGUMENTS))
    assert find_problem(f"/?{arguments}".encode(), ()) is None
    assert find_problem(f"/?{arguments}&b=1".encode(), ()) == "more than 64 arguments"


def test_letters_of_other_alphabets_are_letters() -> None:
    assert find_problem(("/?name=" + quote("Александр Константинович" * 20)).encode(), ()) is None
    assert find_problem(b"/", ((b"Cookie", ("name=" + "技术讨论组" * 100).encode()),)) is None


@pytest.mark.parametrize("handshake", [*corpus.handshakes(), *corpus.profile_handshakes()], ids=lambda item: item.name)
def test_ordinary_handshakes_are_accepted(handshake: corpus.Sample) -> None:
    assert find_problem(handshake.request.target, handshake.request.fields) is None


@given(st.binary(max_size=400), st.binary(max_size=400))
def test_every_plain_run_is_refused(before: bytes, after: bytes) -> None:
    run = b"{" * (MAX_RUN + 1)
    assert find_problem(before + run + after, ()) is not None
    assert find_problem(b"/", ((b"Cookie", before + run + after),)) is not None


@given(st.binary(max_size=400))
def test_only_runs_and_arguments_are_refused(target: bytes) -> None:
    """The text contains what the guard names, as sent or decoded once or twice."""
    reason = find_problem(target, ())
    forms = [target, once := unquote_to_bytes(target), unquote_to_bytes(once)]
    longest = max(_longest_run(form) for form in forms)
    if b"%u" not in target:
        assert (longest > MAX_RUN or target.count(b"&") >= MAX_ARGUMENTS) == (reason is not None)


def _longest_run(text: bytes) -> int:
    longest = run = 0
    for byte in text:
        run = 0 if byte >= 0x80 or chr(byte).isalnum() else run + 1
        longest = max(longest, run)
    return longest


@pytest.mark.alone
@pytest.mark.parametrize("text", [b"%" * 16_000, b"%2" * 8_000, b"%25" * 5_000, b"%u00" * 4_000, b"%u0041" * 2_600])
def test_is_fast_for_any_input(text: bytes) -> None:
    """A generous bound: milliseconds would mean a fault in the algorithm."""
    text = b"a".join(text[at : at + 20] for at in range(0, len(text), 20))
    took = []
    for _ in range(5):
        began = time.process_time()
        find_problem(b"/?x=" + text, ())
        took.append(time.process_time() - began)
    assert min(took) < 0.02
