"""Who may do what: tokens, sessions, failures, certificates. Without sockets, and with a clock of the test."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlstunnel.admin import failures, sessions
from tlstunnel.admin.access import AccessControl, Identity, Peer, name_cookie, read_cookie, render_cookie
from tlstunnel.admin.checks import Unacceptable
from tlstunnel.admin.failures import Failures
from tlstunnel.admin.sessions import Sessions, is_csrf_of
from tlstunnel.config.admin import Access
from tlstunnel.serving.admin_files import LoadedToken, make_digest

READER = LoadedToken("rita", "read", make_digest("r" * 30))
ADMIN = LoadedToken("alice", "full", make_digest("a" * 30))
PEER = Peer(client="192.0.2.1", local="192.0.2.9")
SECURE = Peer(client="192.0.2.1", local="192.0.2.9", secure=True)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def control(
    *, local: bool = True, tokens: tuple[LoadedToken, ...] = (READER, ADMIN), clock: Clock | None = None
) -> AccessControl:
    return AccessControl(tokens, is_local=local, clock=clock or Clock())


def identify(
    access: AccessControl, authorization: str | None = None, cookies: str = "", peer: Peer = PEER
) -> Identity | None:
    return access.identify(peer, authorization, cookies, proxied=False)


def status_of(access: AccessControl, identity: Identity | None, needed: Access, csrf: str | None = None) -> int:
    try:
        access.require(identity, needed, csrf)
    except Unacceptable as refusal:
        return refusal.status
    return 200


def test_on_this_machine_anybody_reads_and_nobody_acts() -> None:
    access = control()
    anybody = identify(access)
    assert status_of(access, anybody, "read") == 200
    assert status_of(access, anybody, "full") == 401


def test_elsewhere_and_through_a_proxy_nobody_reads() -> None:
    access = control(local=False)
    assert status_of(access, identify(access), "read") == 401
    assert control().identify(PEER, None, "", proxied=True) is None


def test_without_tokens_the_refusal_says_how_to_make_one() -> None:
    access = control(tokens=())
    with pytest.raises(Unacceptable, match=r"openssl rand .* \[\[admin\.tokens\]\]") as caught:
        access.require(identify(access), "full", None)
    assert caught.value.headers["WWW-Authenticate"].startswith("Bearer")


@pytest.mark.parametrize(("token", "reading", "acting"), [("r" * 30, 200, 403), ("a" * 30, 200, 200)])
@pytest.mark.parametrize("local", [True, False])
def test_a_token_allows_what_it_says(token: str, reading: int, acting: int, local: bool) -> None:
    access = control(local=local)
    identity = identify(access, f"Bearer {token}")
    assert identity is not None
    assert identity.who in {"token rita", "token alice"}
    assert status_of(access, identity, "read") == reading
    assert status_of(access, identity, "full") == acting


@pytest.mark.parametrize(
    "text", ["Bearer", "Bearer ", "Basic YTpi", "", "a" * 30, "Bearer " + "x" * 30, "bearer \udc80"]
)
def test_another_authorization_is_refused_although_anybody_could_read(text: str) -> None:
    with pytest.raises(Unacceptable) as caught:
        identify(control(), text)
    assert caught.value.status == 401
    assert text.removeprefix("Bearer ") in {"", "Bearer"} or text not in str(caught.value)


def test_a_wrong_token_does_not_fall_back_to_a_session() -> None:
    access = control()
    cookie, _ = access.log_in(PEER, "a" * 30)
    with pytest.raises(Unacceptable):
        identify(access, "Bearer wrong", f"{name_cookie(secure=False)}={cookie}")


def test_who_is_behind_a_unix_socket_is_named() -> None:
    identity = identify(control(), f"Bearer {'a' * 30}", peer=Peer("uid 1000", "", uid=1000))
    assert identity is not None
    assert identity.who == "token alice (uid 1000)"


def test_a_client_certificate_has_the_access_of_the_configuration() -> None:
    peer = Peer("192.0.2.1", "192.0.2.9", secure=True, certificate="eve\nadmin" + "x" * 300)
    for allowed, acting in (("read", 403), ("full", 200)):
        access = AccessControl((), is_local=False, client_access=allowed)  # type: ignore[arg-type]
        identity = identify(access, peer=peer)
        assert identity is not None
        assert identity.who.startswith("certificate eve\\nadmin")
        assert len(identity.who) < 230
        assert status_of(access, identity, "full") == acting


def test_a_session_acts_with_its_second_secret_only() -> None:
    access = control(local=False)
    cookie, session = access.log_in(PEER, "a" * 30)
    identity = identify(access, cookies=f"other=1; {name_cookie(secure=False)}={cookie}")
    assert identity is not None
    assert identity.who == "token alice"
    assert status_of(access, identity, "read") == 200
    assert status_of(access, identity, "full") == 403
    assert status_of(access, identity, "full", "wrong") == 403
    assert status_of(access, identity, "full", "") == 403
    assert status_of(access, identity, "full", session.csrf) == 200
    _, other = access.log_in(PEER, "a" * 30)
    assert status_of(access, identity, "full", other.csrf) == 403


def test_a_login_never_uses_a_cookie_that_was_there_before() -> None:
    """Session fixation: what a client sends before a login does not become a session."""
    access = control(local=False)
    planted = f"{name_cookie(secure=False)}=planted"
    assert identify(access, cookies=planted) is None
    cookies = {access.log_in(PEER, "a" * 30)[0] for _ in range(3)}
    assert len(cookies) == 3
    assert "planted" not in cookies
    assert identify(access, cookies=planted) is None


def test_sessions_end() -> None:
    clock = Clock()
    access = control(local=False, clock=clock)

    def log_in(token: str) -> Identity:
        cookie, _ = access.log_in(PEER, token)
        identity = identify(access, cookies=f"{name_cookie(secure=False)}={cookie}")
        assert identity is not None
        return identity

    late, out, changed, kept = log_in("a" * 30), log_in("a" * 30), log_in("r" * 30), log_in("a" * 30)
    assert out.session is not None
    access.log_out(PEER, out.session)
    assert [access.still_holds(one) for one in (late, out, changed)] == [True, False, True]
    access.configure(
        [ADMIN, LoadedToken("rita", "full", READER.digest)], is_local=False, client_access="read"
    )  # rita may do more now, and logs in again
    assert [access.still_holds(one) for one in (kept, changed)] == [True, False]
    clock.now += sessions.LASTS_SECONDS
    assert not access.still_holds(late)


def test_a_token_that_is_gone_ends_what_it_watches() -> None:
    access = control()
    identity = identify(access, f"Bearer {'a' * 30}")
    assert identity is not None
    assert access.still_holds(identity)
    access.configure([READER], is_local=True, client_access="read")
    assert not access.still_holds(identity)
    with pytest.raises(Unacceptable):
        identify(access, f"Bearer {'a' * 30}")


def test_anybody_watches_only_while_the_address_is_local() -> None:
    access = control()
    identity = identify(access)
    assert identity is not None
    assert access.still_holds(identity)
    access.configure([READER], is_local=False, client_access="read")
    assert not access.still_holds(identity)


def test_there_is_a_limit_of_sessions() -> None:
    found = Sessions(Clock())
    first, session = found.begin(ADMIN)
    for _ in range(sessions.MOST):
        found.begin(ADMIN)
    assert len(found) == sessions.MOST
    assert found.find(first) is None
    assert not found.is_open(session)
    assert found.find("x" * 10_000) is None


def test_a_token_cannot_end_the_sessions_of_another() -> None:
    found = Sessions(Clock())
    cookie, _ = found.begin(ADMIN)
    for _ in range(sessions.MOST + 5):
        found.begin(READER)
    assert len(found) == sessions.MOST
    assert found.find(cookie) is not None


def test_wrong_tokens_are_limited_but_lock_nobody_out() -> None:
    clock = Clock()
    access = control(clock=clock)
    statuses = []
    for _ in range(failures.MOST_OF_CLIENT + 5):
        with pytest.raises(Unacceptable) as caught:
            identify(access, "Bearer wrong")
        statuses.append(caught.value.status)
    assert statuses == [401] * failures.MOST_OF_CLIENT + [429] * 5
    assert 0 < int(caught.value.headers["Retry-After"]) <= failures.WINDOW
    assert identify(access, f"Bearer {'a' * 30}") is not None
    access.log_in(PEER, "a" * 30)
    with pytest.raises(Unacceptable):
        access.log_in(PEER, "wrong")
    clock.now += failures.WINDOW
    with pytest.raises(Unacceptable) as caught:
        identify(access, "Bearer wrong")
    assert caught.value.status == 401


def test_many_clients_together_are_limited_and_need_little_memory() -> None:
    counted = Failures(Clock())
    waits = [counted.add(f"192.0.2.{number}") for number in range(5 * failures.MOST_CLIENTS)]
    assert not any(waits[: failures.MOST])
    assert all(waits[failures.MOST :])
    assert len(counted._clients) == failures.MOST_CLIENTS


def test_the_flags_of_cookies() -> None:
    plain, secure = (render_cookie("v", secure=flag, seconds=60) for flag in (False, True))
    assert plain == "tlstunnel-session=v; Max-Age=60; Path=/; HttpOnly; SameSite=Strict"
    assert secure == "__Host-tlstunnel-session=v; Max-Age=60; Path=/; HttpOnly; SameSite=Strict; Secure"


def test_with_tls_only_the_cookie_that_no_other_host_can_set_counts() -> None:
    assert read_cookie("tlstunnel-session=v", secure=True) == ""
    assert read_cookie("a=1;__Host-tlstunnel-session=v", secure=True) == "v"
    assert read_cookie("a; =; tlstunnel-session=v; tlstunnel-session=w", secure=False) == "v"


@given(st.text(max_size=300), st.text(max_size=100))
def test_any_cookie_is_read(text: str, csrf: str) -> None:
    access = control(local=False)
    assert identify(access, cookies=text) is None
    _, session = access.log_in(PEER, "a" * 30)
    assert not is_csrf_of(session, csrf)
