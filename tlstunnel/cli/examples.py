"""The examples at the end of each command's help.

Tested by tests/unit/test_cli_help.py.
"""


def render_examples(*lines: str) -> str:
    """Return the epilog of a command: these lines, each a whole command, as they are."""
    heading = "Example:" if len(lines) == 1 else "Examples:"
    return "\n".join(["\b", heading, *(f"  {line}" for line in lines)])
