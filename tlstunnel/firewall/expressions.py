"""Expressions of the Common Expression Language (CEL), checked when they are loaded and evaluated for each request.

The library `cel` parses and evaluates expressions, but does not check names or types. So this module does, with its own
tokenizer for the names, calls and literals of an expression that the library has parsed. Regular expressions are
compiled once, by google-re2; the library's ``matches`` compiles its pattern at each call.
"""

import difflib
import logging
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import cel
import re2  # type: ignore[import-untyped]

from tlstunnel.addresses import quoted
from tlstunnel.errors import ConfigurationError
from tlstunnel.escaping import printable
from tlstunnel.firewall.cookies import MAX_COOKIES, combine
from tlstunnel.firewall.facts import FIELDS, MAX_ELEMENTS, MAX_QUERY_VALUES, Facts, gather
from tlstunnel.firewall.lists import AddressSet, NamedLists
from tlstunnel.handshake.connection import Connection
from tlstunnel.handshake.refusal import Refusal
from tlstunnel.handshake.request import MAX_FIELDS, UpgradeRequest
from tlstunnel.journal.events import Reason

MAX_EXPRESSION = 8192
"""Bytes of an expression. Google Cloud Armor accepts 2048 characters, Cloudflare 4096."""

MAX_STEPS = 2000
"""Steps of nested comprehensions: the product of their ranges. With a regular expression in each step, 2000 take 10 ms;
three nested comprehensions over 100 elements each would take 285 ms."""

MAX_RANGE = max(MAX_QUERY_VALUES, MAX_COOKIES, MAX_ELEMENTS, MAX_FIELDS)
"""The largest range of a comprehension, unless it is a list that is written in the expression."""

MAX_PROGRAM = 1000
"""Instructions of a regular expression. If an input defeats RE2's cached automaton, each byte costs 13 ns per
instruction (16 KB and 900 instructions: 0.2 s). Long patterns are mostly lists of words, which belong in a named list.
"""

MAX_AUTOMATON = 1 << 20
"""Bytes of memory for the cached automaton of each regular expression, which inputs can make it use in full. RE2's
default is 8 MiB. With 64 KiB, long alternations take ten times as long."""

_MAPS = frozenset({"headers", "query", "cookies"})
_MACROS = frozenset({"all", "exists", "exists_one", "existsOne", "map", "filter"})
_OWN_FUNCTIONS = frozenset({"regex", "lower", "ip_in", "in_list"})
_METHODS = _MACROS | {
    *("startsWith", "endsWith", "contains", "size", "regex", "lower"),
    *("getFullYear", "getMonth", "getDate", "getDayOfMonth", "getDayOfWeek", "getDayOfYear"),
    *("getHours", "getMinutes", "getSeconds", "getMilliseconds"),
}
_FUNCTIONS = frozenset({"ip_in", "in_list", "size", "int", "double", "string", "timestamp", "duration", "has"})
_WORDS = frozenset({"true", "false", "null", "in"})
_HINTS = {
    "matches": 'write value.regex("pattern"), whose pattern is compiled once',
    "lowerAscii": "write value.lower()",
    "header": 'write headers["name"]',
}
_TOKEN = re.compile(
    r"""(?P<space>(?:\s|//[^\n]*)+)
    |(?P<string>[rR]?[bB]?[rR]?(?:\"\"\"|'''|"|'))
    |(?P<name>[A-Za-z_][A-Za-z0-9_]*)
    |(?P<number>0[xX][0-9A-Fa-f]+[uU]?|(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?[uU]?)
    |(?P<mark>&&|\|\||[<>=!]=|.)""",
    re.VERBOSE | re.DOTALL,
)
_BODY = {
    (quote, raw): re.compile((r".*?" if raw else r"(?:\\.|[^\\])*?") + quote, re.DOTALL)
    for quote in ('"""', "'''", '"', "'")
    for raw in (False, True)
}
_PARSE_ERROR = re.compile(r"<input>:([0-9]+):([0-9]+): ([^\n]*)")
_PYTHON_ERROR = "Python function call failed: TypeError: "
_MAX_ERROR = 200
_QUOTED_VALUE = re.compile(r"""(?:: Error \{[^"]*)?".*""", re.DOTALL)

# It warns whenever one of our functions raises, and quotes the client's value. `EvaluationError` says the same.
logging.getLogger("cel").setLevel(logging.CRITICAL + 1)


class ExpressionError(ConfigurationError):
    """An expression is invalid, at this `line` and `column`, both counted from 1."""

    def __init__(self, reason: str, line: int, column: int) -> None:
        super().__init__(f"line {line}, column {column}: {reason}")
        self.reason = reason
        self.line = line
        self.column = column


class EvaluationError(Exception):
    """An expression could not be evaluated for a request. The text is escaped, and has no value that a client sent.

    `typing` means that a value has the wrong type, which is a fault of the expression. Otherwise the request has no
    such key or index, or a text is not a number or a time.
    """

    def __init__(self, reason: str, *, typing: bool = False) -> None:
        super().__init__(reason)
        self.typing = typing


@dataclass(frozen=True, slots=True)
class Expression:
    """A checked expression, with the `fields` of `Facts` that it reads and those of our `functions` that it calls.

    `cookies` and `headers` are the names of those whose values it reads, None if they are only known for a request.
    Its longest comprehension takes `fixed_steps`, or `scaled_steps` for each element of what it iterates over.
    """

    text: str
    fields: frozenset[str]
    functions: frozenset[str]
    cookies: frozenset[str] | None
    headers: frozenset[str] | None
    fixed_steps: int
    scaled_steps: int
    _program: cel.Program

    def evaluate(self, context: cel.Context) -> bool:
        """Return whether the expression is true. Raises only `EvaluationError`, whatever the client sent."""
        try:
            found = self._program.execute(context)
        except KeyError as error:
            key = str(error.args[0])
            # A key that a client sent may be a token, and would be in the log.
            raise EvaluationError(f"there is no key {quoted(key)}" if key in self.text else "no such key") from None
        except BaseException as error:
            # The library raises a dozen types. A panic in its Rust code is not an Exception, but must not end the
            # process.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise _translate_error(error) from None
        if isinstance(found, bool):
            return found
        raise EvaluationError(f"the result is {_name_type(found)}, not true or false", typing=True)


class Scope:
    """The fields and functions that a group of expressions uses, to pass them to the library once per request.

    Only used fields are passed: passing the scalars takes 8 us, the maps of a browser's request 55 us.
    """

    __slots__ = ("_fields", "_functions")

    def __init__(self, expressions: Iterable[Expression], functions: dict[str, Callable[..., Any]]) -> None:
        found = tuple(expressions)
        used = frozenset[str]().union(*(one.fields for one in found))
        called = frozenset[str]().union(*(one.functions for one in found))
        self._fields = tuple(name for name in FIELDS if name in used)
        self._functions = {name: function for name, function in functions.items() if name in called}

    def context(self, facts: Facts, cookies: dict[str, str] | None = None) -> cel.Context:
        """Return the context of a request, for `Expression.evaluate`, with these `cookies` instead of the first."""
        values = {name: getattr(facts, name) for name in self._fields}
        if cookies is not None:
            values["cookies"] = cookies
        return cel.Context(values, self._functions)


class Expressions:
    """Compiles expressions. They look lists up by name when they are evaluated, so they see the current content."""

    def __init__(self, lists: NamedLists | None = None) -> None:
        self._lists = lists or NamedLists()
        self._networks: dict[tuple[str, ...], AddressSet] = {}
        self._patterns: dict[str, Callable[[bytes], object]] = {}
        self._functions: dict[str, Callable[..., Any]] = {
            "ip_in": self._ip_in,
            "in_list": self._in_list,
            "regex": self._regex,
            "lower": _lower,
        }

    def compile(self, text: str) -> Expression:
        """Check and compile an expression. Raises `ExpressionError`, which names the place and suggests a name.

        It is also evaluated for a sample request, and refused if that mixes types or the result is not true or false.
        """
        if len(text.encode()) > MAX_EXPRESSION:
            raise ExpressionError(f"the expression has more than {MAX_EXPRESSION} bytes", 1, 1)
        try:
            program = cel.compile(text)
        except ValueError as error:
            raise _translate_parse_error(str(error)) from None
        checker = _Checker(text, self._prepare_literals)
        # The library's own list of names has anything that the tokenizer may have overlooked.
        unseen = {*program.variables(), *filter(str.isidentifier, program.functions())} - checker.seen
        if unseen:
            raise ExpressionError(f"{quoted(min(unseen))} cannot be used here", 1, 1)
        expression = Expression(
            text,
            frozenset(checker.fields),
            frozenset(checker.functions),
            None if checker.reads_any_cookie else frozenset(checker.cookies),
            None if checker.reads_any_header else frozenset(checker.headers),
            checker.fixed_steps,
            checker.scaled_steps,
            program,
        )
        self._try_sample(expression)
        return expression

    def scope(self, expressions: Iterable[Expression]) -> Scope:
        """Return the scope that these expressions need."""
        return Scope(expressions, self._functions)

    def condition(self, text: str, failed: Callable[[str], None] | None = None) -> Callable[[Facts], bool]:
        """Compile `text` into a function that returns whether it is true for any value of the cookies that it reads.

        If the expression cannot be evaluated, the function calls `failed` with the reason and returns False. It raises
        `Refusal` as `matches` does, and nothing else. Raises `ExpressionError`.
        """
        expression = self.compile(text)
        scope = self.scope([expression])

        def holds(facts: Facts) -> bool:
            try:
                return self.matches(expression, facts, scope.context(facts))
            except EvaluationError as error:
                if failed:
                    failed(str(error))
                return False

        return holds

    def matches(self, expression: Expression, facts: Facts, context: cel.Context, *, every: bool = False) -> bool:
        """Return whether the expression is true for any value of the cookies that it reads, or with `every` for all.

        `context` is that of the first values. Raises `EvaluationError` if the result depends on values for which it
        cannot be evaluated, and `Refusal` (400) for more values than it is evaluated for, or for a repeated field that
        it reads.
        """
        if "headers" in expression.fields:
            facts.refuse_repeated(expression.headers)
        combinations = []
        if "cookies" in expression.fields and facts.repeats_cookies:
            combinations = combine(facts.cookie_values, expression.cookies)
        if len(combinations) < 2:
            return expression.evaluate(context)
        # Counted for this request: a browser's has a tenth of the elements that are possible.
        steps = max(expression.fixed_steps, expression.scaled_steps * facts.count_largest(expression.fields))
        if len(combinations) * steps > MAX_STEPS:
            raise Refusal(400, Reason.TOO_MANY_COOKIES, "the request has several values of too many cookies")
        # A pattern that takes long is searched for once in each text.
        scope = Scope([expression], {name: _remember(function) for name, function in self._functions.items()})
        results: list[bool] = []
        failure: EvaluationError | None = None
        for cookies in combinations:
            try:
                results.append(expression.evaluate(scope.context(facts, cookies)))
            except EvaluationError as error:
                failure = error
        if failure is not None and (every or not any(results)):
            raise failure
        return all(results) if every else any(results)

    def _try_sample(self, expression: Expression) -> None:
        try:
            expression.evaluate(self.scope([expression]).context(_SAMPLE))
        except EvaluationError as error:
            if error.typing:
                raise ExpressionError(str(error), 1, 1) from None

    def _prepare_literals(self, function: str, values: list[str]) -> None:
        """Prepare the literals of a call when the expression is loaded. Raises ValueError."""
        if function == "regex":
            self._patterns.setdefault(values[0], _compile_pattern(values[0]))
        elif function == "ip_in":
            self._networks.setdefault(tuple(values), AddressSet(values))
        elif values[0] not in self._lists:
            near = difflib.get_close_matches(values[0][:100], self._lists.names, n=1)
            hint = f'did you mean "{near[0]}"?' if near else "lists = { NAME = ... } at the top of the file defines one"
            raise ValueError(f"there is no list {quoted(values[0])}; {hint}")

    def _ip_in(self, ip: object, *networks: str) -> bool:
        return _require_string(ip, "ip_in") in self._networks[networks]

    def _in_list(self, value: object, name: str) -> bool:
        return _require_string(value, "in_list") in self._lists[name]

    def _regex(self, value: object, pattern: str) -> bool:
        # Bytes: for a string the library would also count characters up to the match.
        return self._patterns[pattern](_require_string(value, "regex").encode()) is not None


def _translate_error(error: BaseException) -> EvaluationError:
    text = str(error)
    # How the library reports an exception of one of our functions.
    _, ours, reason = text.partition(_PYTHON_ERROR)
    typing = bool(ours) or isinstance(error, TypeError)
    # What the library quotes is a value, such as the text that is no duration, and may be a client's token.
    text = _QUOTED_VALUE.sub("", reason or text)
    return EvaluationError(printable(text.partition(". C")[0][:_MAX_ERROR]), typing=typing)


def _remember(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function`, which computes each result once, unless it raises."""
    known: dict[tuple[object, ...], Any] = {}

    def remembered(*args: object) -> Any:
        try:
            return known[args]
        except KeyError:
            found = known[args] = function(*args)
            return found
        except TypeError:  # a list, which the function refuses
            return function(*args)

    return remembered


def _lower(value: object) -> str:
    return _require_string(value, "lower").lower()


def _require_string(value: object, function: str) -> str:
    if isinstance(value, str):
        return value
    raise TypeError(f"{function} takes a string, not {_name_type(value)}")


def _compile_pattern(pattern: str) -> Callable[[bytes], object]:
    """Compile a regular expression and return its search method. Raises ValueError."""
    options = re2.Options()
    options.log_errors = False
    options.never_capture = True
    options.max_mem = MAX_AUTOMATON
    try:
        compiled = re2.compile(pattern, options)
    except re2.error as error:
        reason = error.args[0]
        message = reason.decode("utf-8", "replace") if isinstance(reason, bytes) else str(reason)
        raise ValueError(f"the pattern {quoted(pattern)} is not valid in RE2: {printable(message)}") from None
    if max(compiled.programsize, compiled.reverseprogramsize) > MAX_PROGRAM:
        hint = "use a named list for many words, and smaller counts in {}"
        raise ValueError(f"the pattern {quoted(pattern)} is too large; {hint}")
    search: Callable[[bytes], object] = compiled.search
    return search


def _translate_parse_error(message: str) -> ExpressionError:
    match = _PARSE_ERROR.search(message)
    if not match:
        return ExpressionError(printable(message.partition("\n")[0][:_MAX_ERROR]), 1, 1)
    # ANTLR lists every token that it would have accepted.
    reason = match[3].removeprefix("Syntax error: ").partition(" expecting ")[0]
    return ExpressionError(printable(f"not CEL: {reason}"[:_MAX_ERROR]), int(match[1]), int(match[2]))


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    at: int


def _tokenize(text: str) -> list[_Token]:
    """Split an expression that the library has parsed into tokens, without white space and comments."""
    tokens: list[_Token] = []
    at = 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        assert match is not None  # its last alternative matches any character
        assert match.lastgroup is not None
        end = match.end()
        if match.lastgroup == "string":
            prefix = match[0].rstrip("\"'")
            body = _BODY[match[0][len(prefix) :], "r" in prefix.lower()].match(text, end)
            if body is None:
                raise _error("a string is not closed", text, at)
            end = body.end()
        if match.lastgroup != "space":
            tokens.append(_Token(match.lastgroup, text[at:end], at))
        at = end
    return tokens


def _error(reason: str, text: str, at: int) -> ExpressionError:
    return ExpressionError(reason, text.count("\n", 0, at) + 1, at - (text.rfind("\n", 0, at) + 1) + 1)


def _describe_unknown(what: str, name: str, known: Iterable[str]) -> str:
    if name in _HINTS:
        return f"there is no {what} {quoted(name)}; {_HINTS[name]}"
    names = sorted(known)
    near = difflib.get_close_matches(name[:100], names, n=1)
    return f"there is no {what} {quoted(name)}; " + (
        f'did you mean "{near[0]}"?' if near else f"known are {', '.join(names)}"
    )


@dataclass(frozen=True, slots=True)
class _Comprehension:
    variable: str
    size: int
    over_query: bool


class _Checker:
    """Walks over the tokens of an expression once, and checks what it uses. Raises `ExpressionError`.

    `fields` and `functions` are those that it uses, `seen` are all its names. `cookies` and `headers` are those whose
    values it reads; with `reads_any_cookie` and `reads_any_header` they depend on the request. The steps are those of
    `Expression`.
    """

    def __init__(self, text: str, literals: Callable[[str, list[str]], None]) -> None:
        self.fields: set[str] = set()
        self.functions: set[str] = set()
        self.seen: set[str] = set()
        self.cookies: set[str] = set()
        self.reads_any_cookie = False
        self.headers: set[str] = set()
        self.reads_any_header = False
        self.fixed_steps = 1
        self.scaled_steps = 0
        self._text = text
        self._on_literals = literals
        self._tokens = _tokenize(text)
        # For each open parenthesis, the comprehension that it belongs to, or None.
        self._open: list[_Comprehension | None] = []
        for index, token in enumerate(self._tokens):
            if token.kind == "name":
                self._check_name(index, token)
            elif token.text == "(":
                self._open.append(self._open_comprehension(index))
            elif token.text == ")":
                self._open.pop()
            elif token.kind == "string" and "headers" in (self._map_indexed_by(index), self._map_searched_for(index)):
                self._check_header_name(token, self._string_value(token))

    def _text_at(self, index: int) -> str:
        return self._tokens[index].text if 0 <= index < len(self._tokens) else ""

    def _map_indexed_by(self, index: int) -> str:
        """Return the name of the map that this token indexes, as in ``headers["x"]``, or ""."""
        return self._text_at(index - 2) if self._text_at(index - 1) == "[" else ""

    def _map_searched_for(self, index: int) -> str:
        """Return the name of the map that is searched for this token, as in ``"x" in headers``, or ""."""
        return self._text_at(index + 2) if self._text_at(index + 1) == "in" else ""

    def _check_name(self, index: int, token: _Token) -> None:
        name = token.text
        self.seen.add(name)
        member, call = self._text_at(index - 1) == ".", self._text_at(index + 1) == "("
        if call:
            self._check_call(index, token, member=member)
        elif member:
            if self._text_at(index - 2) not in _MAPS:
                raise self._error(token, f"only headers, query and cookies have members, such as {quoted(name)}")
            if self._text_at(index - 2) == "headers":
                self._check_header_name(token, name)
        elif name not in _WORDS and name not in (bound := {one.variable for one in self._enclosing()}):
            if name not in FIELDS:
                raise self._error(token, _describe_unknown("field", name, {*FIELDS, *bound}))
            self.fields.add(name)
            if name == "cookies":
                self._note_cookie(index)
            elif name == "headers":
                self._note_header(index)

    def _note_cookie(self, index: int) -> None:
        """Note whose value is read where ``cookies`` is used. Whether a name is in the map depends on no value."""
        after, key, end = (self._text_at(index + distance) for distance in (1, 2, 3))
        if after == "[" and end == "]" and self._tokens[index + 2].kind == "string":
            self.cookies.add(self._string_value(self._tokens[index + 2]))
        elif after == "." and end != "(":
            self.cookies.add(key)
        elif after == "[" or (after != "." and self._text_at(index - 1) != "in"):
            self.reads_any_cookie = True

    def _note_header(self, index: int) -> None:
        """Note whose value is read where ``headers`` is used."""
        after, key, end = (self._text_at(index + distance) for distance in (1, 2, 3))
        if after == "[" and end == "]" and self._tokens[index + 2].kind == "string":
            self.headers.add(self._string_value(self._tokens[index + 2]))
        elif after == "." and end != "(":
            self.headers.add(key)
        elif after == "[":
            self.reads_any_header = True

    def _enclosing(self) -> list["_Comprehension"]:
        """Return the comprehensions around this place, the innermost last."""
        return [one for one in self._open if one]

    def _check_call(self, index: int, token: _Token, *, member: bool) -> None:
        name = token.text
        if member and name not in _METHODS:
            hint = f"write {name}(...), with the value inside" if name in _FUNCTIONS else ""
            raise self._error(token, hint or _describe_unknown("method", name, _METHODS))
        if not member and name not in _FUNCTIONS:
            hint = f"write value.{name}(...)" if name in _METHODS else ""
            raise self._error(token, hint or _describe_unknown("function", name, _FUNCTIONS))
        if name in _OWN_FUNCTIONS:
            self.functions.add(name)
        if name in ("regex", "ip_in", "in_list"):
            self._take_literals(index, token)

    def _open_comprehension(self, index: int) -> "_Comprehension | None":
        """Return the comprehension that begins at this parenthesis, or None. Refuses one that could take too long."""
        if self._text_at(index - 1) not in _MACROS or self._text_at(index - 2) != ".":
            return None
        macro, variable = self._tokens[index - 1], self._tokens[index + 1]
        if variable.text in FIELDS:
            raise self._error(variable, f"{quoted(variable.text)} is a field; give the variable another name")
        if self._text_at(index + 2) != ",":
            raise self._error(variable, f'{macro.text} takes a variable and an expression, such as (x, x == "a")')
        enclosing = self._enclosing()
        # Each of their steps copies the result so far.
        if enclosing and macro.text in ("map", "filter"):
            raise self._error(macro, f"{macro.text} cannot be nested in another comprehension; exists and all can")
        size = self._count_steps(index - 3, enclosing[-1] if enclosing else None)
        sizes = [size, *(one.size for one in enclosing)]
        if math.prod(sizes) > MAX_STEPS:
            reason = f"these comprehensions could take more than {MAX_STEPS} steps"
            hint = "iterate over query[x] inside a comprehension over query, or over a short list"
            raise self._error(macro, f"{reason}; {hint}")
        # MAX_STEPS allows one range of unknown size at most.
        if MAX_RANGE in sizes:
            self.scaled_steps = max(self.scaled_steps, math.prod(sizes) // MAX_RANGE)
        else:
            self.fixed_steps = max(self.fixed_steps, math.prod(sizes))
        return _Comprehension(
            variable.text, size, self._text_at(index - 3) == "query" and self._text_at(index - 4) != "."
        )

    def _count_steps(self, last: int, outer: "_Comprehension | None") -> int:
        """Return the steps of a comprehension per step of `outer`. Its range ends at the token `last`."""
        if self._text_at(last) != "]":
            return MAX_RANGE
        start, depth, elements = last, 0, 1
        while True:
            text = self._text_at(start)
            depth += (text in (")", "]", "}")) - (text in ("(", "[", "{"))
            if not depth:
                break
            elements += depth == 1 and text == ","
            start -= 1
        before = self._tokens[start - 1] if start else None
        if before is None or (before.kind == "mark" and before.text not in (")", "]", "}")) or before.text == "in":
            return elements
        # All names of a query together have no more values than a query may have.
        if outer and outer.over_query and before.text == "query" and self._text_at(start + 1) == outer.variable:
            return 1 if last == start + 2 else MAX_RANGE
        return MAX_RANGE

    def _take_literals(self, index: int, token: _Token) -> None:
        """Read the literals of a call: the arguments after the first, or all of a method's."""
        arguments = self._split_arguments(index + 1)
        if token.text == "regex":
            literals, valid = arguments, len(arguments) == 1
            usage = 'value.regex("pattern")'
        else:
            literals, valid = arguments[1:], len(arguments) == 2 or (token.text == "ip_in" and len(arguments) > 2)
            usage = 'ip_in(ip, "10.0.0.0/8", ...)' if token.text == "ip_in" else 'in_list(value, "name")'
        if not valid or any(len(argument) != 1 or argument[0].kind != "string" for argument in literals):
            raise self._error(token, f"write {usage}; the quoted parts must be literals")
        try:
            self._on_literals(token.text, [self._string_value(argument[0]) for argument in literals])
        except ValueError as error:
            raise self._error(literals[0][0], str(error)) from None

    def _split_arguments(self, start: int) -> list[list[_Token]]:
        """Return the tokens of each argument of the call whose parenthesis is at `start`."""
        arguments: list[list[_Token]] = [[]]
        depth = 0
        for token in self._tokens[start:]:
            depth += (token.text in ("(", "[", "{")) - (token.text in (")", "]", "}"))
            if not depth:
                break
            if depth == 1 and token.text == ",":
                arguments.append([])
            elif depth > 1 or token.text != "(":
                arguments[-1].append(token)
        return arguments if arguments != [[]] else []

    def _string_value(self, token: _Token) -> str:
        """Return the value of a string literal, as the library reads it."""
        value = cel.compile(token.text).execute()
        if not isinstance(value, str):
            raise self._error(token, "bytes are not supported; write a string, without the b")
        return value

    def _check_header_name(self, token: _Token, name: str) -> None:
        if name != name.lower():
            raise self._error(token, f"write header names in lower case: {quoted(name.lower())}")

    def _error(self, token: _Token, reason: str) -> ExpressionError:
        return _error(reason, self._text, token.at)


def _name_type(value: object) -> str:
    names = {str: "a string", int: "a number", float: "a number", list: "a list", tuple: "a list", dict: "a map"}
    return names.get(type(value), f"a {type(value).__name__}")


def _make_sample() -> Facts:
    """Return the facts of an ordinary handshake, to try expressions on."""
    fields = {b"host": [b"chat.example.com"], b"origin": [b"https://chat.example.com"], b"user-agent": [b"Mozilla/5.0"]}
    request = UpgradeRequest(
        target=b"/",
        fields=tuple((name, values[0]) for name, values in fields.items()),
        authority=b"chat.example.com",
        host="chat.example.com",
        key=b"",
        subprotocols=frozenset(),
        extensions=frozenset(),
        by_name=fields,
    )
    connection = Connection(
        ip="192.0.2.1", tls_version="TLSv1.3", tls_cipher="TLS_AES_128_GCM_SHA256", tls_sni="chat.example.com", site="*"
    )
    return gather(request, connection, strict_path=True, now=1_767_225_600.0)


_SAMPLE = _make_sample()
