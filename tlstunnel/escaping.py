"""Text from elsewhere, made fit for a terminal and a log."""

import traceback

LONGEST_TRACEBACK = 16_384
"""Characters of a traceback in the log: an exception's text may quote what a client sent."""


def printable(text: str) -> str:
    r"""Escape what is not printable, and the backslash, as Python does: nobody's bytes give orders to a terminal.

    ``\x1b[2J`` comes out as the eight characters that you read here, and a log line stays one line.
    """
    if text.isascii() and text.isprintable() and "\\" not in text:
        return text
    return "".join(
        char if char.isprintable() and char != "\\" else char.encode("unicode_escape").decode("ascii") for char in text
    )


def printable_traceback(error: BaseException) -> str:
    """The traceback of `error`, each of its lines escaped and indented: a client may have chosen parts of it.

    So none can be taken for a line of the log. What is too long is cut in the middle: a traceback's end says most.
    """
    text = "".join(traceback.format_exception(error))
    if len(text) > LONGEST_TRACEBACK:
        text = f"{text[: LONGEST_TRACEBACK // 2]}\n...\n{text[-LONGEST_TRACEBACK // 2 :]}"
    return "\n".join(f"  {printable(line)}" for line in text.splitlines())
