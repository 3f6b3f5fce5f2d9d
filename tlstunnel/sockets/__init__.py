"""Sockets: readiness, channels, deadlines, listening, closing, and the PROXY protocol."""
