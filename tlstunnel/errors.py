"""The errors a person can do something about.

The command line prints each as one line on standard error and leaves with status 1; nothing else is caught there, so
a traceback always means a fault of ours.
"""


class TlstunnelError(Exception):
    """What was wrong, where, and what to do, in one line."""


class ConfigurationError(TlstunnelError):
    """The configuration file, or a value given on the command line, cannot be used."""


class CertificateError(TlstunnelError):
    """A certificate or key file cannot be read, parsed, matched or written."""


class ControlError(TlstunnelError):
    """A running tunnel cannot be found, asked, or does not do what it is asked."""


class ListenError(TlstunnelError):
    """An address cannot be listened on."""


class ProcessError(TlstunnelError):
    """A process of ours cannot be started, has ended, or does not do what it is asked."""
