"""A TLS-terminating, TCP-level tunnel for WebSockets."""

__version__ = "0.1.0"
