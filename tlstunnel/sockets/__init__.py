"""Sockets and what is waited for on them: readiness, channels, deadlines, listening, closing, the PROXY protocol."""
