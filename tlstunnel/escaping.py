"""Escape text from outside before it reaches a terminal or the log."""

import traceback

LONGEST_TRACEBACK = 16_384
"""Characters of a traceback in the log. The text of an exception may contain what a client sent."""


def printable(text: str) -> str:
    r"""Escape unprintable characters and backslashes as Python does, so that the text cannot control a terminal.

    An escape character and ``[2J`` become the seven characters ``\x1b[2J``, and a log line stays one line.
    """
    if text.isascii() and text.isprintable() and "\\" not in text:
        return text
    return "".join(
        char if char.isprintable() and char != "\\" else char.encode("unicode_escape").decode("ascii") for char in text
    )


def shorten(text: str, most: int) -> str:
    """Return `text`, or its first characters and ``...``, `most` characters at most."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def printable_traceback(error: BaseException) -> str:
    """Return the traceback of `error` with each line escaped and indented, so that none looks like a line of the log.

    A client may have chosen parts of the text. A long traceback is cut in the middle, since its end says most.
    """
    text = "".join(traceback.format_exception(error))
    if len(text) > LONGEST_TRACEBACK:
        text = f"{text[: LONGEST_TRACEBACK // 2]}\n...\n{text[-LONGEST_TRACEBACK // 2 :]}"
    return "\n".join(f"  {printable(line)}" for line in text.splitlines())
