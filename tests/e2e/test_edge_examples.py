"""Every worker in docs/edge does what its docstring says, in a real tunnel, and refused requests reach no origin."""

import asyncio
import base64
import hmac
import json
import re
import select
import shutil
import signal
import socket
import subprocess
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jwt
import pytest
import redis
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect
from websockets.typing import Subprotocol

from tests.harness import REPOSITORY, TIMEOUT, RawOrigin, eventually, handshake_request, require
from tlstunnel.cli.config import command
from tlstunnel.edge import Reply, WorkerRequest
from tlstunnel.edge.loading import Code, Loader
from tlstunnel.testing import EdgeOrigin, EdgeTunnel, HandshakeResult, worker_request

EXAMPLES = sorted((REPOSITORY / "docs" / "edge").glob("*.py"))
ISSUER, AUDIENCE = "https://login.example.com/", "chat"
FORGED = [("X-User", "root"), ("x-user", "root"), ("X_User", "root"), ("Connection", "Upgrade, X-User")]
Pairs = Sequence[tuple[str, str]]


@pytest.fixture(scope="module", autouse=True)
def _strict() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"PYTHONASYNCIODEBUG": "1", "PYTHONDEVMODE": "1", "PYTHONWARNINGS": "error"}.items():
            patch.setenv(name, value)
        yield


@contextmanager
def example(name: str, **options: Any) -> Iterator[EdgeTunnel]:
    """Run a tunnel with that worker, which must not have failed by the end."""
    with EdgeTunnel(f"{REPOSITORY}/docs/edge/{name}.py:fetch", **options) as tunnel:
        yield tunnel
    failures = [one for one in tunnel.log if one["event"].startswith("edge worker")]
    assert (failures, "Traceback" in tunnel.text, "Warning" in tunnel.text) == ([], False, False), tunnel.text


def loaded(name: str) -> Code:
    return Loader().load(f"{REPOSITORY}/docs/edge/{name}.py:fetch")


def call(code: Code, request: WorkerRequest, config: dict[str, Any]) -> object:
    async def ask() -> object:
        return await code.fetch(request, await code.setup(config) if code.setup else None)

    return asyncio.run(ask())


def refused(answer: HandshakeResult, status: int) -> bool:
    return (answer.status, answer.request, answer.record["reason"]) == (status, None, "edge: reply")


def user_of(answer: HandshakeResult) -> list[str]:
    """Return the user in the field that the origin gets."""
    assert answer.request is not None, answer
    return [value for name, value in answer.request.headers.items() if name.lower().replace("_", "-") == "x-user"]


# --- the configurations in the docstrings


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_configuration_in_a_docstring_is_valid(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = loaded(path.stem)
    docstring = path.read_text().split('"""')[1]
    block = re.search(r"^    \[\[sites\]\]\n(?:    .*\n|\n)*", docstring, re.MULTILINE)
    assert block
    shutil.copytree(path.parent, tmp_path / "edge")
    file = tmp_path / "tlstunnel.toml"
    file.write_text(textwrap.dedent(block[0]))
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(command, ["check", str(file)])
    assert result.exit_code == 0, result.output
    assert code.__doc__


# --- jwt_check


class Issuer:
    """Signs tokens with its keys, and writes a JWKS file of them."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.rsa = rsa.generate_private_key(65537, 2048)
        self.ec = ec.generate_private_key(ec.SECP256R1())
        self.ed = ed25519.Ed25519PrivateKey.generate()
        self.secret = b"a shared secret of thirty-two bytes"
        oct_key = {"kty": "oct", "k": base64.urlsafe_b64encode(self.secret).rstrip(b"=").decode(), "alg": "HS256"}
        self.keys = [
            json.loads(RSAAlgorithm.to_jwk(self.rsa.public_key())) | {"kid": "rsa", "use": "sig"},
            json.loads(ECAlgorithm.to_jwk(self.ec.public_key())) | {"kid": "ec"},
            json.loads(OKPAlgorithm.to_jwk(self.ed.public_key())) | {"kid": "ed"},
            json.loads(RSAAlgorithm.to_jwk(self.rsa.public_key())) | {"kid": "enc", "use": "enc"},
            oct_key | {"kid": "oct"},
            {"kty": "unheard of", "kid": "new"},
        ]
        self.write(self.keys)

    def write(self, keys: Sequence[dict[str, Any]]) -> None:
        new = self.file.with_suffix(".new")
        new.write_text(json.dumps({"keys": keys}))
        new.replace(self.file)

    def token(
        self, key: Any = None, algorithm: str = "RS256", headers: dict[str, Any] | None = None, **claims: Any
    ) -> str:
        """Sign a token; claims that are None are omitted."""
        now = int(time.time())
        all_claims = {"sub": "user-7", "iss": ISSUER, "aud": AUDIENCE, "exp": now + 600} | claims
        kept = {name: value for name, value in all_claims.items() if value is not None}
        return jwt.encode(kept, key or self.rsa, algorithm, {"kid": "rsa"} | (headers or {}))

    def by_hand(self, header: object, signature: Callable[[bytes], bytes], **claims: Any) -> str:
        """Return a token that PyJWT would refuse to create."""
        payload = jwt.decode(self.token(**claims), options={"verify_signature": False})
        parts = [_base64(json.dumps(header).encode()), _base64(json.dumps(payload).encode())]
        return b".".join([*parts, _base64(signature(b".".join(parts)))]).decode()


def _base64(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def _hs256(secret: bytes) -> Callable[[bytes], bytes]:
    return lambda data: hmac.digest(secret, data, "sha256")


def _pem(issuer: Issuer) -> bytes:
    return issuer.rsa.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def checked(issuer: Issuer, **config: Any) -> dict[str, Any]:
    return {"jwks": str(issuer.file), "issuer": ISSUER, "audience": AUDIENCE} | config


def bearer(token: str) -> tuple[str, str]:
    return "Authorization", f"Bearer {token}"


@pytest.fixture(scope="module")
def issuer(tmp_path_factory: pytest.TempPathFactory) -> Issuer:
    return Issuer(tmp_path_factory.mktemp("issuer") / "jwks.json")


@pytest.fixture(scope="module")
def jwt_tunnel(issuer: Issuer) -> Iterator[EdgeTunnel]:
    with example("jwt_check", config=checked(issuer)) as tunnel:
        yield tunnel


def _signed(key: str, algorithm: str) -> Callable[[Issuer], Pairs]:
    return lambda i: [bearer(i.token(getattr(i, key), algorithm, {"kid": key}))]


@pytest.mark.parametrize(
    "fields",
    [
        _signed("rsa", "RS256"),
        _signed("ec", "ES256"),
        _signed("ed", "EdDSA"),
        lambda i: [("authorization", f"bEARER   {i.token()}")],
        lambda i: [("Cookie", f"a=b; token={i.token()}")],
        lambda i: [("Cookie", f'token="{i.token()}"; token=forged')],
        lambda i: [bearer(i.token()), ("Cookie", "token=forged")],
        lambda i: [bearer(i.token(aud=["else", AUDIENCE]))],
    ],
    ids=["rsa", "ec", "ed25519", "case", "cookie", "first-of-two-cookies", "field-before-cookie", "several-audiences"],
)
def test_a_valid_token_is_accepted_as_its_subject(
    jwt_tunnel: EdgeTunnel, issuer: Issuer, fields: Callable[[Issuer], Pairs]
) -> None:
    answer = jwt_tunnel.handshake("/chat", headers=[*FORGED, *fields(issuer)], messages=["hello"])
    assert (answer.status, answer.messages, user_of(answer)) == (101, ("hello",), ["user-7"])
    assert answer.record["tags"] == {"user": "user-7"}


def test_a_tunnel_ends_when_its_token_expires(jwt_tunnel: EdgeTunnel, issuer: Issuer) -> None:
    """After the leeway; and before, if somebody says so."""
    for token, end, reason in (
        (issuer.token(exp=time.time() - 8), lambda: None, "expired"),
        (issuer.token(), lambda: jwt_tunnel.end_tunnels(tag="user=user-7", why="signed out"), "ended by request"),
    ):
        fields = {"Authorization": f"Bearer {token}"}
        with connect(jwt_tunnel.uri, ssl=jwt_tunnel.context, additional_headers=fields) as client:
            client.send("hello")
            assert client.recv(TIMEOUT) == "hello"
            end()
            with pytest.raises(ConnectionClosed):
                client.recv(TIMEOUT)
        assert jwt_tunnel.wait_for("connection", reason=reason)["tags"] == {"user": "user-7"}


def test_a_token_that_never_expires_ends_all_the_same(jwt_tunnel: EdgeTunnel, issuer: Issuer) -> None:
    answer = jwt_tunnel.handshake("/chat", headers=[bearer(issuer.token(exp=10**15))])
    assert answer.status == 101


def _foreign(headers: dict[str, Any] | None = None, **claims: Any) -> Callable[[Issuer], Pairs]:
    return lambda i: [bearer(i.token(headers=headers, **claims))]


ATTACKS: dict[str, Callable[[Issuer], Pairs]] = {
    "no-token": lambda _: [],
    "empty": lambda _: [("Authorization", "")],
    "no-token-behind-bearer": lambda _: [("Authorization", "Bearer")],
    "empty-cookie": lambda _: [("Cookie", "token=")],
    "no-parts": lambda _: [bearer("token")],
    "empty-parts": lambda _: [bearer("..")],
    "no-base64": lambda _: [bearer("%.%.%")],
    "no-ascii": lambda _: [bearer("grüße.世界.🚇")],
    "no-json": lambda _: [bearer("AAAA.AAAA.AAAA")],
    "header-is-a-list": lambda i: [bearer(i.by_hand([1], lambda _: b"x"))],
    "nested-header": lambda _: [bearer(f"{_base64(b'[' * 9000).decode()}.e30.e30")],
    "long": lambda _: [bearer("A" * 15_000)],
    "alg-none": lambda i: [bearer(i.by_hand({"alg": "none", "kid": "rsa"}, lambda _: b""))],
    "alg-None": lambda i: [bearer(i.by_hand({"alg": "None", "kid": "rsa"}, lambda _: b""))],
    "no-alg": lambda i: [bearer(i.by_hand({"kid": "rsa"}, lambda _: b""))],
    "alg-is-a-list": lambda i: [bearer(i.by_hand({"kid": "rsa", "alg": ["RS256"]}, lambda _: b""))],
    "hs256-with-the-public-key": lambda i: [bearer(i.by_hand({"alg": "HS256", "kid": "rsa"}, _hs256(_pem(i))))],
    "rs256-that-is-hs256": lambda i: [bearer(i.by_hand({"alg": "RS256", "kid": "rsa"}, _hs256(_pem(i))))],
    "shared-secret": lambda i: [bearer(i.token(i.secret, "HS256", {"kid": "oct"}))],
    "shared-secret-as-rs256": lambda i: [bearer(i.by_hand({"alg": "RS256", "kid": "oct"}, _hs256(i.secret)))],
    "key-for-encryption": _foreign({"kid": "enc"}),
    "unknown-kid": _foreign({"kid": "nobody"}),
    "kid-is-a-number": lambda i: [bearer(i.by_hand({"alg": "RS256", "kid": 7}, lambda _: b"x"))],
    "kid-is-a-list": lambda i: [bearer(i.by_hand({"alg": "RS256", "kid": []}, lambda _: b"x"))],
    "kid-is-a-path": _foreign({"kid": "../../dev/null"}),
    "no-kid": lambda i: [bearer(i.by_hand({"alg": "RS256"}, lambda _: b"x"))],
    "other-algorithm-of-the-key": lambda i: [bearer(i.token(i.rsa, "PS256"))],
    "other-key's-id": lambda i: [bearer(i.token(i.ec, "ES256", {"kid": "rsa"}))],
    "own-key": lambda i: [bearer(i.token(rsa.generate_private_key(65537, 2048)))],
    "own-key-brought-along": lambda i: [
        bearer(i.token(i.ec, "ES256", {"kid": "rsa", "jwk": i.keys[1], "jku": "https://evil.example/"}))
    ],
    "detached": lambda i: [bearer(i.by_hand({"alg": "RS256", "kid": "rsa", "b64": False}, lambda _: b"x"))],
    "critical-extension": _foreign({"crit": ["exp"]}),
    "expired": _foreign(exp=int(time.time()) - 60),
    "no-expiry": _foreign(exp=None),
    "expiry-is-text": _foreign(exp="never"),
    "not-yet": _foreign(nbf=int(time.time()) + 600),
    "issued-later": _foreign(iat=int(time.time()) + 600),
    "other-audience": _foreign(aud="shop"),
    "no-audience": _foreign(aud=None),
    "other-issuer": _foreign(iss="https://login.example.com"),
    "no-issuer": _foreign(iss=None),
    "no-subject": _foreign(sub=None),
    "empty-subject": _foreign(sub=""),
    "subject-with-a-line": _foreign(sub="user-7\r\nX-Admin: 1"),
    "subject-beyond-ascii": _foreign(sub="üser"),
    "long-subject": _foreign(sub="u" * 256),
    "two-fields": lambda i: [bearer(i.token()), bearer(i.token())],
    "basic": lambda i: [("Authorization", f"Basic {i.token()}"), ("Cookie", f"token={i.token()}")],
    "second-cookie": lambda i: [("Cookie", "token=forged"), ("Cookie", f"token={i.token()}")],
    "cookie-of-another-case": lambda i: [("Cookie", f"Token={i.token()}")],
    "in-the-query": lambda _: [],
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_other_tokens_are_refused(jwt_tunnel: EdgeTunnel, issuer: Issuer, attack: str) -> None:
    fields = ATTACKS[attack](issuer)
    answer = jwt_tunnel.handshake(f"/chat?token={issuer.token()}", headers=[("X-User", "root"), *fields])
    assert refused(answer, 401)
    assert answer.headers["WWW-Authenticate"].startswith("Bearer")
    assert not any(value[7:] in jwt_tunnel.text for name, value in fields if len(value) > 40)


def test_keys_are_read_again_when_their_file_changes(tmp_path: Path) -> None:
    issuer = Issuer(tmp_path / "jwks.json")
    token = issuer.token(issuer.ec, "ES256", {"kid": "ec"})
    with example("jwt_check", config=checked(issuer, reload_every=0.02)) as tunnel:

        def said(text: str, count: int) -> None:
            eventually(lambda: len([one for one in tunnel.log if text in one["event"]]) == count)

        assert tunnel.handshake(headers=[bearer(token)]).status == 101
        issuer.write(issuer.keys[:1])
        said("read again, 1 keys", 1)
        assert tunnel.handshake(headers=[bearer(token)]).status == 401
        issuer.write(issuer.keys)
        said("read again, 3 keys", 1)
        assert tunnel.handshake(headers=[bearer(token)]).status == 101
        # What cannot be used is logged once, and the previous keys are used.
        issuer.file.write_text('{"keys": [')
        said("the previous keys stay in use", 1)
        assert tunnel.handshake(headers=[bearer(token)]).status == 101
        issuer.file.unlink()
        said("the previous keys stay in use", 2)
        assert tunnel.handshake(headers=[bearer(token)]).status == 101
        issuer.write(issuer.keys[:1])
        said("read again, 1 keys", 2)
        assert tunnel.handshake(headers=[bearer(token)]).status == 401


@pytest.mark.parametrize("text", ["", "[]", '{"keys": []}', '{"keys": [{"kty": "oct", "k": "AAAA", "alg": "HS256"}]}'])
def test_a_file_without_a_usable_key_refuses_the_start(tmp_path: Path, text: str) -> None:
    file = tmp_path / "jwks.json"
    file.write_text(text)
    code = loaded("jwt_check")
    with pytest.raises((jwt.PyJWTError, ValueError, AttributeError)):
        call(code, worker_request(), {"jwks": str(file), "issuer": ISSUER, "audience": AUDIENCE})


# --- redis_session


class RedisServer:
    """A real ``redis-server``."""

    def __init__(self, port: int | None = None) -> None:
        self.port = port or free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"

    def __enter__(self) -> redis.Redis:
        command = [require("redis-server"), "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        self._process = subprocess.Popen(
            [*command, "--appendonly", "no", "--dir", "/"], stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        said = []
        for line in self._process.stdout:
            said.append(line)
            if "Ready to accept connections" in line:
                break
        else:
            pytest.fail("".join(said))
        self.client = redis.Redis(port=self.port)
        return self.client

    def send_signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self._process.kill()
        self._process.communicate(timeout=TIMEOUT)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


SIDS = {name: f"{name}-0123456789_abcdef" for name in ("anna", "bert", "odd", "empty", "nobody")}
USERS = {"anna": "anna@example.com", "bert": "bert", "odd": "Jörg\r\nX-Admin: 1 %", "empty": ""}


def cookie(name: str) -> Pairs:
    return [*FORGED, ("Cookie", f"theme=dark; sid={SIDS[name]}")]


def remember(client: Any) -> None:
    for name, user in USERS.items():
        client.hset(f"session:{SIDS[name]}", "user", user)


@pytest.fixture(scope="module")
def sessions() -> Iterator[tuple[EdgeTunnel, Any]]:
    server = RedisServer()
    with server as client:
        remember(client)
        with example("redis_session", config={"url": server.url}) as tunnel:
            yield tunnel, client


@pytest.mark.parametrize(
    ("name", "user"),
    [("anna", "anna@example.com"), ("bert", "bert"), ("odd", "J%C3%B6rg%0D%0AX-Admin:%201%20%25")],
)
def test_a_session_is_accepted_as_its_user(sessions: tuple[EdgeTunnel, Any], name: str, user: str) -> None:
    answer = sessions[0].handshake(headers=cookie(name), messages=["hello"])
    assert (answer.status, answer.messages, user_of(answer)) == (101, ("hello",), [user])
    assert answer.request is not None
    assert "X-Admin" not in answer.request.headers
    assert answer.record["tags"] == {"user": user}


@pytest.mark.parametrize(
    "fields",
    [
        [],
        [("Cookie", "sid=")],
        [("Cookie", "sid=short")],
        [("Cookie", f"sid={SIDS['nobody']}")],
        [("Cookie", f"sid={SIDS['empty']}")],
        [("Cookie", f"sid={SIDS['nobody']}; sid={SIDS['anna']}")],
        [("Cookie", f"sid={SIDS['anna']}*")],
        [("Cookie", f"sid={'ü' * 20}")],
        [("Cookie", f"sid={'a' * 5000}")],
        [("Cookie", f"SID={SIDS['anna']}")],
        [("Cookie", ";;=;=sid;" * 20)],
        [("Sid", SIDS["anna"])],
    ],
)
def test_clients_without_a_session_are_refused(sessions: tuple[EdgeTunnel, Any], fields: Pairs) -> None:
    assert refused(sessions[0].handshake(f"/?sid={SIDS['anna']}", headers=[("X-User", "root"), *fields]), 401)


def test_an_ended_session_is_refused(sessions: tuple[EdgeTunnel, Any]) -> None:
    tunnel, client = sessions
    sid = "ending-0123456789_abcdef"
    client.hset(f"session:{sid}", "user", "carl")
    assert tunnel.handshake(headers={"Cookie": f"sid={sid}"}).status == 101
    client.delete(f"session:{sid}")
    assert tunnel.handshake(headers={"Cookie": f"sid={sid}"}).status == 401


class Held:
    """A proxy to Redis that holds back the responses to look-ups from `hold` until `release`."""

    def __init__(self, redis_port: int) -> None:
        self._redis_port = redis_port
        self._open = threading.Event()
        self._open.set()
        self.asked: list[bytes] = []
        self.hold, self.release = self._open.clear, self._open.set

    def __call__(self, sock: socket.socket) -> None:
        with socket.create_connection(("127.0.0.1", self._redis_port)) as upstream:
            looked_up = False
            while True:
                for ready in select.select([sock, upstream], [], [])[0]:
                    if not (some := ready.recv(65536)):
                        return
                    if ready is sock:
                        looked_up = b"HGET" in some
                        self.asked.append(some)
                    elif looked_up:
                        assert self._open.wait(TIMEOUT)
                    (upstream if ready is sock else sock).sendall(some)


def test_clients_that_disconnect_do_not_mix_up_sessions() -> None:
    """The response to a cancelled look-up must not be used for the next one (redis-py had that fault in 2023)."""
    server = RedisServer()
    held = Held(server.port)
    with server as client, RawOrigin(held) as way:
        remember(client)
        with example("redis_session", config={"url": f"redis://{way.address}/0"}) as tunnel, ExitStack() as stack:
            held.hold()
            for _ in range(5):
                plain = stack.enter_context(socket.create_connection(("127.0.0.1", tunnel.port), TIMEOUT))
                sock = stack.enter_context(tunnel.context.wrap_socket(plain, server_hostname="localhost"))
                sock.sendall(handshake_request("/gone", headers=cookie("anna")))
            eventually(lambda: len([some for some in held.asked if SIDS["anna"].encode() in some]) == 5)
            stack.close()
            records = eventually(lambda: len(found := tunnel.log_of("connection", path="/gone")) == 5 and found)
            assert records
            assert {record["status"] for record in records} == {0}
            held.release()
            for _ in range(10):
                for name in ("bert", "anna"):
                    assert user_of(tunnel.handshake(headers=cookie(name))) == [USERS[name]]


def test_while_redis_is_down_or_slow_clients_get_503() -> None:
    server = RedisServer()
    with example("redis_session", config={"url": server.url}) as tunnel:

        def turned_away() -> bool:
            began = time.monotonic()
            answer = tunnel.handshake(headers=cookie("anna"))
            assert time.monotonic() - began < 5
            return refused(answer, 503) and answer.headers["Retry-After"] == "1"

        assert turned_away()
        with server as client:
            remember(client)
            assert user_of(tunnel.handshake(headers=cookie("anna"))) == [USERS["anna"]]
            server.send_signal(signal.SIGSTOP)
            assert turned_away()
            server.send_signal(signal.SIGCONT)
            assert user_of(tunnel.handshake(headers=cookie("anna"))) == [USERS["anna"]]
        assert turned_away()
        # All its connections are closed; the first request afterwards is not affected.
        with server as client:
            remember(client)
            assert user_of(tunnel.handshake(headers=cookie("anna"))) == [USERS["anna"]]


# --- ab_cookie


def experiment(new: int, old: str = "old.example:1", young: str = "new.example:1", **more: Any) -> dict[str, Any]:
    variants = [
        {"name": "old", "percent": 100 - new, "origin": old},
        {"name": "new", "percent": new, "origin": young},
    ]
    return {"experiment": "editor", "cookie": "uid", "variants": variants} | more


def test_visitors_keep_to_their_variant() -> None:
    with (
        EdgeOrigin() as old,
        EdgeOrigin() as new,
        example(
            "ab_cookie", config=experiment(50, old.address, new.address), origins=[old], worker_origins=[new]
        ) as tunnel,
    ):
        for uid in map(str, range(20)):
            fields = [("Cookie", f"uid={uid}"), ("X-Variant", "forged"), ("X_Variant", "forged")]
            answers = [tunnel.handshake(headers=fields) for _ in range(2)]
            told = [
                [one.request.headers[name] for name in one.request.headers if "ariant" in name]
                for one in answers
                if one.request
            ]
            reached = [one.record["origin"] for one in answers]
            assert (told, reached) in (
                ([["old"], ["old"]], [old.address] * 2),
                ([["new"], ["new"]], [new.address] * 2),
            )
        assert min(len(old.requests), len(new.requests)) >= 10
        for fields in ([], [("Cookie", "uid=")], [("Cookie", "uid")], [("Cookie", "uid=ü")]):
            answer = tunnel.handshake(headers=[*fields, ("X-Variant", "new")])
            assert answer.request is not None
            if "ü" not in str(fields):
                assert answer.request.headers.getall("X-Variant") == ["old"]


def test_the_shares_are_as_configured() -> None:
    code = loaded("ab_cookie")
    assert code.setup is not None

    async def part(config: dict[str, Any]) -> set[str]:
        assert code.setup is not None
        env = await code.setup(config)
        requests = [worker_request(headers={"Cookie": f"uid={number}"}) for number in range(2000)]
        sent = [await code.fetch(request, env) for request in requests]
        assert all(isinstance(one, WorkerRequest) for one in sent)
        return {one.cookies["uid"] for one in sent if isinstance(one, WorkerRequest) and one.origin == "new.example:1"}

    ten, twenty = asyncio.run(part(experiment(10))), asyncio.run(part(experiment(20)))
    assert 150 < len(ten) < 250
    assert 320 < len(twenty) < 480
    assert ten < twenty, "visitors keep their variant"
    other = asyncio.run(part(experiment(10, experiment="another")))
    assert len(ten & other) < 60, "another experiment selects other visitors"
    assert asyncio.run(part(experiment(0))) == set()
    assert len(asyncio.run(part(experiment(100)))) == 2000


def test_percentages_that_do_not_add_up_to_100_refuse_the_start() -> None:
    config = experiment(10)
    config["variants"][0]["percent"] = 80
    with pytest.raises(ValueError, match="add up to 100"):
        call(loaded("ab_cookie"), worker_request(), config)


# --- shard_by_path


def test_all_paths_to_a_room_have_one_shard() -> None:
    with (
        EdgeOrigin() as first,
        EdgeOrigin() as second,
        EdgeOrigin() as large,
        example(
            "shard_by_path",
            config={
                "prefix": "/rooms/",
                "shards": [first.address, second.address],
                "pinned": {"lobby": large.address},
            },
            origins=[first],
            worker_origins=[second, large],
        ) as tunnel,
    ):
        reached: dict[str, str] = {}
        for room in ("a", "b", "c", "d", "e", "f", "g", "Ü-1", "x y"):
            escaped = "".join(f"%{byte:02X}" for byte in room.encode())
            targets = (f"/rooms/{escaped}", f"/rooms/{escaped}/sub?x=1", f"/%72ooms/{escaped}")
            answers = [tunnel.handshake(target) for target in targets]
            origins = {one.record["origin"] for one in answers}
            assert len(origins) == 1, room
            reached[room] = origins.pop()
            paths = [one.request.target for one in answers if one.request]
            assert paths[0] == paths[2]
            assert paths[1].endswith("/sub?x=1")
        # Which rooms a shard has depends on its port: by chance, nine may have the same one.
        for number in range(60):
            if len(set(reached.values())) == 2:
                break
            reached[str(number)] = tunnel.handshake(f"/rooms/{number}").record["origin"]
        assert set(reached.values()) == {first.address, second.address}
        assert tunnel.handshake("/rooms/lobby").record["origin"] == large.address
        # Paths that one server takes for the lobby, and another does not.
        for path in ("/rooms/a/../lobby", "/rooms//lobby", "/rooms/.."):
            assert tunnel.handshake(path).record["reason"] == "ambiguous target", path
        for path in ("/", "/rooms", "/rooms/", "/Rooms/a", "/rooms?a"):
            assert refused(tunnel.handshake(path), 404), path


def test_adding_a_shard_moves_only_its_own_share() -> None:
    code = loaded("shard_by_path")
    requests = [worker_request(f"GET /rooms/{number}") for number in range(500)]

    def shards(names: Sequence[str]) -> list[str]:
        config = {"prefix": "/rooms/", "shards": [f"{name}.internal:1" for name in names]}

        async def ask() -> list[str]:
            assert code.setup is not None
            env = await code.setup(config)
            sent = [await code.fetch(request, env) for request in requests]
            return [str(one.origin) for one in sent if isinstance(one, WorkerRequest)]

        return asyncio.run(ask())

    three, four = shards("abc"), shards("abcd")
    assert all(120 < three.count(f"{name}.internal:1") < 220 for name in "abc")
    assert {after for before, after in zip(three, four, strict=True) if before != after} == {"d.internal:1"}


@pytest.mark.parametrize(
    "config", [{"shards": []}, {"shards": ["a:1", "a:1"]}, {"prefix": "rooms/"}, {"prefix": "/rooms"}]
)
def test_invalid_shards_refuse_the_start(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"shards are|prefix begins"):
        call(loaded("shard_by_path"), worker_request(), {"prefix": "/", "shards": ["a:1"]} | config)


# --- maintenance


def test_during_maintenance_only_allowed_addresses_are_served(tmp_path: Path) -> None:
    flag = tmp_path / "maintenance"
    config = {"flag": str(flag), "retry_after": 120, "let_through": ["127.0.0.2", "2001:db8::/32"]}
    with example("maintenance", config=config) as tunnel:
        assert tunnel.handshake().status == 101
        flag.touch()
        forged = [("X-Forwarded-For", "127.0.0.2"), ("X-Real-IP", "127.0.0.2"), ("Forwarded", "for=127.0.0.2")]
        answer = tunnel.handshake(headers=forged)
        assert refused(answer, 503)
        assert (answer.headers["Retry-After"], answer.body) == ("120", "down for maintenance\n")
        assert tunnel.handshake(client_address="127.0.0.2", messages=["hello"]).messages == ("hello",)
        flag.unlink()
        assert tunnel.handshake().status == 101


@pytest.mark.parametrize(("address", "passes"), [("2001:db8::7", True), ("2001:db9::7", False), ("", False)])
def test_unknown_addresses_are_refused_during_maintenance(tmp_path: Path, address: str, passes: bool) -> None:
    flag = tmp_path / "maintenance"
    flag.touch()
    config = {"flag": str(flag), "let_through": ["10.0.0.0/8", "2001:db8::/32"]}
    answer = call(loaded("maintenance"), worker_request(client_address=address), config)
    assert isinstance(answer, WorkerRequest if passes else Reply)


# --- token_subprotocol


@pytest.fixture(scope="module")
def token_tunnel() -> Iterator[EdgeTunnel]:
    with example("token_subprotocol") as tunnel:
        yield tunnel


def test_a_browsers_token_becomes_a_field(token_tunnel: EdgeTunnel) -> None:
    protocols = [Subprotocol("chat"), Subprotocol("bearer.abc.DEF-1_2~+"), Subprotocol("chat.v2")]
    fields = {"Authorization": "Bearer forged", "X-Me": "1"}
    with connect(
        token_tunnel.uri, ssl=token_tunnel.context, subprotocols=protocols, additional_headers=fields, proxy=None
    ) as client:
        client.send("hello")
        assert (client.recv(), client.subprotocol) == ("hello", "chat")
    reached = [one for one in token_tunnel.origin.requests if "X-Me" in one.headers][-1]
    assert reached.headers.getall("Authorization") == ["Bearer abc.DEF-1_2~+"]
    assert reached.headers.getall("Sec-WebSocket-Protocol") == ["chat, chat.v2"]
    assert "bearer." not in token_tunnel.text


@pytest.mark.parametrize("protocols", [(), ("chat",), ("Bearer.x", "chat")])
def test_requests_without_a_token_are_forwarded_unchanged(token_tunnel: EdgeTunnel, protocols: Sequence[str]) -> None:
    answer = token_tunnel.handshake(headers={"Authorization": "Bearer own"}, subprotocols=protocols)
    assert answer.request is not None
    assert answer.request.headers.getall("Authorization") == ["Bearer own"]
    assert answer.headers.get("Sec-WebSocket-Protocol") == next(iter(protocols), None)


@pytest.mark.parametrize(
    "value",
    [
        "bearer.a",
        "chat, bearer.a, bearer.b",
        "chat, bearer.",
        "chat, bearer.a b",
        'chat, bearer."a"',
        "chat, bearer.ü",
        "chat, bearer.a=",
        "bearer.a, bearer.a",
    ],
)
def test_an_invalid_token_or_one_alone_is_refused(token_tunnel: EdgeTunnel, value: str) -> None:
    answer = token_tunnel.handshake(headers={"Sec-WebSocket-Protocol": value})
    assert refused(answer, 400)


# --- audit_log


def test_each_handshake_has_a_line_without_secrets() -> None:
    secrets = {
        "Cookie": "sid=hush-1",
        "Authorization": "Bearer hush-2",
        "Sec-WebSocket-Protocol": "chat, bearer.hush-3",
        "X-Api-Key": "hush-4",
        "Origin": 'https://app.example.com/"\\',
        "User-Agent": 'Agent "7" \\ ü 世 100% {"id": "forged"}' + "x" * 500,
    }
    with example("audit_log") as tunnel:
        answers = [
            tunnel.handshake("/a%22b/%22?token=hush-5", headers=secrets),
            tunnel.handshake("/"),
            tunnel.handshake("/", headers=[("Origin", "https://a.example"), ("Origin", "https://b.example")]),
        ]
        assert [one.status for one in answers] == [101] * 3
        records = [one for one in tunnel.log if str(one.get("logger", "")).endswith(".audit")]
    lines = [json.loads(record["event"]) for record in records]
    assert [line["id"] for line in lines] == [one.record["id"] for one in answers]
    assert "hush" not in tunnel.text
    first = lines[0]
    assert first["page"] == "https://app.example.com/%22%5C"
    assert first["user_agent"].startswith("Agent %227%22 %5C ")
    assert len(first["user_agent"]) < 700
    assert (first["client"], first["site"], first["host"], first["path"]) == (
        "127.0.0.1",
        "localhost",
        "localhost",
        "/a%22b/%22",
    )
    assert (first["tls"], first["certificate"]) == ("TLSv1.3", "")
    assert (lines[1]["page"], lines[1]["user_agent"]) == ("", "")
    assert lines[2]["page"] == "https://a.example"
