"""Find faults in the user's own rules that libmodsecurity accepts silently, so that a rule never matches.

Seen with 3.0.9: a regular expression that does not compile, an unknown operator, an unclosed quote, and a chain without
a next rule. Also faults that it reports badly: a missing id (with a wrong file name), and an id that is used twice. And
what rules for handshakes must not do. libmodsecurity refuses all other faults itself, with line and column.
"""

import ctypes
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from tlstunnel.addresses import quoted
from tlstunnel.errors import ConfigurationError

MAX_FILE = 4_194_304
"""Bytes of a file of rules. The whole CRS has 0.5 MB."""

_OPERATORS = """
beginsWith contains containsWord detectSQLi detectXSS endsWith eq fuzzyHash ge geoLookup gt ipMatch ipMatchF
ipMatchFromFile le lt noMatch pm pmf pmFromFile rsub rx rxGlobal streq strmatch unconditionalMatch validateByteRange
validateDTD validateHash validateSchema validateUrlEncoding validateUtf8Encoding verifyCC verifyCPF verifySSN
verifySVNR within
"""
_OPERATOR_NAMES = {name.lower(): name for name in _OPERATORS.split()}

_FORBIDDEN = {
    "secremoterules": "rules cannot be fetched from the network; keep them in a file",
    "include": 'included files are not checked; name all files with rules = "folder/*.conf"',
    "includeoptional": 'included files are not checked; name all files with rules = "folder/*.conf"',
    "secrulescript": "rules cannot run programs",
    "@rbl": "a rule cannot ask the network; keep the addresses in a list of the firewall",
    "@gsblookup": "a rule cannot ask the network; keep the addresses in a list of the firewall",
    "@inspectfile": "rules cannot run programs",
    "exec": "rules cannot run programs",
}

_BROKEN_CHAIN = "the chain has no next rule: add a SecRule after this one, or remove the action chain"

_WORD = re.compile(r'(?:"((?:\\.|[^"\\])*)"|([^\s"]+))(?=\s|$)', re.DOTALL)
_OPERATOR = re.compile(r"(!?)\s*@(\w+)\s*(.*)", re.DOTALL)
_ACTION = re.compile(r"((?:\\.|[^,'\\]|'(?:\\.|[^'\\])*')*)(?:,|$)", re.DOTALL)

FindPatternFault = Callable[[str], str | None]
"""Returns why a regular expression does not compile, or None."""


@dataclass(frozen=True, slots=True)
class _Directive:
    """A directive: its ``name`` in lower case, its ``words`` without quotes, and the number of its first line."""

    line: int
    name: str
    words: tuple[str, ...]


class _Fault(Exception):
    """A fault in line `line`."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line
        self.reason = reason


def check(files: Iterable[Path], known: Mapping[int, str]) -> None:
    """Check files of rules, in loading order. `known` are the ids already in use, with their users.

    Raises ConfigurationError with all problems, each as ``FILE:LINE: ...``.
    """
    ids = dict(known)
    problems = [problem for path in files for problem in _lint_file(path, ids)]
    if problems:
        raise ConfigurationError(*problems)


def _lint_file(path: Path, ids: dict[int, str]) -> list[str]:
    try:
        if path.stat().st_size > MAX_FILE:
            return [f"{path}: the file has more than {MAX_FILE} bytes, too many for rules"]
        text = path.read_text("utf-8")
    except OSError as error:
        return [f"{path}: cannot be read: {error.strerror}"]
    except UnicodeDecodeError:
        return [f"{path}: the file is not UTF-8"]
    return [f"{path}:{fault.line}: {fault.reason}" for fault in _find_faults(text, str(path), ids)]


def _find_faults(text: str, file: str, ids: dict[int, str]) -> list[_Fault]:
    if text and not text.endswith("\n"):
        # libmodsecurity's parser would continue in the next file, and name that one.
        return [_Fault(text.count("\n") + 1, "the last line has no newline; add one")]
    faults: list[_Fault] = []
    chain: _Directive | None = None
    try:
        for directive in _split_directives(text):
            if chain and directive.name != "secrule" and directive.name not in _FORBIDDEN:
                faults.append(_Fault(chain.line, _BROKEN_CHAIN))
                chain = None
            try:
                chain = _check_directive(directive, chain, file, ids)
            except _Fault as fault:
                faults.append(fault)
                chain = directive if _is_chained(directive) else None
    except _Fault as fault:  # the rest of the text cannot be split
        return [*faults, fault]
    if chain:
        faults.append(_Fault(chain.line, _BROKEN_CHAIN))
    return faults


def _is_chained(directive: _Directive) -> bool:
    """Return whether the next rule continues this one, which has a fault."""
    try:
        return directive.name in ("secrule", "secaction") and "chain" in _parse_actions(directive)
    except _Fault:
        return False


def _check_directive(
    directive: _Directive, chain: _Directive | None, file: str, ids: dict[int, str]
) -> _Directive | None:
    """Check one directive; return it if the next one continues its chain. Raises _Fault."""
    if directive.name in _FORBIDDEN:
        raise _Fault(directive.line, f"{directive.name}: {_FORBIDDEN[directive.name]}")
    if directive.name == "secrule":
        _check_operator(directive, find_pattern_fault)
    if directive.name not in ("secrule", "secaction"):
        return chain
    actions = _parse_actions(directive)
    if not chain:
        _check_id(directive, actions, file, ids)
    return directive if "chain" in actions else None


def _split_directives(text: str) -> Iterator[_Directive]:
    """Yield each directive of a file. A backslash at the end of a line continues it on the next."""
    lines = iter(enumerate(text.split("\n"), 1))
    for number, first in lines:
        line = first.rstrip("\r")
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        parts = [line]
        while parts[-1].endswith("\\"):
            parts[-1] = parts[-1][:-1]
            parts.append(next(lines, (0, ""))[1].rstrip("\r"))
        words = _split_words(number, "".join(parts))
        yield _Directive(number, words[0].lower(), words[1:])


def _split_words(number: int, text: str) -> tuple[str, ...]:
    words: list[str] = []
    while text := text.lstrip():
        match = _WORD.match(text)
        if match is None:
            raise _Fault(number, 'a quote is not closed; end it, or write \\" for a quote inside a text')
        inside, plain = match.groups()
        words.append(plain if inside is None else inside.replace('\\"', '"'))
        text = text[match.end() :]
    return tuple(words)


def _check_operator(directive: _Directive, find_fault: FindPatternFault) -> None:
    if len(directive.words) not in (2, 3):
        wanted = 'SecRule VARIABLES "OPERATOR" "ACTIONS"'
        raise _Fault(directive.line, f"expected {wanted}, got {len(directive.words)} parts; is a quote missing?")
    text = directive.words[1]
    match = _OPERATOR.fullmatch(text.strip())
    name, argument = (match[2], match[3]) if match else ("rx", text.removeprefix("!"))
    if reason := _FORBIDDEN.get("@" + name.lower()):
        raise _Fault(directive.line, f"@{name}: {reason}")
    if name.lower() not in _OPERATOR_NAMES:
        near = get_close_matches(name.lower(), _OPERATOR_NAMES, n=1)
        hint = (
            f"did you mean @{_OPERATOR_NAMES[near[0]]}?" if near else "see the ModSecurity reference manual, operators"
        )
        raise _Fault(directive.line, f"there is no operator {quoted('@' + name)}; {hint}")
    if name.lower() in ("rx", "rxglobal") and "%{" not in argument and (reason := find_fault(argument)):
        raise _Fault(
            directive.line, f"the regular expression {quoted(argument)} does not compile: {reason}; correct it"
        )


def _parse_actions(directive: _Directive) -> dict[str, str]:
    """Return the actions of a rule by name in lower case. The last of repeated actions counts."""
    text = directive.words[-1] if len(directive.words) == (3 if directive.name == "secrule" else 1) else ""
    actions: dict[str, str] = {}
    position = 0
    while position < len(text):
        match = _ACTION.match(text, position)
        if match is None:
            shown = quoted(text[position:].strip())
            raise _Fault(
                directive.line, f"a quote is not closed at {shown}; end it, or write \\\\' for a quote inside a text"
            )
        name, _, value = match[1].strip().partition(":")
        name = name.strip().lower()
        if name in _FORBIDDEN:
            raise _Fault(directive.line, f"{name}: {_FORBIDDEN[name]}")
        actions[name] = value.strip().strip("'")
        position = match.end()
    return actions


def _check_id(directive: _Directive, actions: Mapping[str, str], file: str, ids: dict[int, str]) -> None:
    number = actions.get("id", "")
    if not number.isascii() or not number.isdigit() or len(number) > 9 or not int(number):
        raise _Fault(directive.line, "the rule has no id; add a unique one, such as id:1001")
    if taken := ids.get(int(number)):
        raise _Fault(
            directive.line, f"the id {int(number)} is already used by {taken}; choose another, such as one below 100000"
        )
    ids[int(number)] = f"{file}:{directive.line}"


@cache
def find_pattern_fault(pattern: str) -> str | None:
    """Return why PCRE2, which libmodsecurity uses, does not compile a regular expression, or None.

    Raises ConfigurationError if the library is missing.
    """
    library = _load_pcre2()
    raw = pattern.encode()
    code, offset = ctypes.c_int(), ctypes.c_size_t()
    compiled = library.pcre2_compile_8(raw, len(raw), _PCRE2_OPTIONS, ctypes.byref(code), ctypes.byref(offset), None)
    if compiled:
        library.pcre2_code_free_8(compiled)
        return None
    message = ctypes.create_string_buffer(256)
    library.pcre2_get_error_message_8(code, message, len(message))
    return f"{message.value.decode('ascii', 'replace')} at character {offset.value}"


_PCRE2_OPTIONS = 0x20 | 0x400  # PCRE2_DOTALL | PCRE2_MULTILINE of pcre2.h, as libmodsecurity compiles


@cache
def _load_pcre2() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libpcre2-8.so.0")
    except OSError:
        raise ConfigurationError(
            "managed rules need libpcre2-8.so.0, which is not installed; install Debian's package libmodsecurity3,"
            " which brings it"
        ) from None
    size, pointer = ctypes.c_size_t, ctypes.c_void_p
    library.pcre2_compile_8.restype = pointer
    library.pcre2_compile_8.argtypes = [
        ctypes.c_char_p,
        size,
        ctypes.c_uint32,
        ctypes.POINTER(ctypes.c_int),
        ctypes.POINTER(size),
        pointer,
    ]
    library.pcre2_code_free_8.restype = None
    library.pcre2_code_free_8.argtypes = [pointer]
    library.pcre2_get_error_message_8.argtypes = [ctypes.c_int, ctypes.c_char_p, size]
    return library
