"""The errors a person can do something about.

The command line prints each problem as one line on standard error and exits with status 1. It catches nothing else, so
a traceback is always a bug in this program.
"""


class TlstunnelError(Exception):
    """Says in one line what is wrong, where, and what to do.

    It can report several problems at once. ``str()`` joins them with ``"; "``, for a field of the log or a response.
    """

    def __init__(self, first: str, *more: str) -> None:
        super().__init__(first, *more)
        self._problems = (first, *more)

    @property
    def problems(self) -> tuple[str, ...]:
        """Every problem, each in one line."""
        return self._problems

    def __str__(self) -> str:
        return "; ".join(self._problems)


class ConfigurationError(TlstunnelError):
    """The configuration file, or a value given on the command line, cannot be used."""


class CertificateError(TlstunnelError):
    """A certificate or key file cannot be read, parsed, matched or written."""


class ControlError(TlstunnelError):
    """No running tunnel was found, it does not respond, or it cannot do what it was asked to."""


class ListenError(TlstunnelError):
    """An address cannot be listened on."""


class ProcessError(TlstunnelError):
    """A child process cannot be started, has ended, or does not do what it was asked to."""


class StateError(TlstunnelError):
    """The state folder, or a file in it, cannot be used."""
