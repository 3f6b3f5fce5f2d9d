"""Text from elsewhere, made fit for a terminal and a log."""


def printable(text: str) -> str:
    r"""Escape what is not printable, and the backslash, as Python does: nobody's bytes give orders to a terminal.

    ``\x1b[2J`` comes out as the eight characters that you read here, and a log line stays one line.
    """
    if text.isascii() and text.isprintable() and "\\" not in text:
        return text
    return "".join(
        char if char.isprintable() and char != "\\" else char.encode("unicode_escape").decode("ascii") for char in text
    )
