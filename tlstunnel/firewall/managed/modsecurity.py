"""libmodsecurity 3 through ctypes: the C functions that evaluate a request without a body, with results as values.

It is loaded in helper processes only: a few kilobytes can keep it busy for a minute, and it cannot be interrupted.
"""

import ctypes
import random
import re
from collections.abc import Callable
from typing import Any

from tlstunnel.errors import ConfigurationError
from tlstunnel.firewall.managed.messages import Evaluation, Match, RuleSet, Subject

LIBRARY = "libmodsecurity.so.3"
MAX_MATCHES = 64
"""Matches that an evaluation reports. About 200 rules of CRS can match a handshake; people read a few."""

MAX_LINES = 512
"""Log lines that are kept of one evaluation. libmodsecurity has no bound: it may write rules times arguments."""

MAX_TEXT = 300
"""Characters of a message, and of the matched data."""

_SCORE_RULES = frozenset({949110, 949111})
_SCORE = re.compile(r"Total Score: ([0-9]{1,9})")
_REST = re.compile(
    rb'/[^"/]+"\] \[line "[0-9]+"\] \[id "([0-9]{1,18})"\] \[rev "[^"]*"\] \[msg "(.*?)"\] \[data "(.*?)"\]'
    rb' \[severity "([0-9])"\]',
    re.DOTALL,
)

_Pointer = ctypes.c_void_p
_Text = ctypes.c_char_p
_LogCallback = ctypes.CFUNCTYPE(None, _Pointer, _Text)


class _Intervention(ctypes.Structure):
    """``ModSecurityIntervention``. We have to free its texts, so they are not ``c_char_p``, which loses the pointer."""

    _fields_ = (
        ("status", ctypes.c_int),
        ("pause", ctypes.c_int),
        ("url", _Pointer),
        ("log", _Pointer),
        ("disruptive", ctypes.c_int),
    )


class ModSecurity:
    """The library, with its rule sets. It does one evaluation at a time. Raises ConfigurationError if it is missing."""

    def __init__(self) -> None:
        try:
            library = ctypes.CDLL(LIBRARY)
        except OSError:
            raise ConfigurationError(
                f"managed rules need {LIBRARY}, which is not installed; install Debian's packages libmodsecurity3 and"
                " modsecurity-crs"
            ) from None
        self._c = _Functions(library)
        self._lines: list[bytes] = []
        self._mark = make_mark()
        # libmodsecurity keeps the pointer, so the callback must stay alive. Without a callback it writes to stderr.
        self._callback = _LogCallback(self._on_log_line)
        self._engine = self._c.init()
        self._c.set_log_callback(self._engine, self._callback)

    def load(self, rule_set: RuleSet) -> int:
        """Load a rule set and return its handle for `evaluate`. Raises ConfigurationError with the library's reason."""
        loaded: int = self._c.create_rules_set()
        for source in rule_set.sources:
            error = _Pointer()
            if source.file:
                code = self._c.add_file(loaded, self._insert_mark(source.file).encode(), ctypes.byref(error))
            else:
                code = self._c.add_text(loaded, source.text.encode(), ctypes.byref(error))
            message = self._take_text(error.value).decode("utf-8", "replace")
            if code < 0:
                where = source.file or "tlstunnel's own settings"
                message = " ".join(message.replace(self._mark, "").split())[:MAX_TEXT] or "it gives no reason"
                raise ConfigurationError(f"{where}: libmodsecurity cannot load it: {message}")
        return loaded

    def evaluate(self, loaded: int, subject: Subject) -> Evaluation:
        """Evaluate a request. Usually takes milliseconds, but up to a minute for some inputs."""
        self._lines.clear()
        transaction = self._c.new_transaction(self._engine, loaded, None)
        try:
            return self._run_phases(transaction, subject)
        finally:
            self._c.clean_up(transaction)

    def _run_phases(self, transaction: int, subject: Subject) -> Evaluation:
        c = self._c
        # The server's address and the ports are required, but no rule of CRS uses them.
        c.process_connection(transaction, subject.ip.encode(), 0, b"127.0.0.1", 443)
        c.process_uri(transaction, subject.target, subject.method.encode(), b"1.1")
        for name, value in subject.fields:
            c.add_header(transaction, name, len(name), value, len(value))
        # Rules about arguments are in the second phase, so it runs although there is no body.
        for phase in (c.process_headers, c.process_body):
            phase(transaction)
            intervention = _Intervention(status=403)
            c.intervene(transaction, ctypes.byref(intervention))
            line = self._take_text(intervention.log)
            self._take_text(intervention.url)
            if intervention.disruptive:
                return self._read_denial(line, intervention.status)
        return Evaluation(0, self._read_matches())

    def _read_denial(self, line: bytes, status: int) -> Evaluation:
        rule = self._parse_line(line)
        matches = self._read_matches()
        if rule is None:
            return Evaluation(0, matches, denied_by=-1, status=status)
        score = _SCORE.search(rule.message) if rule.id in _SCORE_RULES else None
        if score:
            return Evaluation(int(score[1]), matches)
        return Evaluation(0, (*matches, rule), denied_by=rule.id, status=status)

    def _on_log_line(self, _: int | None, line: bytes | None) -> None:
        if line and len(self._lines) < MAX_LINES:
            self._lines.append(line)

    def _read_matches(self) -> tuple[Match, ...]:
        found = dict.fromkeys(match for line in self._lines if (match := self._parse_line(line)))
        return tuple(found)[:MAX_MATCHES]

    def _parse_line(self, line: bytes) -> Match | None:
        """Parse a line such as ``... [file "F"] [line "1"] [id "942100"] [rev ""] [msg "..."] [data "..."] ...``.

        An argument's name and value come before ``[file``, unescaped, so a client can imitate all of this. Only the
        real file name contains the mark, which clients cannot know.
        """
        found = (
            _REST.match(line, line.find(self._mark.encode()) + len(self._mark)) if self._mark.encode() in line else None
        )
        if found is None:
            return None
        number, message, data, severity = found.groups()
        return Match(int(number), _shorten(message), int(severity), _shorten(data))

    def _insert_mark(self, file: str) -> str:
        folder, _, name = file.rpartition("/")
        return f"{folder}{self._mark}/{name}"

    def _take_text(self, pointer: int | None) -> bytes:
        """Copy a text that the library handed over, and free it."""
        if not pointer:
            return b""
        text = ctypes.string_at(pointer)
        self._c.free(pointer)
        return text


class _Functions:
    """The functions of ``modsecurity/modsecurity.h``, ``rule_set.h`` and ``transaction.h``, declare in full."""

    def __init__(self, library: ctypes.CDLL) -> None:
        integer, size = ctypes.c_int, ctypes.c_size_t
        errors = ctypes.POINTER(_Pointer)

        def declare(name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
            return function  # type: ignore[no-any-return]

        self.init = declare("msc_init", _Pointer)
        self.set_log_callback = declare("msc_set_log_cb", None, _Pointer, _LogCallback)
        self.create_rules_set = declare("msc_create_rules_set", _Pointer)
        self.add_text = declare("msc_rules_add", integer, _Pointer, _Text, errors)
        self.add_file = declare("msc_rules_add_file", integer, _Pointer, _Text, errors)
        self.new_transaction = declare("msc_new_transaction", _Pointer, _Pointer, _Pointer, _Pointer)
        self.process_connection = declare("msc_process_connection", integer, _Pointer, _Text, integer, _Text, integer)
        self.process_uri = declare("msc_process_uri", integer, _Pointer, _Text, _Text, _Text)
        self.add_header = declare("msc_add_n_request_header", integer, _Pointer, _Text, size, _Text, size)
        self.process_headers = declare("msc_process_request_headers", integer, _Pointer)
        self.process_body = declare("msc_process_request_body", integer, _Pointer)
        self.intervene = declare("msc_intervention", integer, _Pointer, ctypes.POINTER(_Intervention))
        self.clean_up = declare("msc_transaction_cleanup", None, _Pointer)
        # The C library's free(), since the texts of libmodsecurity come from strdup().
        self.free = ctypes.CDLL(None).free
        self.free.restype, self.free.argtypes = None, (_Pointer,)


def make_mark() -> str:
    """Return a path segment that leads nowhere (``/.`` and ``/``), with 64 random bits that clients cannot guess."""
    choice = random.SystemRandom().choice
    return "".join(choice(("/", "/.")) for _ in range(64))


def _shorten(text: bytes) -> str:
    decoded = text.decode("utf-8", "replace")
    return decoded if len(decoded) <= MAX_TEXT else decoded[:MAX_TEXT] + "..."
